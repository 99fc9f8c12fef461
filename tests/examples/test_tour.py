"""The notebook runs from its first cell to its last, with the figures of a trained network."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.examples.scripts import EXAMPLES


def text_of(cell: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.get("outputs", []))


@pytest.mark.filterwarnings("ignore")  # of the notebook's own machinery
def test_the_notebook_goes_from_a_model_to_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    )
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    printed = "\n".join(map(text_of, notebook.cells))
    (accuracy,) = re.findall(r"accuracy in ONNX Runtime: ([\d.]+)%", printed)
    assert float(accuracy) > 90
    assert "goodness_0 = self.head_0(block_0)" in printed
    assert {path.name for path in tmp_path.iterdir()} >= {
        "blocks.png",
        "training.png",
        "accuracy.png",
        "digits.onnx",
    }
