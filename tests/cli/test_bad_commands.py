"""Wrong arguments of the commands end in a message with a hint and the exit code 2."""

from __future__ import annotations

import os
import re
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
# The task of these is not clear from their output.
PIXELS = """
from torch import nn
net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 1, 1))
"""
WORDS = """
from torch import nn
net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 9))
"""
TWO_INPUTS = """
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 5)
    def forward(self, left, right):
        return self.two(self.one(left + right).relu())
"""
INPUT = ("--input", "1,4")
FILES = ("folder", "empty", "foreign.pt", "number.pt", "nothing.pt", "pipe", "plain.pt")

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
    ("plan", "model.py", "--input", "y=1,4"),
    ("plan", "model.py", "--input", f"1,{10**20}"),
    ("plan", "model.py", "--input", f"{2**31},{2**31}"),
    ("plan", "model.py", "--input", f"1,{2**50}"),
    ("plan", "model.py", *INPUT, *INPUT),
    ("plan", "model.py", *INPUT, "--classes", "7"),
    ("plan", "model.py", *INPUT, "--kernel-size", "2"),
    ("plan", "model.py", *INPUT, "--goodness", "mlp", "--kernel-size", "3"),
    ("plan", "model.py", *INPUT, "--batch", str(2**62)),
    ("plan", "model.py", *INPUT, "--budget", "9000000 TiB"),
    *(("plan", "model.py", *INPUT, "--goodness", each) for each in ("", "no", "model.py:net")),
    ("plan", "model.py", *INPUT, "--objective", "no"),
    ("plan", "model.py", *INPUT, "--objective", "ff", "--goodness", "mlp"),
    *(("plan", "model.py", *INPUT, "--norm", each) for each in ("", "no", "model.py:net")),
    *(
        ("plan", "model.py", *INPUT, "--task", each)
        for each in ("", "no", "tokens(x)", "regression(3)", "segmentation", "language", "tokens")
    ),
    ("plan", "pixels.py", "--input", "1,3,4,4"),
    ("plan", "pixels.py", "--input", "1,3,4,4", "--task", "classification"),
    ("plan", "words.py", "--input", "1,5:int"),
    ("plan", "two_inputs.py"),
    *(("plan", "cut.py", *each) for each in (INPUT, ("--policy", "layer"), ("--norm", "none"))),
    ("cut.py", "--goodness", "mlp", "-o", "a.dot"),
    ("torch.nn:No(" + "1, " * 200 + ")",),
    ("model.py:no(" + "1, " * 200 + ")",),
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
    *(("whole", file, "net.onnx") for file in (*FILES, "good.pt", "weights.pt")),
    ("weights.pt", "net.onnx", "--model", "model.py"),
    ("good.pt", "net.onnx", "--model", "model.py", "--mean=0,0"),
    ("good.pt", "net.onnx", "--model", "model.py", "--mean=0", "--std=0"),
    ("good.pt", "net.onnx", "--model", "model.py", "--dynamic-size"),
    ("good.pt", "net.onnx", "--model", "model.py", "--task", "no"),
    ("good.pt", "net.onnx", "--model", "model.py", "--readout", "weighted"),
]


@pytest.fixture
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder with files of many kinds."""
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(MODEL)
    Path("pixels.py").write_text(PIXELS)
    Path("words.py").write_text(WORDS)
    Path("two_inputs.py").write_text(TWO_INPUTS)
    os.mkfifo("pipe")
    Path("folder").mkdir()
    Path("empty").touch()
    torch.save({"a": 1}, "foreign.pt")
    torch.save(3, "number.pt")
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    torch.save(net, "plain.pt")
    cut = sffx.transform(net, "layer", torch.zeros(1, 4))
    sffx.save_checkpoint("good.pt", cut)
    torch.save(cut.state_dict(), "weights.pt")
    Path("cut.py").write_text("import torch\nnet = torch.load('cut.pt', weights_only=False)")
    torch.save(cut, "cut.pt")


def in_python(message: str) -> bool:
    """Return whether a message names an argument of Python that is an option of the command."""
    arguments = "example_input|num_classes|kernel_size|class_names|dynamic_size|sffx.tasks"
    keywords = "policy|goodness|norm|task|readout|objective"
    return bool(re.search(rf"{arguments}|\b({keywords})=", message))


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
        if code != 2 or not is_explained or in_python(message):
            faults.append(f"{arguments}: {code!r}, {message!r}")
    assert not faults, "\n".join(faults)
