"""The oracle is torch: the scores of a small cut model, computed block by block by hand."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import sys
import tempfile
import threading
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn

import sffx
import sffx.export.onnx as onnx_export
from sffx.blocks import Block, BlockPlan, Input, Options
from sffx.errors import ExportError, InputError, MissingExtra
from sffx.export.onnx import export_onnx
from sffx.export.parity import relative_error
from sffx.learning.heads import make_head
from sffx.learning.readouts import Readout
from tests import toys

READOUTS = ("ensemble", "last", "classifier")  # weighted and cumulative have tests of their own
IMAGE = Input("image", (3, 8, 8), "float32")


class Outside(fx.Tracer):
    """Looks into nothing, as the outer graph of a cut model does."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class Head(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 5, 1)

    def forward(self, y: Tensor) -> Tensor:
        return self.conv(y).square().mean((2, 3))


class Norm(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return nn.functional.layer_norm(y, y.shape[1:])


class Chain(nn.Module):
    """Two blocks with BN and dropout, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.block_0 = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)
        )
        self.block_1 = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.head_0, self.head_1 = Head(8), Head(12)
        self.norm_0, self.norm_1 = Norm(), Norm()
        self.classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 5)
        )
        self.readout = Readout()

    def forward(self, image: Tensor) -> Tensor:
        block_0 = self.block_0(image)
        block_1 = self.block_1(self.norm_0(block_0.detach()))
        logits = self.classifier(self.norm_1(block_1.detach()))
        return self.readout([self.head_0(block_0), self.head_1(block_1), logits])


class Single(nn.Module):
    """One block without parameters, made from a function, and a classifier that is it again."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block_0 = block
        self.readout = Readout()

    def forward(self, image: Tensor) -> Tensor:
        block_0 = self.block_0(image)
        return self.readout([block_0, block_0])


class Pair(nn.Module):
    """Reads token numbers in its block, and a float only in its classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.block_0 = nn.Embedding(7, 5)
        self.readout = Readout()

    def forward(self, ids: Tensor, weight: Tensor) -> Tensor:
        goodness = self.block_0(ids).square().mean(1)
        return self.readout([goodness, goodness * weight])


def cut(root: nn.Module, *inputs: Input) -> fx.GraphModule:
    """Stand in for `sffx.transform`. Only the inputs of the plan matter."""
    net = fx.GraphModule(root, Outside().trace(root))
    classifier = Block("fc", "classifier", (), "fc", (5,), 1, (), (), (), (), (), 0, 0, 0)
    plan = BlockPlan(type(root).__name__, "layer", (), classifier, 5, inputs, (), ())
    net.plan = plan  # type: ignore[assignment]
    return net


def chain() -> fx.GraphModule:
    """A cut model in train mode whose BN statistics are not the initial ones."""
    torch.manual_seed(0)
    net = cut(Chain(), IMAGE)
    for _ in range(5):
        net(torch.randn(16, *IMAGE.shape) * 2 + 1)
    return net


def scores_by_hand(net: fx.GraphModule, image: Tensor) -> dict[str, Tensor]:
    net = copy.deepcopy(net).eval()
    with torch.no_grad():
        block_0 = net.block_0(image)
        block_1 = net.block_1(net.norm_0(block_0))
        goodness = [net.head_0(block_0), net.head_1(block_1)]
        logits = net.classifier(net.norm_1(block_1))
    return {"ensemble": (goodness[0] + goodness[1]) / 2, "last": goodness[1], "classifier": logits}


def run(path: Path, **feed: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(
        session.run(None, {name: value.numpy() for name, value in feed.items()})[0]
    )


def weight_bytes(module: nn.Module) -> list[bytes]:
    return [
        parameter.detach().numpy().tobytes()
        for parameter in module.parameters()
        if parameter.ndim > 1
    ]


@pytest.fixture(scope="module")
def net() -> fx.GraphModule:
    return chain()


@pytest.fixture(scope="module")
def linear() -> fx.GraphModule:
    """The cut model that is exported the fastest, for tests of what is around the graph."""
    return cut(Single(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))), IMAGE)


@pytest.fixture(scope="module")
def files(net: fx.GraphModule, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("onnx")
    return {readout: export_onnx(net, folder / f"{readout}.onnx", readout) for readout in READOUTS}


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"the file of yesterday")
    return path


@pytest.fixture
def converted(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the exporter: what follows it gets the ensemble's program of an earlier export."""
    monkeypatch.setattr(
        onnx_export, "_export", lambda *_, **__: Program(onnx.load(files["ensemble"]))
    )


class Program:
    """What `_save` asks of torch's ONNXProgram."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        from onnxscript import ir

        self.model_proto = proto
        self.model = ir.serde.deserialize_model(proto)


def assert_untouched(old_file: Path) -> None:
    assert old_file.read_bytes() == b"the file of yesterday"
    assert os.listdir(old_file.parent) == [old_file.name]


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_scores_are_those_of_torch(
    net: fx.GraphModule, files: dict[str, Path], readout: str, batch: int
) -> None:
    image = torch.randn(batch, *IMAGE.shape, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(
        run(files[readout], image=image), scores_by_hand(net, image)[readout], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("readout", "kept", "left_out"),
    [
        ("ensemble", ["head_0", "head_1"], ["classifier"]),
        ("last", ["head_1"], ["head_0", "classifier"]),
        ("classifier", ["classifier"], ["head_0", "head_1"]),
    ],
)
def test_file_holds_only_what_the_readout_needs(
    net: fx.GraphModule, files: dict[str, Path], readout: str, kept: list[str], left_out: list[str]
) -> None:
    content = files[readout].read_bytes()
    assert all(
        weight in content for name in kept for weight in weight_bytes(net.get_submodule(name))
    )
    assert not any(
        weight in content for name in left_out for weight in weight_bytes(net.get_submodule(name))
    )
    operators = {node.op_type for node in onnx.load(files[readout]).graph.node}
    assert not operators & {"Dropout", "BatchNormalization", "Gradient"}


@pytest.mark.parametrize("readout", READOUTS)
def test_inputs_and_output_are_named_and_the_batch_axis_is_dynamic(
    files: dict[str, Path], readout: str
) -> None:
    session = onnxruntime.InferenceSession(files[readout], providers=["CPUExecutionProvider"])
    assert [(value.name, value.shape, value.type) for value in session.get_inputs()] == [
        ("image", ["batch", 3, 8, 8], "tensor(float)")
    ]
    assert [(value.name, value.shape) for value in session.get_outputs()] == [
        ("scores", ["batch", 5])
    ]


def test_file_tells_names_and_normalisation(
    linear: fx.GraphModule, files: dict[str, Path], tmp_path: Path
) -> None:
    names = ["cat", "dog", "Kühe", "horse", "sheep"]
    path = export_onnx(
        linear,
        tmp_path / "n.onnx",
        "last",
        class_names=names,
        mean=(0.5, 0.4, 0.3),
        std=(1, 2, 3),
        output_name="goodness",
    )
    session = onnxruntime.InferenceSession(path)
    told = json.loads(session.get_modelmeta().custom_metadata_map["sffx"])
    assert told == {
        "readout": "last",
        "class_names": names,
        "mean": [0.5, 0.4, 0.3],
        "std": [1.0, 2.0, 3.0],
    }
    assert [(value.name, value.shape) for value in session.get_outputs()] == [
        ("goodness", ["batch", 5])
    ]
    plain = (
        onnxruntime.InferenceSession(files["classifier"])
        .get_modelmeta()
        .custom_metadata_map["sffx"]
    )
    assert json.loads(plain) == {
        "readout": "classifier",
        "class_names": None,
        "mean": None,
        "std": None,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"class_names": ["a", "b"]},
            r"there are 2 class names, but the model has 5 classes\. Hint: ",
        ),
        ({"class_names": ["a", "b", "c", "d", "a"]}, r"the class name 'a' is given twice"),
        ({"class_names": "abcde"}, r"class_names is 'abcde'\. Hint: pass a list"),
        ({"mean": [0.5] * 3}, r"mean is \[0\.5, 0\.5, 0\.5\] and std is None\. Hint: pass both"),
        (
            {"mean": [0.5] * 3, "std": [1, 0, 1]},
            r"std is \[1, 0, 1\]\. Hint: numbers, those of std above 0",
        ),
        ({"mean": [0.5], "std": [0.5]}, r"have 1 numbers, but the input has 3 channels"),
        ({"output_name": "image"}, r"output_name 'image' is the name of an input"),
        ({"output_name": ""}, r"output_name is ''"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    net: fx.GraphModule, old_file: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        export_onnx(net, old_file, **options)
    assert_untouched(old_file)


class Foldable(nn.Module):
    """BN behind every kind of layer of an image model, and once before one.

    Only that last one cannot be folded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.Hardswish()
        )
        self.strided = nn.Sequential(
            nn.Conv2d(8, 8, 3, stride=2, dilation=2),
            nn.BatchNorm2d(8, eps=1e-3, affine=False),
            nn.ReLU(),
        )
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 4, 2, groups=2), nn.BatchNorm2d(4), nn.ReLU())
        self.before = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.flat = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.strided(self.depthwise(self.plain(x))))
        return self.flat(self.before(x).mean((2, 3)))


