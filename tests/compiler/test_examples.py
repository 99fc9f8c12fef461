from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.compiler.trace.trace import trace
from sffx.errors import InputError
from tests.toys import Chain, Residual, TwoInputs


class _Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        x = self.inner(x) * scale
        return self.head(x if mask is None else x * mask)


@pytest.mark.parametrize(
    ("example", "names"),
    [
        (torch.zeros(1, 6), ["x"]),
        (None, ["x"]),
        ({"x": torch.zeros(1, 6), "mask": torch.ones(1, 6)}, ["x", "mask"]),
        ((torch.zeros(1, 6), None, 3.0), ["x"]),
    ],
)
def test_optional_arguments_are_inputs_only_when_given(example, names):
    assert [i.name for i in trace(_Optional(), example).inputs] == names


def test_several_inputs_by_position_and_by_name():
    image, text = torch.zeros(1, 6), torch.zeros(1, 5)
    expected = [("image", (6,)), ("text", (5,))]
    for example in ((image, text), {"text": text, "image": image}):
        assert [(i.name, i.shape) for i in trace(TwoInputs(), example).inputs] == expected


@pytest.mark.parametrize(
    ("model", "shape", "dtype"),
    [
        (Chain(), (3, 8, 8), "float32"),
        (
            nn.Sequential(
                nn.Conv1d(2, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)
            ),
            (2, 128),
            "float32",
        ),
        (
            nn.Sequential(
                nn.Conv3d(1, 4, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)
            ),
            (1, 16, 112, 112),
            "float32",
        ),
        (nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3)).double(), (20,), "float64"),
    ],
)
def test_the_input_is_inferred_from_the_first_layer(model, shape, dtype):
    (record,) = trace(model).inputs
    assert (record.shape, record.dtype) == (shape, dtype)


class _Configuration:
    image_size = 12


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_size", 12),
        ("image_size", (12, 12)),
        ("pretrained_cfg", {"input_size": (3, 12, 12)}),
        ("config", _Configuration()),
    ],
)
def test_an_image_size_that_the_model_keeps_is_tried_first(name, value):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    setattr(model, name, value)
    assert trace(model).inputs[0].shape == (3, 12, 12)


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (
            TwoInputs(),
            None,
            r"TwoInputs\.forward takes 2 inputs \(image, text\).*Hint: pass example_input=\(",
        ),
        (
            Chain(),
            torch.zeros(1, 5, 8, 8),
            r"does not run on example_input \(input \(1, 5, 8, 8\)\)",
        ),
        (
            Chain(),
            torch.zeros(3, 8, 8),
            r"\(input \(3, 8, 8\)\) has no axis for the batch.*the batch, input \(1, 3, 8, 8\)",
        ),
        (
            nn.Linear(5, 3),
            torch.zeros(5),
            r"\(input \(5,\)\) has no axis for the batch.*the batch, input \(1, 5\)",
        ),
        (
            Chain(),
            [torch.zeros(2, 3, 8, 8), torch.zeros(2)],
            r"does not run on.*Hint: a list is one argument.*example_input=batch\[0\]",
        ),
        (Chain(), {"y": torch.zeros(1)}, r"example_input does not fit Chain\.forward"),
        (Chain(), "no tensor", r"example_input holds no tensor, got str"),
        (Chain(), torch.zeros(()), r"a tensor without axes"),
        (
            nn.Sequential(nn.Flatten()),
            None,
            r"cannot be inferred: its first layer is of no known kind",
        ),
    ],
)
def test_inputs_that_cannot_be_used(model, example, message):
    with pytest.raises(InputError, match=message):
        trace(model, example)


class _Layouts(nn.Module):
    """Takes a row (B, 5) and a sequence (T, B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.row, self.layer, self.head = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(8, 3)

    def forward(self, row: Tensor, sequence: Tensor) -> Tensor:
        last = self.layer(sequence)[-1]
        return self.head(torch.cat([self.row(row), last], 1))


def test_inputs_with_the_batch_on_different_axes_are_refused():
    example = (torch.zeros(2, 5), torch.zeros(7, 2, 4))
    message = (
        r"differ in their first axis \(row \(2, 5\), sequence \(7, 2, 4\)\).*transpose\(0, 1\)"
    )
    with pytest.raises(InputError, match=message):
        trace(_Layouts(), example)


class _Detector(nn.Module):
    """Asks for targets in train mode, as torchvision's detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.boxes = Residual(), nn.Linear(4, 4)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        assert targets is not None, "targets should not be none"
        return self.boxes(self.backbone(images))


