"""Drawings in files: a plan as a page, or by the Graphviz that is there as svg, png or pdf."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from pathlib import Path
from typing import Any

from sffx.blocks import BlockPlan
from sffx.draw.clusters import clusters_dot
from sffx.draw.graph import dot
from sffx.draw.label import DETAILS
from sffx.draw.page import page
from sffx.draw.progress import Progress
from sffx.errors import InputError, MissingExtra, SffxError

TEXT = (".dot", ".gv")
PAGES = (".html",)
PICTURES = (".svg", ".png", ".pdf")

# Dots per inch of a png; svg and pdf have no dots.
RESOLUTION = 144


def draw(
    plan_or_net: Any,
    path: str | os.PathLike[str],
    *,
    unfold: bool = False,
    detail: str = "blocks",
    progress: Progress | None = None,
) -> Path:
    """Draws the block graph into a file.

    Args:
        plan_or_net: a `BlockPlan`, or a cut net, whose `plan` it is.
        path: of the file; its suffix chooses the format: .svg, .png, .pdf; .html, a page that unfolds; .dot and .gv, the graph's text.
        unfold: whether blocks in a row that look alike are drawn one by one, not as one box where there are many blocks.
        detail: what is shown of each block: "blocks" what it holds, in words; "modules" the graph of its modules; "nodes" that of its
            nodes.
        progress: of a training, colours the blocks by accuracy and learning rate.

    Returns:
        the path that was written. The file is replaced as a whole; if anything fails, an older file stays as it was.

    Raises:
        InputError: there is no plan to draw, the suffix or the detail is unknown, or the folder does not exist.
        MissingExtra: neither Graphviz's `dot` nor pygraphviz is there; pages and text need neither.
    """
    plan = plan_in(plan_or_net)
    if plan is None:
        raise InputError(
            f"there is no plan to draw in a {type(plan_or_net).__name__}. Hint: pass sffx.plan(model) or a cut net"
        )
    if detail not in DETAILS:
        raise InputError(f"there is no detail {detail!r}. Hint: choose one of {', '.join(DETAILS)}")
    path = check_path(path, (*PICTURES, *PAGES, *TEXT))
    if path.suffix.lower() in PAGES:
        write(path, page(plan, unfold=unfold, detail=detail, progress=progress).encode())
        return path
    if detail == "blocks":
        return write_graph(path, dot(plan, unfold=unfold, progress=progress))
    return write_graph(path, clusters_dot(plan, detail, unfold=unfold, progress=progress))


def plan_in(plan_or_net: Any) -> BlockPlan | None:
    """The plan itself, or the plan that a cut net carries; None if there is none."""
    plan = getattr(plan_or_net, "plan", plan_or_net)
    return plan if isinstance(plan, BlockPlan) else None


def check_path(path: str | os.PathLike[str], suffixes: tuple[str, ...]) -> Path:
    """The path, if a drawing can be written there.

    Args:
        path: of a file to write.
        suffixes: the known ones, in lower case, with their dots.

    Returns:
        the path.

    Raises:
        InputError: the suffix is another, or the folder does not exist.
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise InputError(
            f"cannot draw to {path.name!r}: the suffix {path.suffix!r} is unknown. Hint: use one of {', '.join(suffixes)}"
        )
    if not path.parent.is_dir():
        raise InputError(
            f"cannot draw to {str(path)!r}: the folder {str(path.parent)!r} does not exist"
        )
    return path


def write_graph(path: Path, text: str) -> Path:
    """Replaces a file by DOT text, or by a picture of it, as its suffix says, and returns its path.

    Raises:
        MissingExtra: there is no Graphviz to draw with.
    """
    kind = path.suffix.lower()
    write(path, text.encode() if kind in TEXT else render(text, kind[1:]))
    return path


def render(text: str, kind: str) -> bytes:
    """A picture of DOT text, by the system's `dot` or, where there is none or it fails, by pygraphviz, which brings its own.

    Args:
        text: a graph in DOT.
        kind: "svg", "png" or "pdf".

    Returns:
        the content of the picture's file.

    Raises:
        MissingExtra: neither is there.
        SffxError: whichever is there failed.
    """
    program = shutil.which("dot")
    try:
        if program is not None:
            return _by_program(program, text, kind)
    except (OSError, subprocess.CalledProcessError) as error:
        return _by_library(text, kind, error)
    return _by_library(text, kind, None)


def write(path: Path, content: bytes) -> None:
    """Replaces a file as a whole: a reader finds the old content or the new one, never a part.

    Args:
        path: of the file, or of a link to it; its folder must be there.
        content: of the new file.
    """
    path = Path(os.path.realpath(path))
    # Beside the file, because a file can be replaced at once only within one file system.
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        fresh.write_bytes(content)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _by_program(program: str, text: str, kind: str) -> bytes:
    command = [program, f"-T{kind}", *([f"-Gdpi={RESOLUTION}"] if kind == "png" else [])]
    picture = subprocess.run(command, input=text.encode(), capture_output=True, check=True).stdout
    if not picture:
        raise OSError(f"{program} wrote nothing")
    return picture


def _by_library(text: str, kind: str, failure: Exception | None) -> bytes:
    try:
        from pygraphviz import AGraph
    except ImportError as error:
        if failure is not None:
            raise SffxError(
                f"Graphviz's dot could not draw a {kind}: {_reason(failure)}. Hint: pip install 'sffx[viz]'"
            ) from failure
        raise MissingExtra(
            "pygraphviz",
            "viz",
            "drawing to svg, png or pdf (paths that end in .html or .dot need nothing)",
        ) from error
    try:
        picture = AGraph(string=text).draw(
            format=kind, prog="dot", args=f"-Gdpi={RESOLUTION}" if kind == "png" else ""
        )
    except Exception as error:
        raise SffxError(
            f"pygraphviz could not draw a {kind}: {error}. Hint: a path that ends in .dot keeps the text"
        ) from error
    if not picture:
        raise SffxError(
            f"pygraphviz drew an empty {kind}. Hint: a path that ends in .dot keeps the text"
        )
    return bytes(picture)


def _reason(failure: Exception) -> str:
    output = getattr(failure, "stderr", None)
    return output.decode(errors="replace").strip() if output else str(failure)
