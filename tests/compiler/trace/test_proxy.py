from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from sffx.compiler.trace.trace import trace
from sffx.errors import TraceError
from tests.compiler.trace.oracle import Applies, assert_same_logits, cut_without_norms
from tests.toys import around


class _Reshaping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = self.conv(x).shape
        tokens = self.conv(x).reshape(b, c, h * w).transpose(1, 2)
        return self.head(tokens.mean(1)) + (len(tokens.shape) - 3)


def test_shapes_stay_symbolic():
    model = _Reshaping().eval()
    first = lambda analysis: [analysis.candidates[0]]  # noqa: E731
    net = cut_without_norms(model, first, torch.zeros(1, 3, 4, 4))
    assert_same_logits(net, model, torch.randn(2, 3, 4, 4), torch.randn(5, 3, 6, 7))


def test_a_comparison_with_one_outcome_at_all_batch_sizes_is_a_number():
    code = lambda m, x: x * (2 + int(x.shape[0] == -1) + int(x.shape[0] > 0))  # noqa: E731
    model = around(Applies(code)).eval()
    net = cut_without_norms(model)
    assert not net.plan.leaves
    assert_same_logits(net, model, torch.randn(3, 6), torch.randn(1, 6))


def test_a_comparison_that_the_batch_decides_is_no_number():
    code = lambda m, x: x * (2 + int(x.shape[0] == 1))  # noqa: E731
    net = cut_without_norms(around(Applies(code)))
    assert len(net.plan.leaves) == 1


def test_no_tensor_can_be_called_during_the_trace():
    """`default(x, make)` of many packages calls what can be called."""

    def forward(module: Applies, x: Tensor) -> Tensor:
        return x() if callable(x) else x * 2

    model = around(Applies(forward)).eval()
    net = cut_without_norms(model)
    assert not net.plan.leaves
    assert_same_logits(net, model, torch.randn(3, 6))
    assert callable(torch.fx.Proxy(torch.fx.Graph().placeholder("x")))  # after it as before


def test_a_tensor_is_a_tensor_during_the_trace():
    scaled_if_tensor = Applies(lambda m, x: x * 10 if isinstance(x, Tensor) else x)
    model = around(scaled_if_tensor).eval()
    net = cut_without_norms(model)
    assert not net.plan.leaves
    assert_same_logits(net, model, torch.randn(3, 6))


# What a forward may hold, and what it may ask of it. `type` and `is` ask no method of a value.
VALUES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "tensor": lambda m, x: x,
    "parameter": lambda m, x: m.inner.weight,
    "shape": lambda m, x: x.shape,
    "part of a shape": lambda m, x: x.shape[1:],
    "batch": lambda m, x: x.shape[0],
    "size": lambda m, x: x.size(1),
    "number": lambda m, x: x.shape[1] * 0.5,
    "count": lambda m, x: x.numel(),
    "axes": lambda m, x: x.ndim,
    "stride": lambda m, x: x.stride(0),
    "dtype": lambda m, x: x.dtype,
    "device": lambda m, x: x.device,
    "kind of device": lambda m, x: x.device.type,
    "on a gpu": lambda m, x: x.is_cuda,
    "floats": lambda m, x: torch.is_floating_point(x),
    "parts": lambda m, x: x.split(3, 1),
    "chunks": lambda m, x: x.chunk(2, 1),
    "largest": lambda m, x: x.max(1),
}
QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "isinstance int": lambda v: isinstance(v, int),
    "isinstance float": lambda v: isinstance(v, (float, str)),
    "isinstance tuple": lambda v: isinstance(v, (tuple, list)),
    "isinstance Size": lambda v: isinstance(v, torch.Size),
    "isinstance Tensor": lambda v: isinstance(v, Tensor),
    "isinstance Parameter": lambda v: isinstance(v, nn.Parameter),
    "isinstance dtype": lambda v: isinstance(v, (torch.dtype, torch.device)),
    "isinstance Integral": lambda v: isinstance(v, numbers.Integral),
    "isinstance Sequence": lambda v: isinstance(v, Sequence) and not isinstance(v, str),
    "type is int": lambda v: type(v) is int,
    "type is Tensor": lambda v: type(v) is Tensor,
    "type is Parameter": lambda v: type(v) is nn.Parameter,
    "type in": lambda v: type(v) in (tuple, torch.Size, bool),
    "type of a type": lambda v: type(type(v)) is type and isinstance(type(v), type),
    "class is int": lambda v: v.__class__ is int,
    "issubclass": lambda v: issubclass(type(v), tuple),
    "match": lambda v: _matched(v),
    "is None": lambda v: v is None,
    "is False": lambda v: v is False,
    "is True": lambda v: v is True,
    "text": lambda v: str(v) == "6",
    "formatted": lambda v: f"{v:02}" == "06",
    "written": lambda v: None if isinstance(v, (Tensor, tuple)) else str(v),
    "as an index": lambda v: range(100)[v] == 6,
    "has": lambda v: (hasattr(v, "bit_length"), hasattr(v, "shape"), callable(v)),
    "equal": lambda v: bool(v == 6),
    "in": lambda v: v in (3, 6),
    "key": lambda v: {6: True}.get(v, False),
    "smallest": lambda v: min(v, 100) == 6,
}


