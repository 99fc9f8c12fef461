"""Every chain against the plain modules: values, gradients, buffers, and what is kept."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from sffx.kernels.activation import private_gradients
from sffx.kernels.recompute import ACTIVATIONS, recomputed
from sffx.memory.count import count_memory

ACTIVATION_MODULES = {
    "relu": nn.ReLU(),
    "hardswish": nn.Hardswish(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    None: nn.Identity(),
}

# norm, layer, shape of the input
CHAINS = {
    "bn-conv1d": (nn.BatchNorm1d(4), nn.Conv1d(4, 6, 3, padding=1), (5, 4, 7)),
    "bn-conv2d": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, stride=2), (5, 4, 7, 6)),
    "bn-conv2d without bias": (
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 6, 3, stride=2, bias=False),
        (5, 4, 7, 6),
    ),
    "bn-depthwise": (
        nn.BatchNorm2d(4, momentum=None),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4),
        (5, 4, 7, 6),
    ),
    "bn-conv3d": (nn.BatchNorm3d(4, affine=False), nn.Conv3d(4, 6, 1), (3, 4, 3, 4, 5)),
    "bn-linear": (nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 6), (5, 4)),
    "ln-linear": (nn.LayerNorm(4), nn.Linear(4, 6), (5, 7, 4)),
    "ln without parameters": (
        nn.LayerNorm(4, elementwise_affine=False),
        nn.Linear(4, 6, bias=False),
        (5, 7, 4),
    ),
    "conv": (None, nn.Conv2d(4, 6, 3), (5, 4, 7, 6)),
    "linear": (None, nn.Linear(4, 6), (5, 7, 4)),
    "linear without bias": (None, nn.Linear(4, 6, bias=False), (5, 4)),
}


def chain(name: str) -> tuple[nn.Module | None, nn.Module, Tensor]:
    torch.manual_seed(0)
    norm, layer, shape = CHAINS[name]
    norm, layer = copy.deepcopy(norm), copy.deepcopy(layer)
    for module in (norm, layer):
        for p in module.parameters() if module is not None else ():
            nn.init.normal_(p)
    return (
        norm.double() if norm is not None else None,
        layer.double(),
        torch.randn(shape, dtype=torch.float64),
    )


def plain(x: Tensor, layer: nn.Module, norm: nn.Module | None, activation: str | None) -> Tensor:
    return layer(ACTIVATION_MODULES[activation](norm(x) if norm is not None else x))


def parameters(*modules: nn.Module | None) -> list[nn.Parameter]:
    return [p for module in modules if module is not None for p in module.parameters()]


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        (name, a)
        for name, (norm, *_) in CHAINS.items()
        for a in (*ACTIVATIONS, None)
        if norm is not None or a
    ],
)
@pytest.mark.parametrize("private", [False, True])
def test_values_gradients_and_buffers_are_those_of_the_plain_modules(
    name, activation, private, monkeypatch
):
    monkeypatch.setattr("sffx.kernels.batch_slices._SMALL", 8)  # several parts
    norm, layer, x = chain(name)
    twin, twin_layer = copy.deepcopy(norm), copy.deepcopy(layer)
    base = torch.randn_like(x).requires_grad_()
    upstream = None
    results = []
    for a, b, function in ((twin, twin_layer, plain), (norm, layer, None)):
        value = x + base  # not a leaf, and kept by nobody: it may be written over
        with private_gradients() if private else nullcontext():
            if function is not None:
                out = plain(value, b, a, activation)
            else:
                out = recomputed(
                    value, b, norm=a, activation=activation, overwrite=True, frees_gradient=True
                )
        del value
        upstream = torch.randn_like(out) if upstream is None else upstream
        # Passed through an operation that makes a gradient of its own, since the chain may free it.
        results.append(
            (
                out.detach().clone(),
                *torch.autograd.grad((out * 1.0 * upstream).sum(), [base, *parameters(a, b)]),
            )
        )
    assert_same(results[1], results[0])
    if norm is not None:
        assert_same(tuple(norm.buffers()), tuple(twin.buffers()))


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        *(
            (n, frozen)
            for n in ("bn-conv2d", "ln-linear")
            for frozen in ("x", "norm", "weight", "bias", "all but bias", "all but norm")
        ),
        *(("linear", frozen) for frozen in ("x", "weight", "bias", "all but bias")),
    ],
)
def test_frozen_parts_get_no_gradient_and_the_others_the_right_one(name, frozen):
    norm, layer, x = chain(name)
    x.requires_grad_(frozen != "x" and not frozen.startswith("all"))
    for p in parameters(norm):
        p.requires_grad_(frozen not in ("norm", "all but bias"))
    layer.weight.requires_grad_(frozen not in ("weight", "all but bias", "all but norm"))
    if layer.bias is not None:
        layer.bias.requires_grad_(frozen not in ("bias", "all but norm"))
    wanted = [t for t in (x, *parameters(norm, layer)) if t.requires_grad]
    assert wanted
    out = recomputed(x, layer, norm=norm, activation="silu")
    expected = plain(x, layer, norm, "silu")
    assert_same(
        torch.autograd.grad(out.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
    )


def test_only_the_input_of_the_norm_is_kept():
    norm, layer = nn.BatchNorm2d(8), nn.Conv2d(8, 1, 1)
    source = torch.randn(4, 8, 32, 32, requires_grad=True)

    def kept(function):
        tensors = {}

        def pack(t):
            tensors[t.untyped_storage()._cdata] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            function(source * 2)
        large = [t for t in tensors.values() if t.numel() == source.numel()]
        return len(large)

    assert kept(lambda x: plain(x, layer, norm, "hardswish")) == 3
    assert kept(lambda x: recomputed(x, layer, norm=norm, activation="hardswish")) == 1


def test_a_hidden_layer_of_an_mlp_is_held_once():
    """Its value is kept, its activation made part by part, and its gradient written over it."""
    wide, narrow = nn.Linear(64, 4096), nn.Linear(4096, 64)
    x = torch.randn(2048, 64)
    both = nn.ModuleList([wide, narrow])

    def step():
        with private_gradients():
            y = recomputed(wide(x), narrow, activation="gelu", overwrite=True)
        torch.autograd.grad(y.sum(), list(both.parameters()))

    hidden = 4 * 2048 * 4096
    assert hidden < count_memory(step, model=both).activations < 1.35 * hidden


REFUSED = {
    "a norm in eval mode": lambda norm, layer: norm.eval(),
    "a hook on the norm": lambda norm, layer: norm.register_forward_hook(
        lambda m, args, out: 2 * out
    ),
    "a hook before the layer": lambda norm, layer: layer.register_forward_pre_hook(
        lambda m, args: (3 * args[0],)
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_formulas_do_not_cover_is_left_to_torch(case):
    norm, layer, x = chain("bn-conv2d")
    REFUSED[case](norm, layer)
    out = recomputed(x, layer, norm=norm, activation="relu")
    assert "Recomputed" not in type(out.grad_fn).__name__
    torch.testing.assert_close(out, plain(x, layer, norm, "relu"))


class Adapted(nn.Conv2d):
    """A layer that does more than its class, as adapters of fine-tuning libraries do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize("norm", [nn.Identity(), nn.GroupNorm(2, 4), nn.SyncBatchNorm(4)])