def test_bn_is_folded_into_the_layer_before_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = sffx.transform(Foldable(), "layer", torch.zeros(1, 3, 12, 12), norm="none")
    for _ in range(3):
        net(torch.randn(8, 3, 12, 12) * 2 + 1)
    path = export_onnx(net, tmp_path / "net.onnx", "classifier")
    graph = onnx.load(path).graph
    producers = {name: node.op_type for node in graph.node for name in node.output}
    assert [
        producers[node.input[0]] for node in graph.node if node.op_type == "BatchNormalization"
    ] == ["Relu"]
    x = torch.randn(4, 3, 12, 12)
    net.eval().readout.mode = "classifier"
    torch.testing.assert_close(run(path, x=x), net(x).detach(), rtol=1e-4, atol=1e-5)


HEADS = ("sff", "cwc", "cosine", "cosine(3)", "mlp")


def head_by_block(block: Block, num_classes: int) -> nn.Module:
    """Give each block another kind of head, so that one export tries them all."""
    return make_head(Options(goodness=HEADS[int(block.target[-1])]), block, num_classes)


def test_height_and_width_stay_open_with_every_kind_of_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (3, 8, 8, 8, 8):
        layers += [nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    example = torch.zeros(1, 3, 8, 8)
    net = sffx.transform(nn.Sequential(*layers), "layer", example, goodness=head_by_block)
    path = export_onnx(net, tmp_path / "net.onnx", "cumulative", dynamic_size=True)
    session = onnxruntime.InferenceSession(path)
    (image,) = session.get_inputs()
    assert image.shape == ["batch", 3, "height", "width"]
    for size in ((8, 8), (11, 30)):
        x = torch.randn(3, 3, *size)
        expected = sffx.EarlyExit(net).cumulative(x)
        assert len(expected) == len(HEADS)
        for found, wanted in zip(session.run(None, {image.name: x.numpy()}), expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-5)


def test_model_that_fixes_the_size_is_refused_with_its_size(old_file: Path) -> None:
    net = sffx.transform(toys.Chain(), "layer", torch.zeros(1, 3, 8, 8))
    message = (
        r"does not allow other heights and widths than 8 x 8: torch fails at 40 x 72: "
        r".*Hint: leave dynamic_size out, and resize"
    )
    with pytest.raises(ExportError, match=message):
        export_onnx(net, old_file, "classifier", dynamic_size=True)
    assert_untouched(old_file)


def test_open_size_without_an_image_is_refused(old_file: Path) -> None:
    net = cut(Pair(), Input("ids", (4,), "int64", 7), Input("weight", (5,), "float32"))
    with pytest.raises(
        InputError,
        match=r"of one image input open, but the model has 0 \(ids \(4,\), weight \(5,\)\)",
    ):
        export_onnx(net, old_file, dynamic_size=True)
    assert_untouched(old_file)


def test_norm_over_many_values_keeps_its_digits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    net = sffx.transform(model, "layer", torch.zeros(1, 3, 160, 160)).eval()
    x = torch.randn(1, 3, 160, 160)
    path = export_onnx(net, tmp_path / "net.onnx", "classifier")
    net.readout.mode = "classifier"
    assert relative_error(run(path, input=x), net.double()(x.double()).detach()) < 2e-6


def test_file_does_not_tell_where_it_was_made(files: dict[str, Path]) -> None:
    content = files["ensemble"].read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in content
    assert __file__.encode() not in content


def test_integers_are_drawn_below_their_bound_and_an_input_that_is_not_read_keeps_its_place(
    tmp_path: Path,
) -> None:
    net = cut(Pair(), Input("ids", (4,), "int64", 7), Input("weight", (5,), "float32"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = export_onnx(net, tmp_path / "pair.onnx", "ensemble")
    ids = torch.randint(0, 7, (6, 4))
    expected = net.block_0.weight.detach()[ids].square().mean(1)
    torch.testing.assert_close(run(path, ids=ids, weight=torch.zeros(6, 5)), expected)


def test_net_in_bfloat16_is_exported_in_float32_and_stays_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = chain().bfloat16()
    net.readout.mode = "last"
    net.head_0.eval()
    net.block_1[0].weight.requires_grad_(False)
    net(torch.randn(2, *IMAGE.shape).bfloat16()).sum().backward()
    modes = {name: module.training for name, module in net.named_modules()}
    before = {
        name: (id(p), p.dtype, p.requires_grad, p.clone(), p.grad)
        for name, p in net.named_parameters()
    }
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    random_state = torch.get_rng_state()

    path = export_onnx(net, tmp_path / "net.onnx", "ensemble")

    assert capsys.readouterr().out == ""
    assert torch.equal(torch.get_rng_state(), random_state)
    assert net.readout.mode == "last"
    assert {name: module.training for name, module in net.named_modules()} == modes
    for name, p in net.named_parameters():
        identity, dtype, requires_grad, value, grad = before[name]
        assert (id(p), p.dtype, p.requires_grad) == (identity, dtype, requires_grad)
        assert torch.equal(p, value)
        assert p.grad is grad
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in net.named_buffers())
    image = torch.randn(4, *IMAGE.shape)
    torch.testing.assert_close(
        run(path, image=image),
        scores_by_hand(copy.deepcopy(net).float(), image)["ensemble"],
        rtol=1e-4,
        atol=1e-5,
    )


def test_opset_is_honoured_and_a_link_with_another_suffix_stays_a_link(
    linear: fx.GraphModule, tmp_path: Path
) -> None:
    (tmp_path / "real.json").write_bytes(b"old")
    link = tmp_path / "link.json"
    link.symlink_to("real.json")
    assert export_onnx(linear, str(link), "classifier", opset=18) == link
    assert link.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link.json", "real.json"]
    model = onnx.load(link, format="protobuf")
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 18)]