def _matched(value: Any) -> str:
    match value:
        case bool():
            return "bool"
        case int():
            return "int"
        case [_, _]:
            return "pair"
        case tuple():
            return "tuple"
        case _:
            return "other"


def test_a_proxy_answers_as_its_value_does_in_the_model():
    expected: dict[tuple[str, str], Any] = {}
    found: dict[tuple[str, str], Any] = {}

    def ask(m: nn.Module, x: Tensor) -> Tensor:
        answers = found if isinstance(x, fx.Proxy) else expected
        for name, value in VALUES.items():
            for question, asked in QUESTIONS.items():
                try:
                    answers[name, question] = asked(value(m, x))
                except (RuntimeError, TypeError, IndexError, ValueError) as failure:
                    answers[name, question] = failure
        return x

    model = around(Applies(ask))
    assert not trace(model).leaves
    model(torch.zeros(60, 6))
    for key, answer in expected.items():
        # A trace may refuse what it cannot answer.
        if not isinstance(answer, Exception) and not isinstance(found[key], Exception):
            assert bool(found[key]) == bool(answer), key
            assert isinstance(found[key], fx.Proxy) or found[key] == answer, key


DTYPE = torch.float32


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: x if x.dtype is torch.float32 else x * 2,
        lambda m, x: x if torch.float32 is x.dtype else x * 2,
        lambda m, x: x if x.dtype is DTYPE else x * 2,
        lambda m, x: x if m.training is True else x * 2,
        lambda m, x: x if (x.shape[1] == 6) is True else x * 2,
        lambda m, x: x * 2 if m.training is not True else x,
    ],
    ids=["dtype", "dtype last", "dtype by name", "training", "comparison", "not"],
)
def test_a_comparison_by_identity_makes_a_leaf(code):
    kind = type("ByIdentity", (Applies,), {"forward": code})
    model = around(kind(code)).train()
    net = cut_without_norms(model)
    assert "by 'is'" in net.plan.leaves[0].reason
    for mode in (True, False):
        assert_same_logits(net.train(mode), model.train(mode))
    with pytest.raises(TraceError, match=r"by 'is'.*'==' can be traced.*Hint"):
        cut_without_norms(kind(code))


@pytest.mark.parametrize("call", ["halved(x)", "helpers.halved(x)", "package.helpers.halved(x)"])
@pytest.mark.parametrize("place", ["", "/lib/site-packages/helpers.py"])
def test_a_comparison_by_identity_in_another_file_makes_a_leaf(call, place):
    package, helpers = ModuleType("package"), ModuleType("helpers")
    package.helpers, helpers.__file__, helpers.torch = helpers, place, torch
    code = "def halved(x):\n    return x / 2 if x.dtype is torch.float32 else x"
    exec(code, vars(helpers))
    names = {"package": package, "helpers": helpers, "halved": helpers.halved}
    exec(f"def forward(self, x):\n    return {call}", names)
    model = around(type("ByIdentity", (Applies,), {"forward": names["forward"]})(None))
    # What an installed library compares, it has been tested with.
    leaves = [leaf.reason for leaf in trace(model).leaves]
    assert ["by 'is'" in reason for reason in leaves] == ([] if place else [True])


def test_numpy_computes_with_sizes_and_the_graph_refuses_other_sizes():
    def code(module: nn.Module, x: Tensor) -> Tensor:
        return x / np.sqrt(x.shape[1]) * np.prod(x.shape[1:]) + np.maximum(x.size(-1), 7)

    model = around(Applies(code)).eval()
    net = cut_without_norms(model)
    assert not net.plan.leaves
    assert_same_logits(net, model)
    scaled = around(Applies(lambda m, x: x * (np.float64(2) * x.shape[0]) - np.int64(1))).eval()
    net = cut_without_norms(scaled)
    assert not net.plan.leaves
    assert_same_logits(net, scaled)
    net = cut_without_norms(around(Applies(lambda m, x: x / np.sqrt(x.shape[0]))))
    assert "batch size" in net.plan.leaves[0].reason
