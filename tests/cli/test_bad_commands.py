"""Wrong arguments of the commands end in a message with a hint and the exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import sffx
from sffx.cli import export, viz

MODEL = """
from torch import nn
net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
"""
INPUT = ("--input", "1,4")
FILES = ("folder", "empty", "foreign.pt", "number.pt", "nothing.pt")

VIZ = [
    *(("model.py", *INPUT, "-o", path) for path in ("folder", "x.jpg", "", "no/x.svg", "n" * 300)),
    *((source, *INPUT) for source in ("nothing.py", "folder", "", ":", ":x", "timm:no", "hf:No")),
    *(("model.py", *INPUT, "--checkpoint", file, "-o", "a.dot") for file in FILES),
    *(
        ("plan", "model.py", *INPUT, "--policy", each)
        for each in ("", "no", "stages(0)", "stages(")
    ),
    *(("plan", "model.py", *INPUT, *each) for each in (("--budget", "x"), ("--batch", "0"))),
    ("plan", "model.py", "--input", "-1"),
    ("plan", "model.py", "--input", "9,9,9"),
    ("compare", "model.py", *INPUT, "layer", "no"),
    ("compare", "model.py", *INPUT, "layer", "layer", "-o", "folder"),
]
EXPORT = [
    *((file, "net.onnx", "--model", "model.py") for file in FILES),
    *(("good.pt", path, "--model", "model.py") for path in ("folder", "x.jpg", "", "no/x.onnx")),
    *(("good.pt", "net.onnx", "--model", source) for source in ("nothing.py", "folder", "")),
    ("good.pt", "net.onnx", "--model", "model.py", "--readout", "no"),
    ("good.pt", "net.onnx", "--model", "model.py", "--class-names", "nothing.txt"),
    ("good.pt", "net.onnx", "--model", "model.py", "--class-names", "folder"),
    ("good.pt", "net.onnx", "--model", "model.py", "--class-names", "empty"),
    *(("whole", file, "net.onnx") for file in FILES),
]


@pytest.fixture
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder with files of many kinds."""
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(MODEL)
    Path("folder").mkdir()
    Path("empty").touch()
    torch.save({"a": 1}, "foreign.pt")
    torch.save(3, "number.pt")
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    sffx.save_checkpoint("good.pt", sffx.transform(net, "layer", torch.zeros(1, 4)))


@pytest.mark.usefixtures("_files")
@pytest.mark.parametrize("command", ["sffx-viz", "sffx-export"])
def test_no_wrong_argument_ends_in_a_bare_error(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = []
    for arguments in VIZ if command == "sffx-viz" else EXPORT:
        main = viz.main if command == "sffx-viz" else export.main
        try:
            code: object = main(arguments)
        except SystemExit as ended:  # argparse has found it
            code = ended.code
        except Exception as error:
            code = error
        message = capsys.readouterr().err
        is_explained = "Hint: " in message or "error: " in message
        if code != 2 or not is_explained:
            faults.append(f"{arguments}: {code!r}, {message!r}")
    assert faults == []