def test_a_detector_is_told_to_transform_its_backbone():
    message = (
        r"_Detector does not run on example_input \(images \(1, 3, 8, 8\)\): "
        r"AssertionError: targets should not be none.* \(.*test_examples\.py:\d+, in forward\)\. "
        r"Hint: of a detector or the like, .*\(here self\.backbone, a Residual\)"
    )
    with pytest.raises(InputError, match=message):
        trace(_Detector(), torch.zeros(1, 3, 8, 8))


class _Star(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, *x: Tensor) -> Tensor:
        return self.head(self.inner(sum(x)).relu())


class _PositionOnly(_Star):
    def forward(self, x: Tensor, /, scale: float = 2.0) -> Tensor:
        return self.head(self.inner(x * scale).relu())


@pytest.mark.parametrize(
    ("make", "inputs", "names"),
    [(_Star, 1, ["x"]), (_Star, 2, ["x_0", "x_1"]), (_PositionOnly, 1, ["x"])],
)
def test_arguments_without_names_are_inputs(make, inputs, names):
    model = make().eval()
    x = tuple(torch.randn(3, 6) for _ in range(inputs))
    net = sffx.transform(model, "layer", x, norm="none")
    net.readout.mode = "classifier"
    assert [each.name for each in net.plan.inputs] == names
    assert torch.equal(net(*x), model(*x))


@pytest.mark.parametrize(
    "held",
    [
        types.SimpleNamespace(x=torch.zeros(2, 6)),
        np.zeros((2, 6)),
        {"a": [np.zeros((2, 6))]},
        {torch.zeros(2, 6)},
        nn.utils.rnn.pack_sequence([torch.zeros(2, 6)]),
    ],
)
def test_an_input_whose_numbers_would_be_frozen_is_refused(held):
    with pytest.raises(InputError, match=r"the input x.* is a \w+, whose numbers a cut model"):
        sffx.plan(_Star(), example_input=(torch.zeros(2, 6), held))


class _Tokens(nn.Module):
    """A model that takes tokens, and a weight for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, tokens: Tensor, weight: Tensor) -> Tensor:
        x = self.embedding(tokens).mean(1) * weight
        return self.head(self.inner(x).relu())


class _Casts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x.float() / 255).relu())


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 4))


_OTHERS = [torch.int64, torch.uint8, torch.bool, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize(
    ("model", "example"),
    [
        *((_perceptron(), torch.ones(2, 6).to(dtype)) for dtype in [*_OTHERS, torch.cfloat]),
        *((_Casts(), torch.ones(2, 6).to(dtype)) for dtype in _OTHERS),
        *((Chain(), torch.ones(2, 3, 8, 8).to(dtype)) for dtype in _OTHERS),
        *(
            (nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4)), torch.ones(2, 6).to(d))
            for d in _OTHERS
        ),
        *((_Tokens(), (torch.ones(2, 5).to(dtype), torch.ones(2, 1))) for dtype in _OTHERS),
        (_Tokens(), (torch.ones(2, 5).int(), torch.ones(2, 1))),
        (_Tokens(), (torch.ones(2, 5).long(), torch.ones(2, 1).double())),
        (_Tokens(), (torch.ones(2, 5).long(), torch.ones(2, 1).long())),
        (_perceptron().double(), torch.ones(2, 6)),
        (_perceptron().bfloat16(), torch.ones(2, 6)),
    ],
)
def test_an_input_is_refused_for_its_dtype_where_the_model_itself_refuses_it(model, example):
    args = example if isinstance(example, tuple) else (example,)
    try:
        model(*args)
    except RuntimeError:
        with pytest.raises(InputError, match=r"dtype, pass (input|x|tokens|weight)\.to\(torch\."):
            trace(model, example)
        return
    trace(model, example)
