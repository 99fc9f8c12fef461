"""The code blocks of the README and of the guides run, page by page, in the order of the page.

A ```python block runs in one namespace with the blocks before it. In a ```sh block, each line of
sffx-viz or sffx-export runs; of other commands the file or the module must exist. A ```text block
is only shown.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from sffx.cli import export, viz
from tests.examples import shorter
from tests.examples.scripts import EXAMPLES, ROOT

PAGES = [ROOT / "README.md", *sorted((EXAMPLES / "guides").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#([^)\s]+))?\)")
PROGRAMS: dict[str, Callable[[Sequence[str]], int]] = {
    "sffx-viz": viz.main,
    "sffx-export": export.main,
}


class Block(NamedTuple):
    """A fenced block of a page: its language, its text, and the line where the text begins."""

    language: str
    text: str
    line: int


def blocks_of(page: str) -> Iterator[Block]:
    for match in BLOCK.finditer(page):
        line = page.count("\n", 0, match.start(2)) + 1
        yield Block(match[1], match[2], line)


def run_python(block: Block, page: Path, namespace: dict[str, Any]) -> None:
    """Run a block so that an error names the page and the line in it."""
    padding = "\n" * (block.line - 1)
    exec(compile(padding + block.text, str(page), "exec"), namespace)


def run_command(line: str) -> None:
    program, *arguments = shlex.split(line, comments=True)
    if program in PROGRAMS:
        assert PROGRAMS[program](arguments) == 0, line
    elif program in ("python", "python3"):
        require_python_target(arguments)
    else:
        assert program in ("git", "pip", "cd"), f"a command that no test knows: {line}"


def require_python_target(arguments: list[str]) -> None:
    """Check that the file or the module which a command runs exists."""
    if arguments[0] == "-m":
        path = ROOT / arguments[1].replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), arguments
    else:
        assert (ROOT / arguments[0]).is_file(), arguments


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that a page gives its headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


# Lightning calls a part of torch that torch has deprecated, and recommends workers for any loader.
@pytest.mark.filterwarnings(
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"
)
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shorter.use(monkeypatch)
    # The compiler of C++ takes a minute. What is compiled is the same.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "guide"}
    blocks = list(blocks_of(page.read_text(encoding="utf-8")))
    assert blocks
    for block in blocks:
        if block.language == "python":
            run_python(block, page, namespace)
        elif block.language == "sh":
            for line in block.text.splitlines():
                run_command(line)
        else:
            assert block.language == "text"


@pytest.mark.parametrize(
    "page",
    [*PAGES, *sorted((ROOT / "tools" / "results").glob("**/README.md"))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path = (page.parent / target).resolve()
        assert path.exists(), target
        assert not anchor or anchor in anchors_of(path), f"{target}#{anchor}"
