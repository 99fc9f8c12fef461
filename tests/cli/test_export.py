"""The command `sffx-export`: it exports the net that was saved, from every kind of checkpoint."""

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
from sffx.cli.exporting import _class_names
from tests import toys

MODEL = """
from torch import nn
from tests import toys

def small(num_classes=3):
    return toys.Residual(classes=num_classes)

def five():
    return toys.Residual(classes=5)

def wide():
    return toys.Residual(16, classes=5)
"""
HEAD = """
from torch import nn

def pooled(block, num_classes):
    layers = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(block.channels, num_classes)]
    return nn.Sequential(*layers)
"""
INPUT = ["--input", "1,3,8,8"]
# What weights alone do not record; what comes after these wins.
CUT = ["--policy", "residual", "--goodness", "sff", "--norm", "layer", *INPUT]
WEIGHTS = ["--model", "model.py:five", *CUT]


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

    monkeypatch.setattr("sffx.cli.exporting.export_program", keep)
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
        (
            {"kernel_size": 3, "policy": "stages(2)"},
            ["--policy", "stages(2)", "--goodness", "sff", "--kernel-size", "3"],
        ),
        ({"norm": "none", "goodness": "cwc"}, ["--norm", "none", "--goodness", "cwc"]),
        ({"goodness": "cosine(4)"}, ["--goodness", "cosine(4)"]),
        ({"goodness": "mlp(64, 3)"}, ["--goodness", "mlp(64, 3)", "--classes", "5"]),
    ],
    ids=["kernels of 3", "CwC without norms", "cosine of 4 x 4 regions", "hidden layer"],
)
def test_weights_alone_are_cut_as_the_options_say(
    options: dict[str, Any], arguments: list[str], exported: list[fx.GraphModule]
) -> None:
    net = made(**options)
    torch.save(net.state_dict(), "net.pt")
    assert main(["net.pt", "net.pt2", *WEIGHTS, *arguments]) == 0
    assert_same(exported[0], net)


def test_options_that_weights_alone_need_are_named(
    exported: list[fx.GraphModule], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(made().state_dict(), "net.pt")
    model = ["--model", "model.py:small"]
    assert (
        "'net.pt' does not record all of how its model was cut. "
        "Hint: --policy (residual, batchnorm, layer, module or stages(N)), --input 1,3,224,224, "
        "--goodness (sff, cwc, cosine, mlp or shared), --norm (layer or none) as in the training"
    ) in fails(capsys, "net.pt", "net.pt2", *model)
    assert "Hint: --norm (layer or none) as in" in fails(
        capsys, "net.pt", "net.pt2", *model, "--policy", "residual", "--goodness", "sff", *INPUT
    )
    assert main(["net.pt", "net.pt2", *WEIGHTS]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
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
    # With the mark that editors of Windows put before a text.
    Path("names.txt").write_text("a\nb\n c \nd\n\ne e\n", encoding="utf-8-sig")
    options = ["--readout", "classifier", "--class-names", "names.txt", "--dynamic-size"]
    options += ["--mean", "0.5,0.5,0.5", "--std", "1,1,1"]
    assert main(["net.pt", "net.onnx", *WEIGHTS, *options]) == 0
    assert re.match(
        r"wrote net\.onnx, 0\.\d+ MiB: classifier scores of Residual, 3 blocks, 5 classes, "
        r"from x \(B, 3, 8, 8\)\n$",
        capsys.readouterr().out,
    )
    session = onnxruntime.InferenceSession("net.onnx")
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["sffx"])
    assert metadata == {
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


def test_whole_model_is_loaded_by_its_own_command(capsys: pytest.CaptureFixture[str]) -> None:
    net = made()
    torch.save(net, "whole.pt")
    assert "loading it would run code that lies in it. Hint: " in fails(
        capsys, "whole.pt", "net.pt2", *WEIGHTS
    )
    assert (
        "holds a whole model, which is cut already. Hint: sffx-export whole whole.pt net.pt2"
    ) in fails(capsys, "whole.pt", "net.pt2", *WEIGHTS, "--trust")
    assert main(["whole", "whole.pt", "net.pt2"]) == 0
    loaded: Any = torch.export.load("net.pt2").module()
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(loaded(x), net(x).detach(), rtol=1e-4, atol=1e-5)


def test_whole_model_that_is_not_cut_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(toys.Chain(), "whole.pt")
    assert "'whole.pt' holds a Chain, which is not cut. Hint: " in fails(
        capsys, "whole", "whole.pt", "net.pt2"
    )


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cat\n\n dog \n", ["cat", "dog"]),
        ('["cat", "dog"]', ["cat", "dog"]),
        ('[\n  "cat",\n  "dog"\n]\n', ["cat", "dog"]),
        ("[PAD]\ncat\n[MASK]\n", ["[PAD]", "cat", "[MASK]"]),
        ("", []),
    ],
)
def test_class_names_are_lines_or_a_list(text: str, names: list[str]) -> None:
    Path("names.txt").write_text(text)
    assert _class_names(Path("names.txt")) == names


