"""`local_step` does what `local_loss` and one step of the optimizer do, whatever it counts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import sffx
from sffx.runtime.options import Counters
from tests.toys import kept

Groups = list[Any]


class Counting(SGD):
    """Keeps its number of steps in its groups, from the first step on, as Adan does."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            group["lr"] = 0.1 / group["steps"]
        return super().step(closure)


class CountingInPlace(SGD):
    """Keeps its number of steps as a tensor."""

    def __init__(self, groups: Groups, lr: float) -> None:
        super().__init__(groups, lr)
        for group in self.param_groups:
            group["steps"] = torch.zeros(())

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["steps"] += 1
            group["lr"] = 0.1 / float(group["steps"])
        return super().step(closure)


class Slow(Optimizer):
    """Wraps an optimizer, and goes half of the way back at every second step, as Lookahead does."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self.base = base
        self.param_groups = base.param_groups
        for group in base.param_groups:
            group["slow_steps"] = 0
            for p in group["params"]:
                self.state[p]["slow"] = p.detach().clone()

    def step(self, closure: Any = None) -> Any:
        self.base.step()
        for group in self.base.param_groups:
            group["slow_steps"] += 1
            if group["slow_steps"] % 2:
                continue
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["slow"].lerp_(p.detach(), 0.5)
                    p.data.copy_(self.state[p]["slow"])


class Joined(Optimizer):
    """Several optimizers as one, whose groups can only be read."""

    def __init__(self, parts: Iterable[Optimizer]) -> None:
        self.parts = list(parts)
        self.defaults: dict[str, Any] = {}

    @property
    def param_groups(self) -> Groups:  # type: ignore[override]
        return [group for each in self.parts for group in each.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for each in self.parts:
            each.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        for each in self.parts:
            each.step()


def joined(groups: Groups) -> Optimizer:
    parameters: list[nn.Parameter] = []
    for group in groups:
        parameters += group["params"] if isinstance(group, dict) else [group]
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    return Joined([Counting(matrices, 0.1), Adam(vectors, 0.01)])


OPTIMIZERS: dict[str, Callable[[Groups], Optimizer]] = {
    "counts": lambda groups: Counting(groups, lr=0.1),
    "counts in a tensor": lambda groups: CountingInPlace(groups, lr=0.1),
    "wraps": lambda groups: Slow(SGD(groups, lr=0.1, momentum=0.9)),
    "wraps one that counts": lambda groups: Slow(Counting(groups, lr=0.1)),
    "joins": joined,
}


@kept
def small_net() -> tuple[Any, Tensor, Tensor]:
    """Return a net of two blocks and a classifier, and a batch."""
    torch.manual_seed(0)
    layers = [nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)]
    x, y = torch.randn(8, 5), torch.arange(8) % 3
    return sffx.transform(nn.Sequential(*layers), "layer", x).train(), x, y


def one_group(net: nn.Module) -> Groups:
    return list(net.parameters())


def named_groups(net: Any) -> Groups:
    return sffx.parameter_groups(net, lr=0.1)


@pytest.mark.parametrize("groups", [one_group, named_groups])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_by_blocks_is_one_step_of_the_optimizer(kind: str, groups: Any) -> None:
    net, x, y = small_net()
    other = copy.deepcopy(net)
    by_blocks = OPTIMIZERS[kind](groups(net))
    at_once = OPTIMIZERS[kind](groups(other))
    for _ in range(4):
        sffx.local_step(net, x, y, by_blocks)
        at_once.zero_grad()
        sffx.local_loss(other, x, y).backward()
        at_once.step()
    torch.testing.assert_close(dict(net.named_parameters()), dict(other.named_parameters()))
    for own, wanted in zip(by_blocks.param_groups, at_once.param_groups, strict=True):
        assert len(own["params"]) == len(wanted["params"])
        for name in ("lr", "steps", "slow_steps"):
            assert own.get(name) == wanted.get(name)


def test_an_error_in_the_step_leaves_the_counts_and_the_parameters_in_the_groups() -> None:
    net, x, y = small_net()
    optimizer = Counting(one_group(net), lr=0.1)
    sffx.local_step(net, x, y, optimizer)
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    optimizer.register_step_post_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        sffx.local_step(net, x, y, optimizer)
    assert optimizer.param_groups[0]["steps"] == 2
    assert len(optimizer.param_groups[0]["params"]) == len(list(net.parameters()))


def test_only_what_is_counted_in_a_group_is_remembered() -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    group = {"params": [first, second], "lr": 0.1}
    counters = Counters()
    for _ in range(3):
        for block in (first, second):
            with counters.counting_once([group], block):
                pass
    assert not counters._starts
    with counters.counting_once([group], first):
        group["steps"] = 1
    assert len(counters._starts) == 1


class NeedsClosure(SGD):
    def step(self, closure: Any) -> Any:
        return super().step(closure)


class SharpnessAware(SGD):
    """Raises an error of its own, as SAM does."""

    def step(self, closure: Any = None) -> Any:
        assert closure is not None, "it requires closure"


@pytest.mark.parametrize("kind", [NeedsClosure, SharpnessAware])
def test_an_optimizer_that_needs_a_closure_is_refused_with_a_hint(kind: Any) -> None:
    net, x, y = small_net()
    optimizer = kind(net.parameters(), lr=0.1)
    with pytest.raises(sffx.InputError, match=r"Hint: sffx\.local_loss in its closure"):
        sffx.local_step(net, x, y, optimizer)
    assert len(optimizer.param_groups[0]["params"]) == len(list(net.parameters()))
