"""Random chains with writes in place: the memory-saving rewrites change no value and no gradient.

The oracle is plain autograd of the same blocks before the rewrites.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import sffx
from sffx.compiler.inplace import keep_foreign_values
from sffx.compiler.memory import save_memory
from sffx.errors import CutError
from tests.compiler.passes import rewritten

# For a longer search: SFFX_EXAMPLES=2000 python -m pytest tests/compiler/test_memory_properties.py
EXAMPLES = int(os.environ.get("SFFX_EXAMPLES", "10"))
BATCH = 4
WIDTH = 4

bounded = settings(
    max_examples=EXAMPLES,
    derandomize="SFFX_EXAMPLES" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

# Layers of values (B, 4, H, W).
IMAGE_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
    "pointwise conv": lambda: nn.Conv2d(WIDTH, WIDTH, 1, bias=False),
    "norm": lambda: nn.BatchNorm2d(WIDTH),
    "pool": lambda: nn.MaxPool2d(3, stride=1, padding=1),
}

# Layers of values (B, T, 4).
TOKEN_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "attention": lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True),
    # Memory-saving attention lays out its result in another order, so that other values drop.
    "dropout": lambda: nn.Dropout(0.0),
    "dropout in place": lambda: nn.Dropout(0.0, inplace=True),
}

# Layers of both.
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "gelu": nn.GELU,
    "silu in place": lambda: nn.SiLU(inplace=True),
    "hardswish": nn.Hardswish,
    "hardswish in place": lambda: nn.Hardswish(inplace=True),
    "dropout": lambda: nn.Dropout(0.3),
    "dropout in place": lambda: nn.Dropout(0.3, inplace=True),
    "dropout of nothing": lambda: nn.Dropout(0.0),
}

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "torch.relu": torch.relu,
    "relu_": lambda x: x.relu_(),
    "F.silu in place": lambda x: F.silu(x, inplace=True),
    "add_": lambda x: x.add_(0.3),
    "mul_": lambda x: x.mul_(0.7),
    "clamp_": lambda x: x.clamp_(max=1.0),
    "view": lambda x: x.view(x.shape),
}

IMAGE_NEIGHBOURS = [
    [("layer", "conv"), ("layer", "relu"), ("layer", "pool")],
    [("layer", "conv"), ("function", "F.relu in place"), ("layer", "pool")],
    [("layer", "norm"), ("layer", "relu in place"), ("layer", "conv")],
    [("layer", "conv"), ("layer", "hardswish in place"), ("layer", "pointwise conv")],
]
TOKEN_NEIGHBOURS = [
    [("layer", "norm"), ("layer", "attention")],
    [("branch", "attention")],
    [("layer", "linear"), ("layer", "gelu"), ("layer", "dropout"), ("layer", "linear")],
    [("layer", "norm"), ("function", "F.silu in place"), ("layer", "linear")],
]


class Steps(nn.Module):
    """Runs layers and functions in a row, with writes on the values of earlier steps.

    Args:
        code: pairs of a kind of step, and the name or the number that it needs.
        tokens: whether the values are (B, T, C), rather than (B, C, H, W).
    """

    def __init__(self, code: list[tuple[str, Any]], *, tokens: bool) -> None:
        super().__init__()
        self.code, self.tokens = code, tokens
        self.stem = nn.Linear(WIDTH, WIDTH) if tokens else nn.Conv2d(WIDTH, WIDTH, 1)
        self.last = nn.Linear(WIDTH, WIDTH) if tokens else nn.Conv2d(WIDTH, WIDTH, 1)
        own = TOKEN_LAYERS if tokens else IMAGE_LAYERS
        self.layers = nn.ModuleList()
        for kind, name in code:
            has_layer = kind in ("layer", "branch")
            self.layers.append({**LAYERS, **own}[name]() if has_layer else nn.Identity())
        self.shift, self.head = nn.Parameter(torch.randn(1)), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        earlier = [x]
        for (kind, name), layer in zip(self.code, self.layers, strict=True):
            x = self.step(kind, name, layer, x, earlier)
            earlier.append(x)
        x = self.last(x)
        return self.head(x.mean(1) if self.tokens else x.mean((2, 3)))

    def step(
        self, kind: str, name: Any, layer: nn.Module, x: Tensor, earlier: list[Tensor]
    ) -> Tensor:
        if kind == "layer":
            return run(layer, x)
        if kind == "function":
            return FUNCTIONS[name](x)
        if kind == "branch":  # what the layer reads is written after it
            x += run(layer, x)
        elif kind == "shift":
            x += self.shift
        elif kind == "sum in place":
            x += earlier[name % len(earlier)]
        else:  # a sum
            return x + earlier[name % len(earlier)]
        return x


def run(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, nn.MultiheadAttention):
        return layer(x, x, x, need_weights=False)[0]
    return layer(x)


@st.composite
def programs(draw: Any, *, tokens: bool) -> Steps:
    """Draw a chain of steps; about a third of them write in place."""
    own = list(TOKEN_LAYERS if tokens else IMAGE_LAYERS)
    layer = st.tuples(st.just("layer"), st.sampled_from([*own, *own, *LAYERS]))
    function = st.tuples(st.just("function"), st.sampled_from(list(FUNCTIONS)))
    shift = st.just(("shift", ""))
    join = st.tuples(st.sampled_from(["sum", "sum in place"]), st.integers(0, 5))
    branch = st.tuples(st.just("branch"), st.sampled_from(own))
    code = draw(st.lists(st.one_of(layer, layer, layer, function, shift, join, branch), max_size=5))
    # The neighbours that rewrites look for, which chance alone seldom brings together.
    known = TOKEN_NEIGHBOURS if tokens else IMAGE_NEIGHBOURS
    place = draw(st.integers(0, len(code)))
    code[place:place] = draw(st.sampled_from(known))
    return Steps([*code, draw(st.one_of(shift, join, function, layer))], tokens=tokens)


def learned(net: fx.GraphModule, loss: Callable[..., Tensor], x: Tensor) -> dict[str, Tensor]:
    """Return the loss and the gradients of a step."""
    torch.manual_seed(1)
    value = loss(net, x.clone(), torch.arange(BATCH) % 3)
    value.backward()
    gradients = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    return {"loss": value.detach(), **gradients}


def deferred(net: fx.GraphModule, x: Tensor, y: Tensor) -> Tensor:
    return sffx.sff_loss(net(x), y)


def assert_rewrites_change_nothing(model: nn.Module, x: Tensor, cut: str) -> None:
    """Compare the cut model before and after the rewrites, in a step of each kind."""
    model = model.double().train()
    try:
        before = rewritten(model, [cut], x)
        keep_foreign_values(before)
    except CutError as error:  # no cut can lie there, or a write cannot be replaced
        assume("no cut can lie" not in str(error) and "by another name" not in str(error))
        raise
    after = copy.deepcopy(before)
    save_memory(after)
    try:
        expected = learned(before, deferred, x)
    except RuntimeError:  # the model itself writes on what autograd keeps
        assume(False)
    for loss in (sffx.local_loss, deferred):
        seen = learned(copy.deepcopy(after), loss, x)
        assert seen.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(seen[name], value, rtol=1e-9, atol=1e-12, msg=name)


@bounded
@given(programs(tokens=False))
def test_images(model):
    assert_rewrites_change_nothing(model, torch.randn(BATCH, WIDTH, 9, 9).double(), "last")


@bounded
@given(programs(tokens=True))
def test_tokens(model):
    assert_rewrites_change_nothing(model, torch.randn(BATCH, 5, WIDTH).double(), "last")
