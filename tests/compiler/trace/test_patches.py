from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sffx.compiler.trace.trace import trace
from sffx.errors import TraceError
from tests.compiler.trace.oracle import (
    Applies,
    assert_same_logits,
    cut_without_norms,
    leaf_names,
)
from tests.toys import Residual, around


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: x + torch.arange(6),
        lambda m, x: x + torch.arange(x.shape[1], device=x.device),
        lambda m, x: x + torch.ones(x.shape[0], 1, dtype=x.dtype),
        lambda m, x: x + torch.ones(*x.shape),
        lambda m, x: x * torch.tensor(x.shape[0]),
        lambda m, x: x.clamp(min=torch.finfo(x.dtype).min),
    ],
)
def test_tensors_that_a_forward_makes_are_traced(code):
    model = around(Applies(code))
    net = cut_without_norms(model).train()
    assert not net.plan.leaves
    assert_same_logits(net, model)


def test_torchs_functions_are_as_before_after_a_trace():
    functions = (torch.zeros, torch.tensor, torch.finfo, torch.utils.checkpoint.checkpoint)
    apply, script = vars(torch.autograd.Function)["apply"], torch._C.ScriptFunction.__call__
    trace(Residual())
    with pytest.raises(TraceError):
        trace(Applies(lambda m, x: x if x.sum() > 0 else -x), torch.zeros(1, 6))
    assert functions == (
        *(torch.zeros, torch.tensor, torch.finfo),
        torch.utils.checkpoint.checkpoint,
    )
    assert vars(torch.autograd.Function)["apply"] is apply
    assert torch._C.ScriptFunction.__call__ is script


@functools.lru_cache
def _doubled_shape(shape: Any) -> tuple[Any, ...]:
    """Compute with sizes and keep the result, as einops does with the sizes of a pattern."""
    return tuple(shape[i] * 2 // 2 for i in range(len(shape)))


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: x.reshape(_doubled_shape(x.shape)),
        lambda m, x: x.reshape(x.shape[0], *_doubled_shape(x.shape[1:])),
        lambda m, x: x + m.inner.weight.sum(1).reshape(_doubled_shape(m.inner.weight.sum(1).shape)),
    ],
)
def test_a_cache_keeps_no_sizes_of_a_trace(code):
    _doubled_shape.cache_clear()
    for _ in range(2):  # what the first trace kept, the second would take
        model = around(Applies(code))
        net = cut_without_norms(model).train()
        assert not net.plan.leaves
        assert_same_logits(net, model)
    kept = _doubled_shape(torch.Size([2, 6]))
    assert kept == (2, 6)
    assert type(kept[1]) is int


def test_a_batch_size_has_no_hash():
    """Code that keeps results by sizes does without where they have no hash, as einops does."""

    def forward(module: Applies, x: Tensor) -> Tensor:
        try:
            hash((1, x.shape))
        except TypeError:
            return x * 2  # the same as below
        return x + x

    net = cut_without_norms(around(Applies(forward)))
    assert not net.plan.leaves
    assert "mul" in {node.name for block in net.plan for node in block.graph}


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _ByFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return _Rounded.apply(3 * self.conv(x))


class _ByScript(_ByFunction):
    def forward(self, x: Tensor) -> Tensor:
        return _SCRIPT(self.conv(x))


class _Checkpointed(_ByFunction):
    reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.conv, x, use_reentrant=self.reentrant) + x


class _CheckpointedOtherwise(_Checkpointed):
    reentrant = False


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    _SCRIPT = torch.jit.trace(lambda x: x * torch.tanh(F.softplus(x)), torch.zeros(2, 8, 3, 3))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (_ByFunction, "calls the autograd function _Rounded"),
        (_ByScript, "calls the script"),
        (_Checkpointed, ""),
        (_CheckpointedOtherwise, ""),
    ],
)
def test_what_would_take_a_proxy_for_a_tensor_ends_in_a_leaf_or_is_left_out(kind, reason):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU()),
        kind(),
        *(nn.Conv2d(8, 8, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(288, 3)),
    )
    x = torch.randn(4, 3, 8, 8)
    net = cut_without_norms(model, ["_4"], x).train()
    assert_same_logits(net, model, x)
    assert leaf_names(net) == (["2"] if reason else [])
    assert all(reason in leaf.reason for leaf in net.plan.leaves)
    assert ("gradient checkpointing in the model is left out" in net.plan.notes) == (not reason)
    assert torch.equal(_Rounded.apply(torch.tensor(0.6)), torch.tensor(1.0))  # torch's own is back
