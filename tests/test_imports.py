"""The direction of imports, and a public face that needs no optional package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sffx

PACKAGE = Path(sffx.__file__).parent

# The floors of the house, from the ground up. A part may import parts of lower floors only.
FLOORS = (
    (
        "errors",
        "checks",
        "files",
        "tables",
        "tensors",
        "fsdp",
        "kernels",
        "picklable",
        "pickled_graph",
        "progress",
    ),
    ("tasks",),
    ("objective",),
    ("parts", "nested", "plan_table", "arguments", "blocks"),
    ("learning",),
    ("net",),
    ("inputs", "plain"),
    ("runtime",),
    ("compiler", "draw"),
    ("extraction",),
    ("memory", "export"),
    ("comparison",),
    ("policies", "objectives"),
    ("api",),
    ("checkpoint",),
    ("plots", "cli", "lightning", "resuming"),
)
FLOOR_OF = {part: height for height, floor in enumerate(FLOORS) for part in floor}
# Neighbours on one floor that may be imported.
NEIGHBOURS = {
    ("checks", "errors"),
    ("files", "errors"),
    ("tables", "errors"),
    ("fsdp", "tensors"),
    ("tensors", "errors"),
    ("kernels", "errors"),
    ("picklable", "errors"),
    ("pickled_graph", "picklable"),
    ("blocks", "parts"),
    ("arguments", "nested"),
    ("blocks", "arguments"),
    ("blocks", "plan_table"),
}


def imported(path: Path) -> set[str]:
    """Return the parts of sffx that a file imports at its top, functions left aside."""
    modules = [
        node.module or ""
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ImportFrom)
    ]
    return {module.split(".")[1] for module in modules if module.startswith("sffx.")}


@pytest.mark.parametrize("part", FLOOR_OF)
def test_imports_run_one_way_only(part):
    files = (
        [PACKAGE / f"{part}.py"]
        if (PACKAGE / f"{part}.py").exists()
        else list((PACKAGE / part).rglob("*.py"))
    )
    for path in files:
        for other in imported(path) - {part}:
            is_below = FLOOR_OF[other] < FLOOR_OF[part] or (part, other) in NEIGHBOURS
            assert is_below, f"{path} imports {other}"


def test_goodness_and_losses_know_nothing_of_fx():
    for path in (PACKAGE / "learning").glob("*.py"):
        text = path.read_text()
        assert "import fx" not in text, path
        assert "torch.fx import" not in text, path


def test_every_part_is_listed():
    parts = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"} - {
        "__init__",
        "__pycache__",
    }
    assert parts == set(FLOOR_OF)


def test_the_public_face_is_complete_and_needs_no_optional_package():
    optional = (
        "onnx",
        "onnxruntime",
        "onnxscript",
        "lightning",
        "matplotlib",
        "pygraphviz",
        "torchvision",
        "timm",
    )
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in optional)
    complete = "assert all(hasattr(sffx, name) for name in sffx.__all__)"
    code = f"import sys; {blocked}; import sffx; {complete}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_type_checkers_see_the_names_that_are_imported_when_used():
    source = ast.parse((PACKAGE / "__init__.py").read_text())
    seen = {}
    for node in ast.walk(source):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("sffx."):
            seen.update({alias.name: node.module for alias in node.names})
    assert seen == {name: sffx._MODULE_OF[name] for name in seen}
    assert set(sffx._MODULE_OF) == set(sffx.__all__) == {*seen, "objectives", "policies", "tasks"}
