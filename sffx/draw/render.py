"""Drawings in files: as a page, as the text of a graph, or by Graphviz as svg, png or pdf."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sffx.blocks import BlockPlan
from sffx.checks import require_flag
from sffx.draw.clusters import detailed_graph
from sffx.draw.detail import DETAILS
from sffx.draw.graph import block_graph
from sffx.draw.page import page
from sffx.draw.progress import Progress
from sffx.errors import InputError, MissingExtra, SffxError, shown
from sffx.files import as_path, require_folder_of, write
from sffx.net import unwrapped

if TYPE_CHECKING:
    from graphviz import Digraph

TEXT = (".dot", ".gv")
PAGES = (".html",)
PICTURES = (".svg", ".png", ".pdf")
FORMATS = (*PICTURES, *PAGES, *TEXT)

# Dots per inch of a png; svg and pdf have no dots.
RESOLUTION = "144"

KEEP_TEXT = "Hint: a path that ends in .dot keeps the text"


def draw(
    plan_or_net: Any,
    path: str | os.PathLike[str],
    *,
    unfold: bool = False,
    detail: str = "blocks",
    progress: Progress | None = None,
) -> Path:
    """Draw the graph of a plan into a file.

    Args:
        plan_or_net: a `BlockPlan`, or a cut net, which carries one, also inside a wrapper such as
            `AveragedModel`.
        path: of the file. Its suffix chooses the format: .svg, .png and .pdf are pictures, .html is
            a page whose blocks unfold, .dot and .gv are the text of the graph.
        unfold: whether blocks in a row that look alike are drawn one by one. By default they are
            one box where there are many blocks.
        detail: what is shown of each block: "blocks" its content in words, "modules" the graph of
            its modules, "nodes" the graph of its nodes.
        progress: of a training. It colours the blocks by accuracy and learning rate.

    Returns:
        The path of the file, which is replaced as a whole. If anything fails, an older file stays
        as it was.

    Raises:
        InputError: there is no plan to draw, the suffix or the detail is unknown, or the folder
            does not exist.
        MissingExtra: the package graphviz is not installed, or neither Graphviz's `dot` nor
            pygraphviz is there. Pages need none of them, and text needs only the first.
    """
    plan = plan_in(plan_or_net)
    if plan is None:
        kind = type(plan_or_net).__name__
        raise InputError(
            f"there is no plan to draw in a {kind}. Hint: pass sffx.plan(model) or a cut net"
        )
    if not isinstance(progress, Progress | None):
        raise InputError(
            f"progress is a {type(progress).__name__}. Hint: pass sffx.draw.progress.Progress"
        )
    require_flag("unfold", unfold)
    if not isinstance(detail, str) or detail not in DETAILS:
        raise InputError(
            f"there is no detail {shown(detail)}. Hint: choose one of {', '.join(DETAILS)}"
        )
    path = check_path(path, FORMATS)
    if path.suffix.lower() in PAGES:
        text = page(plan, unfold=unfold, detail=detail, progress=progress)
        write(path, text.encode())
        return path
    if detail == "blocks":
        graph = block_graph(plan, unfold=unfold, progress=progress)
    else:
        graph = detailed_graph(plan, detail, unfold=unfold, progress=progress)
    return write_graph(path, graph)


def plan_in(plan_or_net: Any) -> BlockPlan | None:
    """Return the plan itself, or that of a cut net, also in a wrapper; None if there is none."""
    inner = unwrapped(plan_or_net)
    plan = getattr(inner, "plan", inner)
    return plan if isinstance(plan, BlockPlan) else None


def check_path(path: str | os.PathLike[str], suffixes: tuple[str, ...]) -> Path:
    """Return the path if a drawing can be written there.

    Args:
        path: of a file to write.
        suffixes: the known ones, in lower case, with their dots.

    Raises:
        InputError: the suffix is another, or the folder does not exist.
    """
    path = as_path(path)
    if path.suffix.lower() not in suffixes:
        raise InputError(
            f"cannot draw to {path.name!r}: the suffix {path.suffix!r} is unknown. "
            f"Hint: use one of {', '.join(suffixes)}"
        )
    require_folder_of(path, "draw")
    return path


def write_graph(path: Path, graph: Digraph) -> Path:
    """Replace a file by the text of a graph or by a picture of it, as the suffix says.

    Returns:
        The path.

    Raises:
        MissingExtra: there is no Graphviz to draw with.
    """
    kind = path.suffix.lower()
    content = graph.source.encode() if kind in TEXT else render(graph, kind[1:])
    write(path, content)
    return path


def render(graph: Digraph, kind: str) -> bytes:
    """Return a picture of a graph.

    Graphviz's program `dot` draws it. Where there is no such program, or it fails, pygraphviz does,
    which brings a Graphviz of its own.

    Args:
        graph: to draw.
        kind: "svg", "png" or "pdf".

    Returns:
        The content of the picture's file.

    Raises:
        MissingExtra: neither is there.
        SffxError: all that is there failed.
    """
    from graphviz import CalledProcessError, ExecutableNotFound

    if kind == "png":
        graph = graph.copy()
        graph.graph_attr["dpi"] = RESOLUTION
    try:
        # Quiet, or each warning of the program, as of its fonts, would be printed.
        picture = graph.pipe(format=kind, quiet=True)
    except ExecutableNotFound:
        return _by_pygraphviz(graph.source, kind)
    # A program that ends early breaks the pipe, which is an OSError.
    except (OSError, CalledProcessError) as error:
        return _after_failure(graph.source, kind, _reason(error), error)
    if not picture:
        return _after_failure(graph.source, kind, "it wrote nothing", None)
    return picture


def _by_pygraphviz(text: str, kind: str) -> bytes:
    try:
        from pygraphviz import AGraph
    except ImportError as error:
        purpose = (
            "drawing without Graphviz's program dot (paths that end in .html or .dot need neither)"
        )
        raise MissingExtra("pygraphviz", "viz", purpose) from error
    try:
        picture = AGraph(string=text).draw(format=kind, prog="dot")
    # What pygraphviz raises depends on where its C library fails.
    except Exception as error:
        raise SffxError(f"pygraphviz could not draw a {kind}: {error}. {KEEP_TEXT}") from error
    if not picture:
        raise SffxError(f"pygraphviz drew an empty {kind}. {KEEP_TEXT}")
    return bytes(picture)


def _after_failure(text: str, kind: str, reason: str, cause: Exception | None) -> bytes:
    try:
        return _by_pygraphviz(text, kind)
    except MissingExtra:
        raise SffxError(
            f"Graphviz's dot could not draw a {kind}: {reason}. Hint: pip install 'sffx[viz]'"
        ) from cause


def _reason(failure: Exception) -> str:
    output = getattr(failure, "stderr", None)
    if not output:
        return str(failure)
    return output.decode(errors="replace").strip()
