"""The command on every kind of checkpoint: what it writes gives the scores of the net that was saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn

import sffx
from sffx.export.cli import main
from tests import toys

MODEL = """
from torch import nn
from tests import toys

def small(num_classes=3):
    return toys.Residual(classes=num_classes)

def wide():
    return toys.Residual(16)
"""
WEIGHTS = ["--model", "model.py:small", "--input", "1,3,8,8"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(MODEL)


def made(policy: Any = "residual", **options: Any) -> fx.GraphModule:
    torch.manual_seed(0)
    net = sffx.transform(toys.Residual(classes=5), policy, torch.zeros(1, 3, 8, 8), **options)
    net(torch.randn(16, 3, 8, 8))
    return net.eval()


def assert_says(path: str, net: fx.GraphModule, readout: str = "ensemble") -> None:
    x = torch.randn(3, 3, 8, 8)
    net.readout.mode = readout
    torch.testing.assert_close(scores(path, x), net(x).detach(), rtol=1e-4, atol=1e-5)


def scores(path: str, x: Tensor) -> Tensor:
    if path.endswith(".pt2"):
        loaded: Any = torch.export.load(path).module()
        return loaded(x).detach()
    return torch.from_numpy(onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})[0])


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    before = sorted(Path().iterdir())
    assert main(arguments) == 2
    assert sorted(Path().iterdir()) == before
    message = capsys.readouterr().err
    assert message.startswith("sffx-export: ")
    return message


@pytest.mark.parametrize("target", ["net.onnx", "net.pt2"])
@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, []),
        ({"policy": "layer", "kernel_size": 3}, ["--policy", "layer"]),
        ({"rank": 2}, []),
        ({"norm": "none", "goodness": "cwc"}, ["--norm", "none", "--classes", "5"]),
    ],
    ids=["as it is", "kernels of 3", "low rank", "CwC without norms"],
)
def test_weights_find_their_heads_and_classes(
    options: dict[str, Any], arguments: list[str], target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    net = made(**options)
    torch.save(net.state_dict(), "net.pt")
    assert main(["net.pt", target, *WEIGHTS, *arguments]) == 0
    assert f"wrote {target}, " in capsys.readouterr().out
    assert_says(target, net)


@pytest.mark.parametrize(
    "wrapped", [lambda s: {"model": s, "epoch": 3}, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}]
)
def test_weights_are_found_in_a_checkpoint_of_a_script(wrapped: Any) -> None:
    net = made()
    torch.save(wrapped(net.state_dict()), "net.pt")
    assert main(["net.pt", "net.pt2", *WEIGHTS]) == 0
    assert_says("net.pt2", net)


def test_readout_names_and_normalisation_reach_the_file() -> None:
    net = made()
    torch.save(net.state_dict(), "net.pt")
    Path("names.txt").write_text("a\nb\n c \nd\n\ne e\n")
    options = ["--readout", "classifier", "--class-names", "names.txt", "--mean", "0.5,0.5,0.5", "--std", "1,1,1", "--dynamic-size"]
    assert main(["net.pt", "net.onnx", *WEIGHTS, *options]) == 0
    assert_says("net.onnx", net, "classifier")
    session = onnxruntime.InferenceSession("net.onnx")
    told = json.loads(session.get_modelmeta().custom_metadata_map["sffx"])
    assert told == {"readout": "classifier", "class_names": ["a", "b", "c", "d", "e e"], "mean": [0.5] * 3, "std": [1.0] * 3}
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]


def test_whole_model_is_loaded_only_where_it_is_trusted(capsys: pytest.CaptureFixture[str]) -> None:
    net = made()
    torch.save(net, "whole.pt")
    assert "loading it would run code that lies in it. Hint: --trust" in fails(capsys, "whole.pt", "net.pt2")
    assert main(["whole.pt", "net.pt2", "--trust"]) == 0
    assert_says("net.pt2", net)


def test_whole_model_that_is_not_cut_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(toys.Chain(), "whole.pt")
    assert "Chain, not a cut model. Hint: " in fails(capsys, "whole.pt", "net.pt2", "--trust")


@pytest.mark.filterwarnings("ignore")
def test_checkpoint_of_lightning_tells_how_it_was_cut(tmp_path: Path) -> None:
    from lightning.pytorch import Trainer

    from sffx.lightning import SFFModule

    net = made("stages(2)", norm="none")
    data = [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))] * 2
    trainer = Trainer(max_epochs=1, logger=False, enable_progress_bar=False, accelerator="cpu", enable_checkpointing=False)
    trainer.fit(SFFModule(net, plateau={"factor": 0.3}), data, data)
    trainer.save_checkpoint("last.ckpt")
    assert main(["last.ckpt", "net.pt2", "--model", "model.py:small"]) == 0
    assert_says("net.pt2", net.eval())


def test_what_cannot_be_used_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(made().state_dict(), "net.pt")
    torch.save(toys.Chain().state_dict(), "plain.pt")
    torch.save([1, 2], "list.pt")
    Path("text.pt").write_text("not a checkpoint")
    Path("names.json").write_text('["a", ')
    assert "ends in neither .onnx nor .pt2" in fails(capsys, "net.pt", "net.tflite")
    assert "there is no file 'none.pt'" in fails(capsys, "none.pt", "net.pt2")
    assert "'text.pt'" in fails(capsys, "text.pt", "net.pt2", "--trust")
    assert "holds no weights of a cut model, but 0.weight, " in fails(capsys, "plain.pt", "net.pt2", *WEIGHTS)
    assert "is a list, not weights by name" in fails(capsys, "list.pt", "net.pt2")
    assert "holds weights without their model. Hint: --model" in fails(capsys, "net.pt", "net.pt2")
    assert "is no JSON list" in fails(capsys, "net.pt", "net.pt2", *WEIGHTS, "--class-names", "names.json")
    assert "class names cannot be read" in fails(capsys, "net.pt", "net.pt2", *WEIGHTS, "--class-names", "none")


def test_weights_of_another_model_or_cut_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(made().state_dict(), "net.pt")
    other = ["net.pt", "net.pt2", "--input", "1,3,8,8"]
    assert "the weights do not fit Residual, cut by 'layer': " in fails(capsys, *other, "--model", "model.py:small", "--policy", "layer")
    assert "4 classes" in fails(capsys, *other, "--model", "model.py:wide")
    assert "no 'tall'" in fails(capsys, *other, "--model", "model.py:tall")


def test_help_says_what_trust_means(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "runs code that lies in it" in " ".join(capsys.readouterr().out.split())


def test_timm_model_is_made_with_values_and_the_wanted_width() -> None:
    timm = pytest.importorskip("timm")
    from sffx.draw.discover import find_model

    model = find_model("timm:test_resnet", num_classes=7, filled=True)
    assert isinstance(model, nn.Module)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert model.get_classifier().out_features == 7
    assert "test_resnet" in timm.list_models()
