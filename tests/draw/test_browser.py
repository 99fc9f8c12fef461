"""The page in a real browser: what unfolds and moves, in light and in dark, without a network.

Needs playwright and a browser: the system's Chromium or Chrome, or the one that
`playwright install chromium` fetches.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sffx.blocks import BlockPlan
from sffx.draw.page import page as page_of
from sffx.draw.progress import Progress
from tests.draw.conftest import chain

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def launch() -> Iterator[Callable[..., Any]]:
    """Starts a browser without a window; the tests are skipped where there is none."""
    with playwright.sync_playwright() as play:
        programs = [*map(shutil.which, BROWSERS), play.chromium.executable_path]
        program = next((path for path in programs if path and os.path.exists(path)), None)
        if program is None:
            pytest.skip("there is no Chromium or Chrome. Hint: playwright install chromium")
        yield partial(play.chromium.launch, executable_path=program, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def browser(launch: Callable[..., Any]) -> Iterator[Any]:
    started = launch()
    yield started
    started.close()


class Shown:
    """The page of a plan as a browser shows it, with all that it logs and asks the network for."""

    def __init__(
        self, browser: Any, path: Path, text: str, scheme: str = "light", width: int = 900
    ) -> None:
        path.write_text(text, encoding="utf-8")
        self.tab = browser.new_page(viewport={"width": width, "height": 500}, color_scheme=scheme)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.on("console", lambda message: self.errors.append(message.text))
        self.tab.goto(path.as_uri())

    def is_open(self, ident: str) -> bool:
        return bool(self.tab.evaluate(f"document.getElementById('{ident}').open"))

    def scale(self) -> float:
        return float(
            self.tab.evaluate(
                "new DOMMatrix(getComputedStyle(document.getElementById('graph')).transform).a"
            )
        )

    def wait_until(self, condition: str) -> None:
        """Wait until a condition in JavaScript holds, for ten seconds at most.

        Playwright's own `wait_for_function` evaluates a text again for each frame, which the
        page's content policy forbids from the second frame on.
        """
        frame = "await new Promise(requestAnimationFrame)"
        loop = f"for (const end = Date.now() + 1e4; !({condition}) && Date.now() < end; ) {frame}"
        assert self.tab.evaluate(f"async () => {{ {loop}; return {condition} }}"), condition

    def scrolled(self) -> tuple[float, float]:
        return tuple(self.tab.evaluate("[view.scrollLeft, view.scrollTop]"))

    def colour(self, selector: str, name: str = "background-color") -> str:
        return str(
            self.tab.evaluate(
                f"getComputedStyle(document.querySelector('{selector}')).getPropertyValue('{name}')"
            )
        )


@pytest.fixture
def shown(browser: Any, tmp_path: Path, resnet18: BlockPlan) -> Iterator[Shown]:
    page = Shown(browser, tmp_path / "net.html", page_of(resnet18))
    yield page
    assert page.errors == []
    page.tab.close()


def test_the_network_is_asked_for_nothing(shown: Shown) -> None:
    shown.tab.click("#unfold")
    shown.tab.wait_for_timeout(100)
    assert [url for url in shown.requests if not url.startswith("file:")] == []
    assert len(shown.requests) == 1


def test_what_a_name_would_fetch_is_not_fetched(
    browser: Any, tmp_path: Path, small: BlockPlan
) -> None:
    page = Shown(
        browser,
        tmp_path / "net.html",
        page_of(small).replace("</header>", '<img src="http://127.0.0.1:9/x.png"></header>'),
    )
    assert any("Content Security Policy" in error for error in page.errors)
    page.tab.close()


def test_a_click_unfolds_a_block_and_folds_it_again(shown: Shown) -> None:
    assert not shown.is_open("block_0")
    shown.tab.click("#block_0 > summary")
    assert shown.is_open("block_0")
    assert shown.tab.is_visible("#block_0 .flow li")
    shown.tab.click("#block_0 > summary")
    assert not shown.is_open("block_0")


def test_the_keyboard_goes_from_block_to_block_and_unfolds(shown: Shown) -> None:
    shown.tab.focus("#view")
    shown.tab.keyboard.press("Tab")
    assert shown.tab.evaluate("document.activeElement.parentElement.id") == "block_0"
    shown.tab.keyboard.press("Tab")
    shown.tab.keyboard.press("Enter")
    assert [shown.is_open(name) for name in ("block_0", "block_1")] == [False, True]
    assert shown.tab.inner_text("#figures").startswith("layer1.0 (block_1)")


def test_all_blocks_unfold_and_fold_by_buttons(shown: Shown) -> None:
    shown.tab.click("#unfold")
    assert shown.tab.evaluate(
        "[...document.querySelectorAll('#graph details')].every(box => box.open)"
    )
    shown.tab.click("#fold")
    assert not shown.tab.evaluate(
        "[...document.querySelectorAll('#graph details')].some(box => box.open)"
    )


def test_the_pointer_on_a_block_shows_its_figures(shown: Shown) -> None:
    assert not shown.tab.is_visible("#figures")
    shown.tab.hover("#block_2 > summary")
    assert "parameters: 74.0 k" in shown.tab.inner_text("#figures")
    assert shown.tab.is_visible("#figures")
    shown.tab.hover("h1")
    assert not shown.tab.is_visible("#figures")


def test_keys_and_buttons_zoom(shown: Shown) -> None:
    shown.tab.keyboard.press("+")
    assert shown.scale() == pytest.approx(1.2)
    shown.tab.click("#out")
    assert shown.scale() == pytest.approx(1.0)
    shown.tab.keyboard.press("f")
    fitted = shown.scale()
    assert fitted < 1
    assert shown.tab.evaluate("sheet.offsetHeight <= view.clientHeight + 1")
    shown.tab.keyboard.press("0")
    assert shown.scale() == pytest.approx(1.0)


def test_the_wheel_zooms_about_the_pointer_only_with_control(shown: Shown) -> None:
    shown.tab.mouse.move(400, 300)
    shown.tab.mouse.wheel(0, 200)
    shown.wait_until("view.scrollTop > 0")
    assert shown.scale() == 1
    shown.tab.keyboard.down("Control")
    shown.tab.mouse.wheel(0, -100)
    shown.tab.keyboard.up("Control")
    shown.wait_until("graph.style.transform !== ''")
    assert shown.scale() == pytest.approx(1.1)


def test_dragging_and_arrows_pan(shown: Shown) -> None:
    shown.tab.mouse.move(860, 300)
    shown.tab.mouse.down()
    shown.tab.mouse.move(860, 150, steps=3)
    assert "dragged" in (shown.tab.get_attribute("#view", "class") or "")
    shown.tab.mouse.up()
    assert shown.scrolled()[1] == pytest.approx(150, abs=2)
    assert "dragged" not in (shown.tab.get_attribute("#view", "class") or "")
    shown.tab.keyboard.press("ArrowDown")
    assert shown.scrolled()[1] == pytest.approx(210, abs=2)


def test_a_press_on_a_scrollbar_drags_nothing(
    launch: Callable[..., Any], tmp_path: Path, resnet18: BlockPlan
) -> None:
    """Chromium tells no end of such a press, so the page followed the pointer ever after."""
    browser = launch(ignore_default_args=["--hide-scrollbars"])
    page = Shown(browser, tmp_path / "net.html", page_of(resnet18))
    assert page.tab.evaluate("view.clientWidth < view.offsetWidth")
    right, top = page.tab.evaluate("(({right, top}) => [right, top])(view.getBoundingClientRect())")
    page.tab.mouse.move(right - 6, top + 20)
    page.tab.mouse.down()
    page.tab.mouse.move(right - 6, top + 80, steps=3)
    page.tab.mouse.up()
    before = page.scrolled()
    page.tab.mouse.move(right - 300, top + 120, steps=3)
    assert page.scrolled() == before
    assert "dragged" not in (page.tab.get_attribute("#view", "class") or "")
    browser.close()


def luminance(colour: str) -> float:
    red, green, blue = (
        int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")
    )
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255


@pytest.mark.parametrize(("scheme", "is_light"), [("light", True), ("dark", False)])
def test_light_and_dark_are_those_of_the_reader(
    browser: Any, tmp_path: Path, small: BlockPlan, scheme: str, is_light: bool
) -> None:
    accuracy = {"block_0": 0.2, "block_1": 0.9, "classifier": 0.5}
    page = Shown(
        browser,
        tmp_path / "net.html",
        page_of(small, progress=Progress(accuracy, {"block_0": 1e-3})),
        scheme,
    )
    paper, ink = luminance(page.colour("body")), luminance(page.colour("body", "color"))
    assert (paper > ink) == is_light
    assert abs(paper - ink) > 0.6
    grounds = {
        ".badge": ".badge",
        "#block_0 summary b": "#block_0",
        ".remark": "#block_0",
        ".cut": "body",
        ".head span": ".head span",
    }
    for selector, ground in grounds.items():
        assert (
            abs(luminance(page.colour(selector, "color")) - luminance(page.colour(ground))) > 0.3
        ), selector
    page.tab.close()


def test_no_text_of_a_block_lies_over_another(
    browser: Any, tmp_path: Path, residual: BlockPlan
) -> None:
    page = Shown(browser, tmp_path / "net.html", page_of(residual, detail="nodes"))
    boxes = page.tab.evaluate(
        "[...document.querySelectorAll('.flow li')].map(line => line.getBoundingClientRect())"
    )
    assert len(boxes) > 8
    for index, one in enumerate(boxes):
        for other in boxes[index + 1 :]:
            assert one["bottom"] <= other["top"] + 0.5 or other["bottom"] <= one["top"] + 0.5
    page.tab.close()


@pytest.mark.parametrize("detail", ["blocks", "nodes"])
def test_a_narrow_window_holds_the_page(
    browser: Any, tmp_path: Path, skipping: BlockPlan, detail: str
) -> None:
    page = Shown(browser, tmp_path / "net.html", page_of(skipping, detail=detail), width=390)
    assert page.tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.tab.evaluate("view.scrollWidth <= view.clientWidth")
    sides = page.tab.evaluate(
        "[...document.querySelectorAll('.box, .head span, .input, .cut, button, h1')]"
        ".map(box => [box.getBoundingClientRect().left, box.getBoundingClientRect().right])"
    )
    assert len(sides) > 15
    assert all(0 <= left < right <= 390 for left, right in sides)
    lanes = page.tab.evaluate("paths.map(path => path.getBBox().x)")
    assert len(lanes) == 2
    assert all(0 < lane < 40 for lane in lanes)
    page.tab.close()


def with_skips(skips: dict[int, int]) -> BlockPlan:
    """Return a chain of 20 blocks, with a value that skips from each key's block to its value's."""
    plan = chain(20)
    blocks = list(plan.blocks)
    for source, reader in skips.items():
        blocks[source] = replace(blocks[source], sides=(f"skip_{source}",))
        inputs = (*blocks[reader].inputs, f"skip_{source}")
        blocks[reader] = replace(blocks[reader], inputs=inputs)
    return replace(plan, blocks=tuple(blocks))


@pytest.mark.parametrize("width", [390, 900])
def test_lines_side_by_side_do_not_overlap(browser: Any, tmp_path: Path, width: int) -> None:
    """As in a U-Net: the first block hands a value to the last, the second to the last but one."""
    plan = with_skips({i: 19 - i for i in range(9)})
    page = Shown(browser, tmp_path / "net.html", page_of(plan), width=width)
    left_of = dict(page.tab.evaluate("paths.map(path => [path.dataset.from, path.getBBox().x])"))
    lefts = [left_of[f"block_{i}"] for i in range(9)]
    # The longest line runs outside, so that none crosses another.
    assert lefts == sorted(set(lefts))
    assert lefts[0] > 0
    page.tab.close()


def test_lines_below_each_other_have_one_lane(browser: Any, tmp_path: Path) -> None:
    page = Shown(browser, tmp_path / "net.html", page_of(with_skips({0: 3, 5: 8, 10: 13})))
    lefts = page.tab.evaluate("paths.map(path => path.getBBox().x)")
    assert len(lefts) == 3
    assert len(set(lefts)) == 1
    page.tab.close()


@pytest.mark.parametrize("width", [1200, 1600, 2400])
def test_a_wide_window_is_used(
    browser: Any, tmp_path: Path, skipping: BlockPlan, width: int
) -> None:
    page = Shown(browser, tmp_path / "net.html", page_of(skipping, detail="nodes"), width=width)
    assert page.tab.evaluate("document.documentElement.scrollWidth") <= width
    assert page.tab.evaluate("view.scrollWidth <= view.clientWidth")
    box = page.tab.evaluate("block_0.getBoundingClientRect()")
    heads = page.tab.evaluate(
        "Math.max(...[...document.querySelectorAll('.head span')]"
        ".map(head => head.getBoundingClientRect().right))"
    )
    legend = page.tab.evaluate("document.querySelector('footer').getBoundingClientRect()")
    # The blocks and their heads fill what the legend at the right leaves.
    assert box["width"] >= 450
    assert legend["left"] - 160 < heads <= legend["left"]
    assert legend["right"] == width
    assert legend["bottom"] == 500
    # The nodes stand beside the modules.
    lists = page.tab.evaluate(
        "[...block_0.querySelectorAll('.flow')].map(list => list.getBoundingClientRect())"
    )
    assert lists[0]["right"] <= lists[1]["left"]
    page.tab.close()


def test_all_of_the_page_is_printed(shown: Shown) -> None:
    shown.tab.keyboard.press("+")
    shown.tab.emulate_media(media="print")
    assert shown.tab.evaluate("getComputedStyle(graph).transform") == "none"
    assert not shown.tab.is_visible("[role=toolbar]")
    # Nothing is left in a part that only scrolling would show.
    bottoms = shown.tab.evaluate(
        "[view, document.body].map(box => box.getBoundingClientRect().bottom)"
    )
    last = shown.tab.evaluate("classifier.getBoundingClientRect().bottom")
    assert all(last <= bottom for bottom in bottoms)
    assert last > 500
    paper = shown.tab.pdf(format="A5")
    assert paper.count(b"/Type /Page\n") + paper.count(b"/Type /Page ") >= 2