@pytest.mark.parametrize("opset", ["18", True, 18.5, 0])
def test_what_is_no_opset_is_refused(tmp_path: Path, opset: Any) -> None:
    net = sffx.transform(
        nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)), "layer", torch.zeros(1, 6)
    )
    for export in (sffx.export_onnx, sffx.export_early_exit):
        with pytest.raises(sffx.InputError, match=r"opset is .*Hint: pass the version"):
            export(net, tmp_path / "net", opset=opset)


def test_opset_without_a_form_of_the_model_is_refused(
    linear: fx.GraphModule, old_file: Path
) -> None:
    with pytest.raises(
        ExportError, match=r"no form in opset 7; torch offers opset \d+\. Hint: leave opset out"
    ):
        export_onnx(linear, old_file, opset=7)
    assert_untouched(old_file)


class Determinants(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return torch.linalg.svdvals(image.flatten(2)).mean(1)


class Branch(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.flatten(1) * 2 if image.sum() > 0 else image.flatten(1)


class FixedBatch(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.reshape(2, 3 * 8 * 8) * 2


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            Determinants(),
            r"the operator 'aten\._linalg_svd' \(node '_linalg_svd' in module 'block_0'\) "
            r"has no ONNX form\. Hint: ",
        ),
        (
            Branch(),
            r"\(node 'block_0' in module 'block_0'\): "
            r"Could not guard on data-dependent expression.*Hint: .*without Python branches",
        ),
        (
            FixedBatch(),
            r"cannot be exported: .*a static shape of 2 for dimension "
            r".*Hint: the model must run at any batch size",
        ),
    ],
)
def test_what_cannot_be_exported_is_named_and_the_old_file_stays(
    block: nn.Module, message: str, old_file: Path
) -> None:
    with pytest.raises(ExportError, match=message) as raised:
        export_onnx(cut(Single(block), IMAGE), old_file)
    assert raised.value.__cause__ is not None
    assert "\n" not in str(raised.value)
    assert_untouched(old_file)