def test_what_was_put_in_the_place_of_a_norm_runs_as_it_is(norm):
    layer, x = nn.Conv2d(4, 6, 1), torch.randn(2, 4, 3, 3)
    twin = copy.deepcopy(norm)
    torch.testing.assert_close(
        recomputed(x, layer, norm=norm, activation="relu"), plain(x, layer, twin, "relu")
    )
    assert_same(tuple(norm.buffers()), tuple(twin.buffers()))


def test_what_was_put_in_the_place_of_a_layer_runs_as_it_is():
    layer, x = Adapted(4, 6, 1), torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(
        recomputed(x, layer, activation="relu"), plain(x, layer, None, "relu")
    )


def test_a_forward_put_on_the_instance_runs():
    layer, x = nn.Conv2d(4, 6, 1), torch.randn(2, 4, 3, 3)
    layer.forward = lambda z: nn.Conv2d.forward(layer, z).sin()
    torch.testing.assert_close(
        recomputed(x, layer, activation="relu"), plain(x, layer, None, "relu")
    )


def test_autocast_is_left_to_torch():
    norm, layer, x = nn.LayerNorm(4), nn.Linear(4, 6), torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(recomputed(x, layer, norm=norm), layer(norm(x)))


def test_a_dropout_that_drops_is_left_to_torch_and_one_that_does_not_is_left_out():
    layer, x = nn.Linear(4, 6), torch.randn(50, 4)
    torch.manual_seed(0)
    found = recomputed(x, layer, activation="gelu", dropout=nn.Dropout(0.5))
    torch.manual_seed(0)
    torch.testing.assert_close(found, layer(nn.Dropout(0.5)(nn.GELU()(x))))
    for idle in (nn.Dropout(0.0), nn.Dropout(0.5).eval()):
        assert (
            "Recomputed"
            in type(recomputed(x, layer, activation="gelu", dropout=idle).grad_fn).__name__
        )


def test_without_gradients_nothing_is_kept():
    norm, layer, x = chain("bn-conv2d")
    with torch.no_grad():
        assert recomputed(x, layer, norm=norm).grad_fn is None


def test_one_value_for_each_channel_is_refused_as_torch_refuses_it():
    norm, layer, _ = chain("bn-conv2d")
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        recomputed(
            torch.randn(1, 4, 1, 1, dtype=layer.weight.dtype), layer, norm=norm, activation="relu"
        )
    assert norm.running_var.isfinite().all()