def test_a_folder_that_is_missing_is_told_before_the_work(
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = fails(capsys, "nothing.pt", "nowhere/net.pt2", *WEIGHTS)
    assert "the folder 'nowhere' does not exist. Hint: create it first" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["net.pt", "net.pt2"], "the following arguments are required: --model"),
        (["whole", "net.pt", "net.pt2", "--policy", "layer"], "unrecognized arguments: --policy"),
        (["net.pt", "net.pt2", "--classes", "0"], "'0' is no positive integer"),
        (["net.pt", "net.pt2", "--mean", "a,b"], "'a,b' is not a list of numbers such as"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


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
    assert_same(exported[0], net)


def test_checkpoint_tells_how_it_was_cut(
    exported: list[fx.GraphModule], capsys: pytest.CaptureFixture[str]
) -> None:
    net = made("stages(2)", norm="none", goodness="mlp(64, 3)")
    sffx.save_checkpoint("run.pt", net)
    assert main(["run.pt", "net.pt2", "--model", "model.py:small"]) == 0
    assert capsys.readouterr().err == ""
    assert_same(exported[0], net)


def test_an_option_that_differs_from_the_checkpoint_wins_and_is_told(
    exported: list[fx.GraphModule], capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights fit another norm and another policy as well, but the answers are others."""
    sffx.save_checkpoint("run.pt", made("stages(2)"))
    same = [
        "--norm",
        "layer",
        "--goodness",
        "sff",
        "--kernel-size",
        "1",
        "--task",
        "classification",
    ]
    assert main(["run.pt", "net.pt2", "--model", "model.py:small", *same]) == 0
    assert capsys.readouterr().err == ""
    assert main(["run.pt", "net.pt2", "--model", "model.py:small", "--norm", "none"]) == 0
    message = "'run.pt' records --norm layer, but none is given, and used"
    assert message in capsys.readouterr().err
    assert exported[1].plan.options.norm == "none"


def test_weights_alone_need_the_task_that_their_heads_have(
    exported: list[fx.GraphModule], capsys: pytest.CaptureFixture[str]
) -> None:
    net = made(task=sffx.tasks.MultiLabel())
    torch.save(net.state_dict(), "net.pt")
    assert "do not fit Residual" in fails(capsys, "net.pt", "net.pt2", *WEIGHTS)
    assert main(["net.pt", "net.pt2", *WEIGHTS, "--task", "multilabel"]) == 0
    assert_same(exported[0], net)


def test_goodness_of_one_s_own_is_named_by_its_file(
    exported: list[fx.GraphModule],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(Path.cwd())
    Path("own_heads.py").write_text(HEAD)
    from own_heads import pooled

    net = made(goodness=pooled)
    sffx.save_checkpoint("run.pt", net)
    command = ["run.pt", "net.pt2", "--model", "model.py:small"]
    assert "Hint: --goodness file.py:NAME (own_heads.pooled) as in the training" in fails(
        capsys, *command
    )
    assert main([*command, "--goodness", "own_heads.py:pooled"]) == 0
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(exported[0].eval()(x), net.eval()(x))


def test_trusted_checkpoint_may_hold_python_objects(
    exported: list[fx.GraphModule], capsys: pytest.CaptureFixture[str]
) -> None:
    net = made()
    torch.save({"net": net.state_dict(), "sffx_cut": net.plan.record(), "at": Path()}, "run.pt")
    command = ["run.pt", "net.pt2", "--model", "model.py:small"]
    assert "holds Python objects, not weights alone" in fails(capsys, *command)
    assert main([*command, "--trust"]) == 0
    assert_same(exported[0], net)


def test_whole_model_of_a_file_is_found_where_the_command_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("own_layers.py").write_text(
        "from torch import nn\nclass Own(nn.Module):\n    def forward(self, x):\n        return x\n"
    )
    code = (
        "import torch, own_layers; from torch import nn; "
        "torch.save(nn.Sequential(own_layers.Own()), 'own.pt')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    command = ["whole", "own.pt", "net.pt2"]
    # The class is found, and the error says what the model is.
    assert "holds a Sequential, which is not cut" in fails(capsys, *command)
    Path("own_layers.py").unlink()
    monkeypatch.delitem(sys.modules, "own_layers")
    assert (
        "No module named 'own_layers'. Hint: run the command where the code of the model lies"
        in fails(capsys, *command)
    )


def test_what_cannot_be_used_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(made().state_dict(), "net.pt")
    torch.save(toys.Chain().state_dict(), "plain.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"net": made().state_dict(), "sffx_cut": {"policy": "residual"}}, "odd.pt")
    Path("text.pt").write_text("not a checkpoint")
    Path("empty.pt").write_bytes(b"")
    Path("names.json").write_text('["a", ')
    for arguments, message in [
        (["net.pt", "net.tflite"], "ends in neither .onnx nor .pt2"),
        (["none.pt", "net.pt2"], "there is no file 'none.pt'"),
        (["empty.pt", "net.pt2"], "'empty.pt' is no checkpoint of torch: it is empty, or ends"),
        ([".", "net.pt2"], "'.' is a folder. Hint: name the file in it"),
        (["odd.pt", "net.pt2"], "the entry 'sffx_cut' lacks 'after'"),
        (["text.pt", "net.pt2"], "'text.pt' is no checkpoint of torch"),
        (["text.pt", "net.pt2", "--trust"], "'text.pt' is no checkpoint of torch"),
        (["plain.pt", "net.pt2"], "holds no weights of a cut model, but 0.weight, "),
        (["list.pt", "net.pt2"], "holds a list, not weights by name"),
        (["net.pt", "net.pt2", "--class-names", "names.json"], "is no JSON list"),
        (["net.pt", "net.pt2", "--class-names", "none"], "class names cannot be read"),
    ]:
        assert message in fails(capsys, *arguments, *WEIGHTS)


def test_weights_of_another_model_or_cut_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(made().state_dict(), "net.pt")
    weights = ["net.pt", "net.pt2", *WEIGHTS]
    assert "the weights of 'net.pt' do not fit Residual, cut by 'stages(2)': " in fails(
        capsys, *weights, "--policy", "stages(2)"
    )
    assert "size mismatch for block_0.stem.0.weight" in fails(
        capsys, *weights, "--model", "model.py:wide"
    )
    assert "no 'tall'" in fails(capsys, *weights, "--model", "model.py:tall")


def test_help_says_what_trust_means(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "loading it runs code that lies in the file" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["weights", "--help"])
    assert "runs code that lies in it" in " ".join(capsys.readouterr().out.split())


def test_timm_model_is_made_with_values_and_the_wanted_width() -> None:
    timm = pytest.importorskip("timm")
    from sffx.cli.models import find_model

    model = find_model("timm:test_resnet", num_classes=7, filled=True)
    assert isinstance(model, nn.Module)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert model.get_classifier().out_features == 7
    assert "test_resnet" in timm.list_models()
