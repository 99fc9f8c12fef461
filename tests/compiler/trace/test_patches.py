from __future__ import annotations

import functools
import sys
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sffx
from sffx.compiler.trace.checkpointing import LEFT_OUT
from sffx.compiler.trace.named_functions import caches
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


@pytest.mark.parametrize(
    "code",
    [
        lambda m, n: torch.ones(6).expand(n, 6),
        lambda m, n: torch.arange(6.0).repeat(n, 1),
        lambda m, n: torch.arange(6.0).repeat(n).view(n, 6),
        lambda m, n: torch.arange(6.0).tile((n, 1)).unflatten(0, (n, 1))[:, 0],
        lambda m, n: torch.broadcast_to(torch.ones(6), (n, 6)),
        lambda m, n: torch.ones(2).new_full((n, 6), 0.5) + torch.ones(2).new_zeros(n, 6),
        lambda m, n: torch.full((n, 6), 0.5),
        lambda m, n: torch.full((n, n), 2.0).triu(1).sum(0)[:, None],
        lambda m, n: torch.eye(n)[:, :1] + torch.eye(n, 6),
        lambda m, n: torch.randint(0, 5, (n, 6)),
        lambda m, n: torch.randperm(n)[:, None],
        lambda m, n: torch.normal(0.0, 1.0, (n, 6)),
        lambda m, n: torch.full((divmod(3 * n, 3)[0], round(n / n) * 6), 0.5),
    ],
)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_size_given_to_a_function_of_torch_stays_symbolic(code, axis):
    """At other batch sizes (axis 0) and lengths (axis 1) than that of the example."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = x + code(m, x.shape[axis])
        return y if axis == 0 else y.mean(1)

    model = around(Applies(forward))
    net = cut_without_norms(model, example=torch.randn(2, 6) if axis == 0 else torch.randn(2, 5, 6))
    assert not net.plan.leaves
    assert not net.plan.notes
    for size in (3, 4):
        x = torch.randn(size, 6) if axis == 0 else torch.randn(2, size, 6)
        torch.manual_seed(size)
        expected = model(x)
        torch.manual_seed(size)
        assert torch.equal(net.train()(x)[-1], expected)


@pytest.mark.parametrize("draw", [torch.rand, torch.randn])
def test_a_generator_of_its_own_makes_a_leaf(draw):
    def code(m: nn.Module, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return x + draw(x.shape[0], 6, generator=generator)

    model = around(Applies(code))
    net = cut_without_norms(model).train()
    assert leaf_names(net) == ["2"]
    assert_same_logits(net, model)


def test_torchs_functions_are_as_before_after_a_trace():
    functions = (torch.zeros, torch.tensor, torch.finfo, torch.utils.checkpoint.checkpoint)
    methods = dict(vars(torch.Tensor))
    apply, script = vars(torch.autograd.Function)["apply"], torch._C.ScriptFunction.__call__
    trace(Residual())
    with pytest.raises(TraceError):
        trace(Applies(lambda m, x: x if x.sum() > 0 else -x), torch.zeros(1, 6))
    assert functions == (
        *(torch.zeros, torch.tensor, torch.finfo),
        torch.utils.checkpoint.checkpoint,
    )
    assert dict(vars(torch.Tensor)) == methods
    assert vars(torch.autograd.Function)["apply"] is apply
    assert torch._C.ScriptFunction.__call__ is script


class _Encoder(nn.Module):
    """torch's encoder with a mask, of which torch asks whether it is causal."""

    def __init__(self, mask: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.inp, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        y = self.inp(x)
        return self.head(self.encoder(y, mask=self.mask(y.shape[1])).mean(1))


@pytest.mark.parametrize(
    "mask",
    [
        nn.Transformer.generate_square_subsequent_mask,
        lambda n: torch.ones(n, n, dtype=torch.bool).triu(1),
        lambda n: torch.eye(n, dtype=torch.bool),
    ],
)
def test_an_encoder_with_a_mask_takes_any_length(mask):
    model = _Encoder(mask)
    net = cut_without_norms(model, example=torch.randn(2, 5, 6)).train()
    assert len(net.plan) == 3
    for length in (5, 7):
        x = torch.randn(3, length, 6)
        assert torch.allclose(net(x)[-1], model(x), atol=1e-6)


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


class _Recomputed(nn.Module):
    """Runs its layers under checkpointing: on (B, 6)."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.b = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.2))
        self.head = nn.Linear(8, 4)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.a, self.b):
            x = checkpoint(part, x, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_batch_norms_under_checkpointing_count_a_batch_once(reentrant):
    torch.manual_seed(0)
    model = _Recomputed(reentrant)
    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 0])
    net = sffx.transform(model, "layer", x, check=True)
    sffx.local_loss(net, x, y).backward()
    plain = nn.Sequential(model.a, model.b, model.head)
    plain(x)
    norm = sffx.extract(net).a[1]
    assert torch.equal(norm.num_batches_tracked, model.a[1].num_batches_tracked)
    assert torch.equal(norm.running_mean, model.a[1].running_mean)


class _ByFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return _Rounded.apply(3 * self.conv(x))


class _ByScript(_ByFunction):
    def forward(self, x: Tensor) -> Tensor:
        return _SCRIPT(self.conv(x))


class _CallsScript(nn.Module):
    """Calls a scripted function in the forward of the model itself, as older files do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)])

    def forward(self, x: Tensor) -> Tensor:
        first, second, last = self.layers
        return last(_SCRIPTED_SWISH(second(_SCRIPTED_SWISH(first(x)))))


def _swish(x: Tensor, scale: float = 1.5) -> Tensor:
    if x.dim() > 3:
        return x
    return x * torch.sigmoid(scale * x)


def test_the_function_that_a_script_was_compiled_from_is_traced():
    torch.manual_seed(0)
    model, x = _CallsScript(), torch.randn(4, 6)
    net = sffx.transform(model, "layer", x, norm="none")
    assert len(net.plan) == 2
    assert not net.plan.leaves
    assert_same_logits(net, model, x)


class _Checkpointed(_ByFunction):
    reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.conv, x, use_reentrant=self.reentrant) + x


class _CheckpointedOtherwise(_Checkpointed):
    reentrant = False


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    _SCRIPT = torch.jit.trace(lambda x: x * torch.tanh(F.softplus(x)), torch.zeros(2, 8, 3, 3))
    _SCRIPTED_SWISH = torch.jit.script(_swish)


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
    assert (LEFT_OUT in net.plan.notes) == (not reason)
    assert torch.equal(_Rounded.apply(torch.tensor(0.6)), torch.tensor(1.0))  # torch's own is back


def test_a_cache_that_an_installed_module_gains_is_found(monkeypatch):
    module = ModuleType("gains")
    module.__file__ = "/lib/site-packages/gains.py"
    monkeypatch.setitem(sys.modules, "gains", module)

    def found():
        return [name for owner, name, _ in caches() if owner is module]

    assert found() == found() == []
    module.doubled = functools.lru_cache(lambda size: 2 * size)
    module.is_there = functools.lru_cache(lambda: True)  # a proxy cannot be given to it
    assert found() == found() == ["doubled"]
