"""Drawings in files: the formats, the Graphviz that draws, and what a failure leaves behind."""

from __future__ import annotations

import os
import shutil
import sys
import xml.etree.ElementTree as xml
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import sffx
from sffx.blocks import BlockPlan
from sffx.draw.graph import block_graph, new_graph
from sffx.draw.render import draw, render
from sffx.draw.words import heading
from sffx.errors import InputError, MissingExtra, SffxError
from tests.draw.drawn import need_graphviz

if TYPE_CHECKING:
    from graphviz import Digraph

FORMATS = [
    (".png", b"\x89PNG\r\n\x1a\n"),
    (".pdf", b"%PDF-"),
    (".svg", b"<?xml"),
    (".PNG", b"\x89PNG"),
]


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


@pytest.fixture(params=["program", "pygraphviz"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One of the two ways to a picture, with the other one taken away."""
    if request.param == "program":
        if shutil.which("dot") is None:
            pytest.skip("Graphviz's dot is not installed")
        monkeypatch.setitem(sys.modules, "pygraphviz", None)
    else:
        pytest.importorskip("pygraphviz")
        monkeypatch.setenv("PATH", "")
    return request.param


def sample() -> Digraph:
    graph = new_graph()
    graph.edge("one", "two")
    return graph


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize(("suffix", "start"), FORMATS)
def test_each_format_is_drawn(
    resnet18: BlockPlan, tmp_path: Path, suffix: str, start: bytes
) -> None:
    path = draw(resnet18, tmp_path / f"net{suffix}")
    assert path == tmp_path / f"net{suffix}"
    assert path.read_bytes().startswith(start)


@pytest.mark.usefixtures("route")
def test_an_svg_holds_every_block(resnet18: BlockPlan, tmp_path: Path) -> None:
    picture = draw(resnet18, tmp_path / "net.svg").read_text()
    assert all(f">{block.name}</text>" in picture for block in resnet18.all_blocks)
    assert picture.rstrip().endswith("</svg>")


@pytest.mark.parametrize("model", ["Net", "<Net>", 'a "b" \\N', "a\nb", "日本", "<b"])
@pytest.mark.parametrize("detail", ["blocks", "modules"])
def test_an_svg_has_the_title_of_its_plan(
    small: BlockPlan, tmp_path: Path, model: str, detail: str
) -> None:
    """A browser shows it where the pointer rests. Graphviz calls a graph without a name %3."""
    need_graphviz()
    plan = replace(small, model=model)
    picture = xml.parse(draw(plan, tmp_path / "net.svg", detail=detail))
    title = picture.find(".//{http://www.w3.org/2000/svg}title")
    assert title is not None
    assert (title.text or "").split() == heading(plan).split()


@pytest.mark.usefixtures("route")
def test_a_png_has_more_dots_than_a_picture_of_points() -> None:
    png, svg = render(sample(), "png"), render(sample(), "svg").decode()
    points = float(svg.partition('width="')[2].partition("pt")[0])
    # Bytes 16 to 19 of a png are its width.
    assert int.from_bytes(png[16:20], "big") == pytest.approx(2 * points, abs=2)


@pytest.mark.usefixtures("no_program", "no_library")
@pytest.mark.parametrize("suffix", [".dot", ".gv"])
def test_text_needs_no_renderer(small: BlockPlan, tmp_path: Path, suffix: str) -> None:
    assert (
        draw(small, tmp_path / f"net{suffix}").read_text(encoding="utf-8")
        == block_graph(small).source
    )


@pytest.mark.usefixtures("no_program", "no_library")
def test_no_renderer_names_the_extra_and_the_text(small: BlockPlan, tmp_path: Path) -> None:
    with pytest.raises(
        MissingExtra, match=r"\.html or \.dot need neither.*'pygraphviz'.*sffx\[viz\]"
    ):
        draw(small, tmp_path / "net.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".svg", ".dot"])
def test_without_the_package_a_graph_names_it_and_a_page_is_drawn(
    small: BlockPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setitem(sys.modules, "graphviz", None)
    with pytest.raises(MissingExtra, match=r"\.html needs nothing.*'graphviz'.*sffx\[viz\]"):
        draw(small, tmp_path / f"net{suffix}")
    assert draw(small, tmp_path / "net.html").exists()


@pytest.mark.usefixtures("no_library")
def test_the_program_is_preferred(program: Path) -> None:
    install(program, 'echo "$@"; while read -r line; do echo "$line"; done')
    drawn = render(sample(), "svg").decode()
    assert drawn.startswith("-Kdot -Tsvg\ndigraph plan {\n")
    assert "one -> two" in drawn


@pytest.mark.parametrize("script", ["exit 1", "exit 0"])
def test_a_failing_program_falls_back_to_pygraphviz(program: Path, script: str) -> None:
    pytest.importorskip("pygraphviz")
    install(program, script)
    assert render(sample(), "png").startswith(b"\x89PNG")


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ('echo "Format: pdf not recognized" >&2; exit 1', "Format: pdf not recognized"),
        ("exit 0", "it wrote nothing"),
    ],
)
def test_a_failing_program_without_pygraphviz_is_named_with_its_reason(
    program: Path, script: str, reason: str
) -> None:
    install(program, script)
    with pytest.raises(SffxError, match=f"dot could not draw a pdf: {reason}"):
        render(sample(), "pdf")


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
    assert (tmp_path / "first.dot").read_text(encoding="utf-8") == block_graph(small).source


def test_a_cut_net_in_a_wrapper_is_drawn(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    net = sffx.transform(model, "layer", torch.zeros(2, 4), check=False)
    path = draw(torch.optim.swa_utils.AveragedModel(net), tmp_path / "net.dot")
    assert path.read_text() == block_graph(net.plan).source


def test_a_cut_net_is_drawn_by_its_plan(small: BlockPlan, tmp_path: Path) -> None:
    assert (
        draw(SimpleNamespace(plan=small), tmp_path / "net.dot").read_text(encoding="utf-8")
        == block_graph(small).source
    )


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
