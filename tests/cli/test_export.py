"""The command on every kind of checkpoint: the net that it exports gives the scores of the net that was saved."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import fx, nn

import sffx
from sffx.cli.export import main
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


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """Keeps the nets that `export_program` is given, instead of exporting them."""
    nets: list[fx.GraphModule] = []

    def keep(net: fx.GraphModule, path: Path, *_: Any, **__: Any) -> None:
        nets.append(net)
        path.write_bytes(b"")

    monkeypatch.setattr("sffx.export.program.export_program", keep)
    return nets


def assert_same(found: fx.GraphModule, net: fx.GraphModule) -> None:
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(found.eval()(x), net.eval()(x))
    assert found.plan == net.plan


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    before = sorted(Path().iterdir())
    assert main(arguments) == 2
    assert sorted(Path().iterdir()) == before
    message = capsys.readouterr().err
    assert message.startswith("sffx-export: ")
    return message


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({"kernel_size": 3, "policy": "stages(2)"}, ["--policy", "stages(2)"]),
        ({"norm": "none", "goodness": "cwc"}, ["--norm", "none"]),
        ({"goodness": "cosine(4)"}, []),
        ({"goodness": "mlp(64)"}, []),
        ({"goodness": "mlp(64, 3)"}, []),
    ],
    ids=[
        "kernels of 3",
        "CwC without norms",
        "cosine of 4 x 4 regions",
        "hidden layer of 64 units",
        "and of 3 x 3 regions",
    ],
)
def test_weights_find_their_heads_and_classes(
    options: dict[str, Any], arguments: list[str], exported: list[fx.GraphModule]
) -> None:
    net = made(**options)
    torch.save(net.state_dict(), "net.pt")
    assert main(["net.pt", "net.pt2", *WEIGHTS, *arguments]) == 0
    assert_same(exported[0], net)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
    ],
)
def test_weights_are_found_in_a_checkpoint_of_a_script(
    wrapped: Any, exported: list[fx.GraphModule]
) -> None:
    net = made()
    torch.save(wrapped(net.state_dict()), "net.pt")
    assert main(["net.pt", "net.pt2", *WEIGHTS]) == 0
    assert_same(exported[0], net)


def test_weights_of_blocks_choose_the_readout_unless_another_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    net = made()
    sffx.weigh(net, [(torch.randn(8, 3, 8, 8), torch.arange(8) % 5)])
    torch.save(net.state_dict(), "net.pt")
    for readout, asked in (("weighted", []), ("last", ["--readout", "last"])):
        assert main(["net.pt", "net.pt2", *WEIGHTS, *asked]) == 0
        assert f"MiB: {readout} scores of Residual" in capsys.readouterr().out


def test_readout_names_and_normalisation_reach_the_onnx_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    net = made()
    torch.save(net.state_dict(), "net.pt")
    Path("names.txt").write_text("a\nb\n c \nd\n\ne e\n")
    options = [
        "--readout",
        "classifier",
        "--class-names",
        "names.txt",
        "--mean",
        "0.5,0.5,0.5",
        "--std",
        "1,1,1",
        "--dynamic-size",
    ]
    assert main(["net.pt", "net.onnx", *WEIGHTS, *options]) == 0
    assert re.match(
        r"wrote net\.onnx, 0\.\d+ MiB: classifier scores of Residual, 3 blocks, 5 classes, from x \(B, 3, 8, 8\)\n$",
        capsys.readouterr().out,
    )
    session = onnxruntime.InferenceSession("net.onnx")
    told = json.loads(session.get_modelmeta().custom_metadata_map["sffx"])
    assert told == {
        "readout": "classifier",
        "class_names": ["a", "b", "c", "d", "e e"],
        "mean": [0.5] * 3,
        "std": [1.0] * 3,
    }
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    x = torch.randn(3, 3, 8, 8)
    net.readout.mode = "classifier"
    scores = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    torch.testing.assert_close(scores, net(x).detach(), rtol=1e-4, atol=1e-5)


def test_whole_model_is_loaded_only_where_it_is_trusted(capsys: pytest.CaptureFixture[str]) -> None:
    net = made()
    torch.save(net, "whole.pt")
    assert "loading it would run code that lies in it. Hint: --trust" in fails(
        capsys, "whole.pt", "net.pt2"
    )
    assert main(["whole.pt", "net.pt2", "--trust"]) == 0
    loaded: Any = torch.export.load("net.pt2").module()
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(loaded(x), net(x).detach(), rtol=1e-4, atol=1e-5)


def test_whole_model_that_is_not_cut_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(toys.Chain(), "whole.pt")
    assert "Chain, not a cut model. Hint: " in fails(capsys, "whole.pt", "net.pt2", "--trust")


@pytest.mark.filterwarnings("ignore")
def test_checkpoint_of_lightning_tells_how_it_was_cut(exported: list[fx.GraphModule]) -> None:
    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader, TensorDataset

    from sffx.lightning import SFFModule

    net = made("stages(2)", norm="none")
    data = DataLoader(TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8) % 5), 4)
    trainer = Trainer(
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        accelerator="cpu",
        enable_checkpointing=False,
    )
    trainer.fit(SFFModule(net.train(), plateau={"factor": 0.3}), data, data)
    trainer.save_checkpoint("last.ckpt")
    assert main(["last.ckpt", "net.pt2", "--model", "model.py:small"]) == 0
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(exported[0].eval()(x), net.eval()(x))
    assert [block.nodes for block in exported[0].plan] == [block.nodes for block in net.plan]


def test_checkpoint_of_a_script_tells_how_it_was_cut(
    exported: list[fx.GraphModule], capsys: pytest.CaptureFixture[str]
) -> None:
    net = made("stages(2)", norm="none", goodness="mlp(64, 3)")
    torch.save({"net": net.state_dict(), "sffx_cut": net.plan.record()}, "run.pt")
    assert main(["run.pt", "net.pt2", "--model", "model.py:small"]) == 0
    assert capsys.readouterr().err == ""
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(exported[0].eval()(x), net.eval()(x))
    assert exported[0].plan.options == net.plan.options


def test_what_is_assumed_of_the_cut_is_said(
    exported: list[fx.GraphModule], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(made().state_dict(), "net.pt")
    assert main(["net.pt", "net.pt2", "--model", "model.py:small"]) == 0
    said = capsys.readouterr()
    assert (
        "assumed: --policy residual --norm layer --input x=1,3,224,224. A training that saves net.plan.record()"
        in said.err
    )
    assert "5 classes, from x (B, 3, 224, 224)" in said.out
    assert main(["net.pt", "net.pt2", *WEIGHTS, "--policy", "residual", "--norm", "layer"]) == 0
    assert capsys.readouterr().err == ""


def test_whole_model_of_a_file_is_found_where_the_command_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("own_layers.py").write_text(
        "from torch import nn\nclass Own(nn.Module):\n    def forward(self, x):\n        return x\n"
    )
    code = "import torch, own_layers; from torch import nn; torch.save(nn.Sequential(own_layers.Own()), 'own.pt')"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "is a Sequential, not a cut model" in fails(
        capsys, "own.pt", "net.pt2", "--trust"
    )  # found, and what it is
    Path("own_layers.py").unlink()
    monkeypatch.delitem(sys.modules, "own_layers")
    assert (
        "No module named 'own_layers'. Hint: run the command where the code of the model lies"
        in fails(capsys, "own.pt", "net.pt2", "--trust")
    )
    torch.save(made(), "whole.pt")
    assert "of which --model, --policy can say nothing. Hint: " in fails(
        capsys, "whole.pt", "net.pt2", "--trust", "--model", "model.py:small", "--policy", "layer"
    )


def test_what_cannot_be_used_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(made().state_dict(), "net.pt")
    torch.save(toys.Chain().state_dict(), "plain.pt")
    torch.save([1, 2], "list.pt")
    Path("text.pt").write_text("not a checkpoint")
    Path("names.json").write_text('["a", ')
    assert "ends in neither .onnx nor .pt2" in fails(capsys, "net.pt", "net.tflite")
    assert "there is no file 'none.pt'" in fails(capsys, "none.pt", "net.pt2")
    Path("empty.pt").write_bytes(b"")
    assert "'empty.pt' is no checkpoint of torch: it is empty, or ends too early" in fails(
        capsys, "empty.pt", "net.pt2"
    )
    assert "'.' is a folder. Hint: name the file in it" in fails(capsys, ".", "net.pt2")
    torch.save({"net": made().state_dict(), "sffx_cut": {"policy": "residual"}}, "odd.pt")
    assert (
        "'sffx_cut' cannot be understood (KeyError: 'inputs'). Hint: save net.plan.record()"
        in fails(capsys, "odd.pt", "net.pt2", *WEIGHTS)
    )
    for trust in ([], ["--trust"]):
        assert "'text.pt' is no checkpoint of torch" in fails(capsys, "text.pt", "net.pt2", *trust)
    assert "holds no weights of a cut model, but 0.weight, " in fails(
        capsys, "plain.pt", "net.pt2", *WEIGHTS
    )
    assert "is a list, not weights by name" in fails(capsys, "list.pt", "net.pt2")
    assert "holds weights without their model. Hint: --model" in fails(capsys, "net.pt", "net.pt2")
    assert "is no JSON list" in fails(
        capsys, "net.pt", "net.pt2", *WEIGHTS, "--class-names", "names.json"
    )
    assert "class names cannot be read" in fails(
        capsys, "net.pt", "net.pt2", *WEIGHTS, "--class-names", "none"
    )


def test_weights_of_another_model_or_cut_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(made().state_dict(), "net.pt")
    other = ["net.pt", "net.pt2", "--input", "1,3,8,8"]
    assert "the weights do not fit Residual, cut by 'stages(2)': " in fails(
        capsys, *other, "--model", "model.py:small", "--policy", "stages(2)"
    )
    assert "size mismatch for block_0.stem.0.weight" in fails(
        capsys, *other, "--model", "model.py:wide"
    )
    assert "no 'tall'" in fails(capsys, *other, "--model", "model.py:tall")


def test_help_says_what_trust_means(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "runs code that lies in it" in " ".join(capsys.readouterr().out.split())


def test_timm_model_is_made_with_values_and_the_wanted_width() -> None:
    timm = pytest.importorskip("timm")
    from sffx.cli.models import find_model

    model = find_model("timm:test_resnet", num_classes=7, filled=True)
    assert isinstance(model, nn.Module)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert model.get_classifier().out_features == 7
    assert "test_resnet" in timm.list_models()
