"""Drawings in files: the formats, the Graphviz that is used, and what a failure leaves behind."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sffx.blocks import BlockPlan
from sffx.draw.graph import dot
from sffx.draw.render import draw, render
from sffx.errors import InputError, MissingExtra, SffxError


@pytest.fixture
def no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pygraphviz", None)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH; `install` puts a dot into it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def install(folder: Path, script: str) -> None:
    path = folder / "dot"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.usefixtures("no_program")
@pytest.mark.parametrize(
    ("suffix", "start"),
    [(".png", b"\x89PNG\r\n\x1a\n"), (".pdf", b"%PDF-"), (".svg", b"<?xml"), (".PNG", b"\x89PNG")],
)
def test_pygraphviz_draws_each_format(
    resnet18: BlockPlan, tmp_path: Path, suffix: str, start: bytes
) -> None:
    pytest.importorskip("pygraphviz")
    path = draw(resnet18, tmp_path / f"net{suffix}")
    assert path == tmp_path / f"net{suffix}"
    assert path.read_bytes().startswith(start)


@pytest.mark.usefixtures("no_program")
def test_an_svg_holds_every_block(resnet18: BlockPlan, tmp_path: Path) -> None:
    pytest.importorskip("pygraphviz")
    picture = draw(resnet18, tmp_path / "net.svg").read_text()
    assert all(
        f">{block.name}</text>" in picture for block in (*resnet18.blocks, resnet18.classifier)
    )
    assert picture.rstrip().endswith("</svg>")


@pytest.mark.usefixtures("no_program", "no_library")
@pytest.mark.parametrize("suffix", [".dot", ".gv"])
def test_text_needs_no_renderer(small: BlockPlan, tmp_path: Path, suffix: str) -> None:
    assert draw(small, tmp_path / f"net{suffix}").read_text(encoding="utf-8") == dot(small)


@pytest.mark.usefixtures("no_program", "no_library")
def test_no_renderer_names_the_extra_and_the_text(small: BlockPlan, tmp_path: Path) -> None:
    with pytest.raises(
        MissingExtra, match=r"\.html or \.dot need nothing.*'pygraphviz'.*sffx\[viz\]"
    ):
        draw(small, tmp_path / "net.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_library")
def test_the_system_s_dot_is_preferred(program: Path) -> None:
    install(program, 'echo "$@"; while read -r line; do echo "$line"; done')
    assert render("digraph {}\n", "svg") == b"-Tsvg\ndigraph {}\n"


@pytest.mark.parametrize("script", ["exit 1", "exit 0"])
def test_a_failing_dot_falls_back_to_pygraphviz(program: Path, script: str) -> None:
    pytest.importorskip("pygraphviz")
    install(program, script)
    assert render("digraph {}", "png").startswith(b"\x89PNG")


@pytest.mark.usefixtures("no_library")
def test_a_failing_dot_without_pygraphviz_tells_what_dot_said(program: Path) -> None:
    install(program, 'echo "Format: pdf not recognized" >&2; exit 1')
    with pytest.raises(SffxError, match=r"dot could not draw a pdf: Format: pdf not recognized"):
        render("digraph {}", "pdf")


@pytest.mark.usefixtures("no_program")
@pytest.mark.parametrize("cause", ["draw", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    small: BlockPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    pygraphviz = pytest.importorskip("pygraphviz")
    path = tmp_path / "net.svg"
    path.write_text("old")

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(pygraphviz.AGraph if cause == "draw" else os, cause, fail)
    with pytest.raises((SffxError, OSError), match="no space"):
        draw(small, path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("net.svg", "old")]


def test_a_link_stays_a_link(small: BlockPlan, tmp_path: Path) -> None:
    (tmp_path / "first.dot").write_text("old")
    (tmp_path / "latest.dot").symlink_to("first.dot")
    assert draw(small, tmp_path / "latest.dot") == tmp_path / "latest.dot"
    assert (tmp_path / "latest.dot").is_symlink()
    assert (tmp_path / "first.dot").read_text(encoding="utf-8") == dot(small)


def test_a_cut_net_is_drawn_by_its_plan(small: BlockPlan, tmp_path: Path) -> None:
    assert draw(SimpleNamespace(plan=small), tmp_path / "net.dot").read_text(
        encoding="utf-8"
    ) == dot(small)


@pytest.mark.parametrize("thing", [None, "resnet18", SimpleNamespace(plan="residual")])
def test_what_has_no_plan_is_refused(thing: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no plan to draw in a"):
        draw(thing, tmp_path / "net.svg")


@pytest.mark.parametrize("name", ["net.jpeg", "net", "net.svg.txt"])
def test_an_unknown_suffix_lists_the_known_ones(
    small: BlockPlan, tmp_path: Path, name: str
) -> None:
    with pytest.raises(InputError, match=r"unknown.*\.svg, \.png, \.pdf, \.html, \.dot, \.gv"):
        draw(small, tmp_path / name)


def test_a_missing_folder_is_said(small: BlockPlan, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the folder .* does not exist"):
        draw(small, tmp_path / "nowhere" / "net.svg")
