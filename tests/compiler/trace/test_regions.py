"""Context managers in a forward are kept, in the graph or in a leaf, or noted by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.errors import TraceError
from tests.compiler.trace.oracle import Applies, cut_without_norms, leaf_names
from tests.toys import around

Context = AbstractContextManager[Any]


@contextmanager
def _in_doubles() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _by_fewer_bits() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# What they change are values or gradients.
KEPT: dict[str, Callable[[], Context]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast off": lambda: torch.autocast("cpu", enabled=False),
    "autocast of a GPU off": lambda: torch.amp.autocast("cuda", enabled=False),
    "default dtype": _in_doubles,
    "device": lambda: torch.device("cpu"),
}

# How values are computed, or what autograd keeps of them. The names are those of the notes.
NOTED: dict[str, Callable[[], Context]] = {
    "sdpa_kernel": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    "cudnn.flags": lambda: torch.backends.cudnn.flags(enabled=False),
    "mkldnn.flags": lambda: torch.backends.mkldnn.flags(enabled=False),
    "set_float32_matmul_precision": _by_fewer_bits,
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "saved_tensors_hooks": lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor, lambda tensor: tensor
    ),
}


def _computed_in(context: Callable[[], Context]) -> Callable[[nn.Module, Tensor], Tensor]:
    def code(module: nn.Module, x: Tensor) -> Tensor:
        with context():
            y = module.inner(x.float()) + torch.zeros(len(x[0]))
        return x + y.clone().float()

    return code


@pytest.mark.parametrize("name", KEPT)
def test_a_region_that_changes_values_is_kept(name):
    model = around(Applies(_computed_in(KEPT[name]))).eval()
    net = cut_without_norms(model)
    assert sffx.check(model, net).difference is None
    x = torch.randn(4, 6)
    for outside in (torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        with outside:
            assert torch.equal(net.eval()(x), model.eval()(x))
    assert not any("left out, since a graph" in note for note in net.plan.notes)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("name", NOTED)
def test_a_region_that_changes_no_value_is_noted_by_name(name):
    model = around(Applies(_computed_in(NOTED[name])))
    net = cut_without_norms(model)
    assert not net.plan.leaves
    (note,) = [note for note in net.plan.notes if "a graph has no regions" in note]
    assert f"{name}." in note
    assert sffx.check(model, net).difference is None


def test_autocast_switched_off_in_the_models_own_forward_is_noted():
    code = _computed_in(KEPT["autocast off"])
    model = Applies(lambda m, x: m.layer(code(m, x)))
    model.layer = nn.Linear(6, 3)
    notes = sffx.plan(model, ["add_1"], torch.zeros(2, 6)).notes
    assert any("torch.autocast(enabled=False)" in note for note in notes)


def test_a_region_that_no_graph_holds_is_refused_where_the_model_itself_enters_it():
    with pytest.raises(TraceError, match=r"a region like torch\.autocast\(\).*Hint: move"):
        sffx.plan(Applies(_computed_in(KEPT["autocast"])), "layer", torch.zeros(2, 6))


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ("torch.is_grad_enabled()", lambda m, x: x * (2 if torch.is_grad_enabled() else 3)),
        (".requires_grad", lambda m, x: x * (2 if x.requires_grad else 3)),
        ("torch.is_autocast_enabled()", lambda m, x: x * (2 if torch.is_autocast_enabled() else 3)),
    ],
)
def test_what_a_forward_asks_of_torch_is_noted(asked, code):
    model = around(Applies(code))
    net = cut_without_norms(model)
    (note,) = [note for note in net.plan.notes if "the forward asks for" in note]
    assert asked in note
    assert sffx.check(model, net).difference is None


def test_what_torch_itself_asks_is_not_noted():
    model = around(Applies(lambda m, x: torch.no_grad()(torch.relu)(x)))
    assert not cut_without_norms(model).plan.notes


def _drawn_behind_a_seed(module: nn.Module, x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return module.inner(x + torch.rand_like(x))


def test_what_is_drawn_behind_a_seed_is_drawn_by_a_leaf():
    model = around(Applies(_drawn_behind_a_seed))
    net = cut_without_norms(model)
    assert len(leaf_names(net)) == 1
    assert sffx.check(model, net).difference is None


def test_gradients_that_a_forward_computes_are_computed_by_a_leaf():
    def code(module: nn.Module, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(module.inner(z).square().sum(), z)
        return x - gradient

    model = around(Applies(code))
    net = cut_without_norms(model)
    assert leaf_names(net) == ["2"]
    assert sffx.check(model, net).difference is None


@torch.no_grad()
def _by_multiplication(model: nn.Module) -> None:
    for slow, fast in zip(model.slow.parameters(), model.fast.parameters(), strict=True):
        slow.mul_(0.9).add_(fast, alpha=0.1)


def _by_copy(model: nn.Module) -> None:
    with torch.no_grad():
        for slow, fast in zip(model.slow.parameters(), model.fast.parameters(), strict=True):
            slow.copy_(0.9 * slow + fast * 0.1)


def _by_name(model: nn.Module) -> None:
    with torch.no_grad():
        fast = dict(model.fast.named_parameters())
        for name, slow in model.slow.named_parameters():
            slow.lerp_(fast[name], 0.1)


def _by_data(model: nn.Module) -> None:
    for slow, fast in zip(model.slow.parameters(), model.fast.parameters(), strict=True):
        slow.data.mul_(0.9).add_(fast.data, alpha=0.1)


def _by_attribute(model: nn.Module) -> None:
    with torch.no_grad():
        model.slow.weight.mul_(0.9).add_(model.fast.weight, alpha=0.1)


class _Averaged(nn.Module):
    """Has a frozen layer whose weights follow those of another one in train mode."""

    def __init__(self, follow: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self.follow = follow
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.fast, self.slow = nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if self.training:
            self.follow(self)
        return self.head(self.fast(x).relu() + self.slow(x).detach())


@pytest.mark.parametrize(
    "follow", [_by_multiplication, _by_copy, _by_name, _by_data, _by_attribute]
)
def test_weights_that_follow_others_without_gradients_stay_without_them(follow):
    model = _Averaged(follow)
    x = torch.randn(5, 6)
    net = cut_without_norms(model, example=x)
    for _ in range(3):
        assert torch.equal(net.train()(x)[-1], model.train()(x))
    slow = [each for name, each in net.named_parameters() if ".slow." in name]
    assert len(slow) == 2
    for own, expected in zip(slow, model.slow.parameters(), strict=True):
        assert own.is_leaf
        assert not own.requires_grad
        assert torch.equal(own, expected)
    sffx.local_loss(net, x, torch.arange(5) % 4).backward()
    idle = [name for name, each in net.named_parameters() if each.grad is None]
    assert all(".slow." in name for name in idle)
