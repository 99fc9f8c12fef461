"""The command `sffx-viz --checkpoint`: a model in the colours of its accuracies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import sffx
from sffx.blocks import BlockPlan
from sffx.cli.drawing import progress_of
from sffx.cli.viz import main
from sffx.draw.graph import block_graph
from sffx.draw.progress import Progress
from tests.toys import Residual

ACCURACY = {"block_0": 0.5, "block_1": 0.75, "classifier": 0.9, "ensemble": 0.8, "last": 0.75}
GROUPS = [
    {"name": "block_0", "lr": 1e-4, "params": [0]},
    {"name": "block_1", "lr": 1e-2, "params": [1]},
    {"name": "other", "lr": 1.0, "params": [2]},
]
MODEL = """
from tests.toys import Residual

def small(num_classes=4) -> Residual:
    return Residual(classes=num_classes)
"""
DRAW = ["model.py", "--checkpoint", "run.pt", "-o", "net.dot"]
# What a file without a record of the cut does not record.
CUT = ["--policy", "stages(2)", "--goodness", "sff", "--norm", "layer", "--input", "1,3,8,8"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(MODEL)


def checkpoint(**content: Any) -> sffx.Checkpoint:
    torch.save(content, "run.pt")
    return sffx.load_checkpoint("run.pt")


def cut_net(**options: Any) -> fx.GraphModule:
    return sffx.transform(Residual(classes=5), "stages(2)", torch.zeros(1, 3, 8, 8), **options)


def accuracy_of(net: fx.GraphModule) -> dict[str, float]:
    return dict(sffx.evaluate(net, [(torch.randn(8, 3, 8, 8), torch.arange(8) % 5)]).accuracy)


def test_accuracies_and_learning_rates_of_the_blocks_are_shown(small: BlockPlan) -> None:
    optimizer = {"state": {}, "param_groups": GROUPS}
    progress = progress_of(checkpoint(sffx_accuracy=ACCURACY, optimizer=optimizer), small)
    assert progress == Progress(ACCURACY, {"block_0": 1e-4, "block_1": 1e-2})
    assert progress_of(checkpoint(sffx_accuracy=ACCURACY), small).rates == {}


@pytest.mark.parametrize(
    ("accuracy", "message"),
    [
        ({}, "holds no accuracies of blocks. Hint: sffx.save_checkpoint"),
        (
            {"block_0": 0.5, "classifier": 0.5},
            "of other blocks than the 2 of the policy residual: it lacks block_1. Hint: --policy",
        ),
        ({**ACCURACY, "block_2": 0.5}, "it has block_2 as well"),
    ],
)
def test_accuracies_of_other_blocks_are_refused(
    small: BlockPlan, accuracy: dict[str, float], message: str
) -> None:
    with pytest.raises(sffx.InputError, match=re.escape(message)):
        progress_of(checkpoint(sffx_accuracy=accuracy), small)


def test_accuracies_of_other_cuts_are_refused(small: BlockPlan) -> None:
    cut = {**cut_net().plan.record(), "after": ["relu", "add"]}
    with pytest.raises(sffx.InputError, match=r"they end after relu, add, not \w+, \w+\. Hint: --"):
        progress_of(checkpoint(sffx_accuracy=ACCURACY, sffx_cut=cut), small)


def test_the_model_is_drawn_as_it_was_cut(capsys: pytest.CaptureFixture[str]) -> None:
    net = cut_net(goodness="mlp(64, 3)", norm="none")
    accuracy = accuracy_of(net)
    sffx.save_checkpoint("run.pt", net, accuracy=accuracy)
    assert main(DRAW) == 0
    assert Path("net.dot").read_text() == block_graph(net.plan, progress=Progress(accuracy)).source
    assert main([*DRAW, "--policy", "layer"]) == 2
    assert "of other blocks than the 3 of the policy layer" in capsys.readouterr().err


def test_a_file_without_a_record_needs_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    net = cut_net()
    accuracy = accuracy_of(net)
    optimizer = torch.optim.AdamW(sffx.parameter_groups(net, lr=1e-3, classifier_lr=1e-4))
    torch.save({"sffx_accuracy": accuracy, "optimizer": optimizer.state_dict()}, "run.pt")
    assert main([*DRAW, "--classes", "5", *CUT]) == 0
    text = Path("net.dot").read_text()
    for name in ("block_0", "classifier"):
        assert f"accuracy {100 * accuracy[name]:.1f} %" in text
    assert text.count("learning rate 1.0e-03") == len(net.plan)
    assert main(DRAW) == 2
    assert (
        "'run.pt' does not record all of how its model was cut. "
        "Hint: --policy (residual, batchnorm, layer, module or stages(N)), --input 1,3,224,224"
    ) in capsys.readouterr().err
