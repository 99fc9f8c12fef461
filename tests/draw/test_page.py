"""The page of a plan: parsed as HTML, with nothing in it that reaches out."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sffx.blocks import BlockPlan, Leaf
from sffx.draw.page import page
from sffx.draw.render import draw

VOID = {"meta", "link", "img", "br", "hr", "input"}


@dataclass
class Element:
    """A tag with its attributes, the element around it, and the text right inside it."""

    tag: str
    attributes: dict[str, str | None]
    around: Element | None
    text: str = ""

    def inside(self, ident: str) -> bool:
        return self.around is not None and (
            self.around.attributes.get("id") == ident or self.around.inside(ident)
        )


@dataclass
class Reader(HTMLParser):
    """The elements of a page; a tag that is closed in the wrong order, or never, is an error."""

    elements: list[Element] = field(default_factory=list)
    open: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs), self.open[-1] if self.open else None))
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.open[-1].text += data


def parse(text: str) -> list[Element]:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader.elements


def ids(elements: list[Element], kind: str = "box") -> list[str | None]:
    return [
        element.attributes["id"]
        for element in elements
        if kind in (element.attributes.get("class") or "").split()
    ]


def test_a_block_unfolds_into_its_modules_and_nodes_with_what_they_read(
    residual: BlockPlan,
) -> None:
    elements = parse(page(residual))
    inside = [
        element.text for element in elements if element.tag == "li" and element.inside("block_1")
    ]
    modules = ["out_0 →", "conv1", "conv2", "+", "view"]
    assert inside == [
        *modules,
        "out_0 →",
        "conv1",
        "relu",
        "conv2",
        "size",
        "+   (add)",
        "view   (out_1)",
    ]
    arcs = [
        element.attributes["class"]
        for element in elements
        if element.tag == "path" and element.inside("block_1")
    ]
    # Of the modules 0-1, 1-2, 2-3, 0-3 and 3-4;
    # of the nodes 0-1, 1-2, 2-3, 3-4, 3-5, 0-5, 5-6 and 4-6.
    assert sorted(str(arc) for arc in arcs) == ["next"] * 9 + ["skip"] * 4


def test_a_folded_block_names_its_shortcut(residual: BlockPlan) -> None:
    remarks = [
        element.text
        for element in parse(page(residual))
        if element.attributes.get("class") == "remark join"
    ]
    assert remarks == ["inside: + shortcut"]


def test_every_block_has_a_box_a_head_and_a_cut(resnet18: BlockPlan) -> None:
    elements = parse(page(resnet18))
    assert ids(elements) == [*(f"block_{index}" for index in range(9)), "classifier"]
    assert sum(element.attributes.get("class") == "head" for element in elements) == 9
    assert sum(element.attributes.get("class") == "cut" for element in elements) == 9


def test_the_figures_are_one_a_line(resnet18: BlockPlan) -> None:
    (figures,) = [
        element.attributes["data-figures"]
        for element in parse(page(resnet18))
        if element.tag == "summary"
        and element.around
        and element.around.attributes.get("id") == "block_0"
    ]
    assert figures is not None
    assert figures.splitlines() == [
        "conv1 (block_0)",
        "output: 64×56×56, after node out_0",
        "parameters: 9.54 k, 0.1% of the model",
        "multiply-adds: 118 M, 6.5% of the model",
        "kept: 9.95 MiB, 34.9% of the model",
    ]


def test_blocks_that_look_alike_are_inside_a_run(chain: Callable[[int], BlockPlan]) -> None:
    elements = parse(page(chain(5)))
    assert ids(elements, "run") == ["run_block_0"]
    boxes = [
        element for element in elements if (element.attributes.get("id") or "").startswith("block_")
    ]
    assert len(boxes) == 5
    assert all(box.inside("run_block_0") for box in boxes)
    assert any(
        element.tag == "b" and element.text == "5 × layers.0 … layers.4" for element in elements
    )


def opened(text: str) -> set[str | None]:
    elements = parse(text)
    return {
        element.attributes.get("id")
        for element in elements
        if element.tag == "details" and "open" in element.attributes
    }


def test_what_is_open_from_the_start_is_chosen(chain: Callable[[int], BlockPlan]) -> None:
    blocks = {"block_0", "block_1", "block_2", "classifier"}
    assert opened(page(chain(3))) == set()
    assert opened(page(chain(3), unfold=True)) == {"run_block_0"}
    assert opened(page(chain(3), detail="modules")) == blocks
    assert opened(page(chain(3), detail="nodes")) == {*blocks, None}


def test_values_that_cross_a_cut_are_lines_with_names(skipping: BlockPlan) -> None:
    elements = parse(page(skipping))
    lines = [element for element in elements if element.tag == "path" and element.inside("values")]
    assert [
        (line.attributes["class"], line.attributes["data-from"], line.attributes["data-to"])
        for line in lines
    ] == [
        ("side", "block_0", "block_2"),
        ("side detached", "block_0", "block_2"),
    ]
    assert [
        element.text for element in elements if element.tag == "title" and element.around in lines
    ] == ["mask", "skip"]
    remarks = [
        element.text
        for element in elements
        if "remark" in (element.attributes.get("class") or "").split()
    ]
    assert remarks == [
        "3×8×8 float32",
        "gives mask",
        "gives skip (detached)",
        "reads mask",
        "reads skip",
    ]


def test_every_line_ends_at_an_element(skipping: BlockPlan) -> None:
    elements = parse(page(skipping))
    known = {element.attributes.get("id") for element in elements}
    assert all(
        {line.attributes["data-from"], line.attributes["data-to"]} <= known
        for line in elements
        if line.tag == "path" and line.inside("values")
    )


def test_the_page_needs_nothing_else(resnet18: BlockPlan) -> None:
    text = page(resnet18)
    assert not [element for element in parse(text) if {"src", "href"} & set(element.attributes)]
    assert "http:" not in text
    assert "https:" not in text
    (policy,) = [
        element.attributes["content"]
        for element in parse(text)
        if element.attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    assert policy.startswith("default-src 'none';")


@pytest.mark.parametrize(
    "name",
    ["a<b>&c", "</script><script>alert(1)</script>", "\"' onload=x", "</details>", "ünï·cödé", ""],
)
def test_any_name_stays_text(small: BlockPlan, name: str) -> None:
    first = replace(small.blocks[0], name=name, modules=(f"{name}.{name}", name), sides=(name,))
    odd = replace(
        small,
        model=name,
        policy=name,
        blocks=(first, small.blocks[1]),
        notes=(name,),
        leaves=(Leaf(name, name, name, 0.1),),
    )
    elements = parse(page(odd))
    assert sum(element.tag == "script" for element in elements) == 1
    assert ids(elements) == ["block_0", "block_1", "classifier"]
    assert name in {element.text for element in elements if element.tag == "b"}


def test_light_and_dark_have_the_same_colours_by_name(small: BlockPlan) -> None:
    text = page(small)
    light, dark = (
        set(re.findall(r"(--\w+):", part))
        for part in text.split("@media (prefers-color-scheme: dark)")[:2]
    )
    assert light == dark
    assert set(re.findall(r"var\((--\w+)\)", text)) == light


def test_draw_writes_the_page_without_graphviz(
    small: BlockPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sffx.draw.render.render", None)
    assert draw(small, tmp_path / "net.html").read_text(encoding="utf-8") == page(small)