class Singular(nn.Module):
    """A convolution, and what ONNX has no operator for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + torch.linalg.svdvals(y).sum(-1)[..., None, None]


class Choosing(Singular):
    """A convolution, and a choice by its values, so that the module is a leaf of the trace."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if y.sum() > 0 else -y


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (
            Singular(),
            r"the operator 'aten\._linalg_svd' \(node 'linalg_svdvals' in module 'stages\.0'\) "
            r"has no ONNX form\. Hint: write this",
        ),
        (
            Choosing(),
            r"the model cannot be exported \(node 'stages_0' in module 'stages\.0'\): "
            r"Could not guard on .*Hint: the model must",
        ),
    ],
)
def test_node_and_module_of_the_original_model_are_named(
    inner: nn.Module, message: str, old_file: Path
) -> None:
    stages = OrderedDict(
        stages=nn.Sequential(inner, nn.ReLU()), flatten=nn.Flatten(), head=nn.Linear(6 * 64, 4)
    )
    net = sffx.transform(nn.Sequential(stages), "layer", torch.zeros(1, 3, 8, 8))
    with pytest.raises(ExportError, match=message):
        export_onnx(net, old_file)
    assert_untouched(old_file)


class FixesFloat64(nn.Module):
    """A model of float64 whose forward names this dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu().double()).relu())


@pytest.mark.parametrize("export", [sffx.export_onnx, sffx.export_program])
def test_model_that_runs_in_float64_alone_is_refused_with_the_reason(
    tmp_path: Path, export: Any
) -> None:
    example = torch.zeros(2, 6, dtype=torch.float64)
    net = sffx.transform(FixesFloat64().double(), "layer", example)
    with pytest.raises(ExportError, match=r"files are written in float32.*Hint: its forward fixes"):
        export(net, tmp_path / "net.file")
    assert not list(tmp_path.iterdir())


def test_net_that_cannot_be_copied_is_refused(old_file: Path) -> None:
    net = chain()
    net.head_0.kept = threading.Lock()
    with pytest.raises(ExportError, match=r"cannot be copied: .*lock.*Hint: a module keeps"):
        export_onnx(net, old_file)
    assert_untouched(old_file)


@pytest.mark.usefixtures("converted")
def test_negative_tolerance_refuses_even_an_equal_file(net: fx.GraphModule, old_file: Path) -> None:
    with pytest.raises(ExportError, match=r"at batch size 1; the tolerance is -1\. Hint: "):
        export_onnx(net, old_file, tolerance=-1.0)
    assert_untouched(old_file)


@pytest.mark.usefixtures("converted")
@pytest.mark.parametrize(
    ("factor", "tolerance", "message"),
    [
        (1.02, 1e-3, r"relative error of 0\.02 at batch size 1; the tolerance is 0\.001"),
        (float("nan"), 1e9, r"relative error of nan at batch size 1"),
    ],
)
def test_difference_beyond_the_tolerance_is_refused_with_its_value(
    net: fx.GraphModule,
    old_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    factor: float,
    tolerance: float,
    message: str,
) -> None:
    right = onnxruntime.InferenceSession.run
    monkeypatch.setattr(
        onnxruntime.InferenceSession, "run", lambda *args: [right(*args)[0] * factor]
    )
    with pytest.raises(ExportError, match=message):
        export_onnx(net, old_file, tolerance=tolerance)
    assert_untouched(old_file)


@pytest.mark.usefixtures("converted")
def test_scores_that_would_only_agree_by_broadcasting_are_refused(
    net: fx.GraphModule, old_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = onnxruntime.InferenceSession.run
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", lambda *args: [right(*args)[0][:1]])
    with pytest.raises(
        ExportError, match=r"ONNX Runtime returns scores of shape \(1, 5\), torch of shape \(3, 5\)"
    ):
        export_onnx(net, old_file, tolerance=1e9)
    assert_untouched(old_file)


@pytest.mark.parametrize(
    ("scores", "expected", "error"),
    [
        ([[1.0, 2.0]], [[1.0, 2.0]], 0.0),
        ([[1.0, -3.0]], [[1.0, -4.0]], 0.25),
        ([[3e-12, 0.0]], [[2e-12, 0.0]], 0.5),
        ([[0.0, 0.0]], [[0.0, 0.0]], 0.0),
    ],
)
def test_relative_error_is_measured_against_the_largest_score(
    scores: list[list[float]], expected: list[list[float]], error: float
) -> None:
    assert relative_error(torch.tensor(scores), torch.tensor(expected)) == pytest.approx(
        error, rel=1e-6
    )


@pytest.mark.usefixtures("converted")
def test_weights_beyond_one_file_are_refused(
    net: fx.GraphModule, old_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "MAX_WEIGHT_BYTES", 4 * 8 * 3 * 3 * 3)
    with pytest.raises(
        ExportError,
        match=r"the weights take 0\.00 GiB, and an ONNX file ends at 2 GiB\. "
        r"Hint: .*external_data=True",
    ):
        export_onnx(net, old_file)
    assert_untouched(old_file)


@pytest.mark.usefixtures("converted")
def test_failing_rename_leaves_the_old_file(
    net: fx.GraphModule, old_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_export.os, "replace", full)
    with pytest.raises(ExportError, match=r"cannot write '.*net\.onnx': No space left on device"):
        export_onnx(net, old_file)
    assert_untouched(old_file)


@pytest.mark.usefixtures("converted")
def test_full_disk_leaves_the_old_file(
    net: fx.GraphModule, old_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(onnx, "save", full)
    with pytest.raises(
        ExportError,
        match=r"cannot write '.*net\.onnx': No space left on device\. Hint: is the disk full\?",
    ):
        export_onnx(net, old_file)
    assert_untouched(old_file)


@pytest.mark.usefixtures("converted")
def test_new_file_replaces_the_old_one_with_the_permissions_of_any_new_file(
    net: fx.GraphModule, old_file: Path
) -> None:
    beside = old_file.with_name("beside")
    beside.touch()
    export_onnx(net, old_file)
    onnx.checker.check_model(old_file)
    assert old_file.stat().st_mode == beside.stat().st_mode
    assert sorted(os.listdir(old_file.parent)) == ["beside", "net.onnx"]


def test_missing_directory_is_refused(net: fx.GraphModule, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"the directory '.*nowhere' does not exist\. Hint: create it"
    ):
        export_onnx(net, tmp_path / "nowhere" / "net.onnx")


def test_directory_as_path_is_refused(net: fx.GraphModule, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"cannot write to '.*': it is a directory\. Hint: name a file in it"
    ):
        export_onnx(net, tmp_path)


def test_unwritable_directory_is_refused(
    net: fx.GraphModule, old_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not chmod: the superuser, who runs the tests in a container, writes everywhere.
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", denied)
    with pytest.raises(
        InputError,
        match=rf"cannot write to the directory '{re.escape(str(old_file.parent))}': "
        r"Permission denied\. Hint: ",
    ):
        export_onnx(net, old_file)
    assert_untouched(old_file)


def test_unknown_readout_lists_the_known_ones(net: fx.GraphModule, tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"'mean'\. Hint: the readouts are "
        r"'ensemble', 'weighted', 'last', 'classifier', 'cumulative'",
    ):
        export_onnx(net, tmp_path / "net.onnx", "mean")


def test_plain_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"Chain, not a cut model\. Hint: pass what sffx\.transform returned"
    ):
        export_onnx(Chain(), tmp_path / "net.onnx")  # type: ignore[arg-type]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package_names_the_extra(
    net: fx.GraphModule, old_file: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingExtra,
        match=rf"exporting to ONNX needs the package '{package}', .*pip install 'sffx\[export\]'",
    ):
        export_onnx(net, old_file)
    assert_untouched(old_file)


# A few classes take the direct form of the goodness, many the one by second moments.
@pytest.mark.parametrize("classes", [4, 300])
def test_a_transformed_model_is_exported_as_it_is_evaluated(tmp_path: Path, classes: int) -> None:
    torch.manual_seed(0)
    net = sffx.transform(toys.Chain(classes), "layer", torch.zeros(1, 3, 8, 8))
    for _ in range(3):
        net(torch.randn(16, 3, 8, 8) * 2 + 1)
    path = export_onnx(net, tmp_path / "net.onnx")
    for batch in (1, 7):
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(run(path, input=x), net.eval()(x).detach(), rtol=1e-4, atol=1e-5)
