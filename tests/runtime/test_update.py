"""A step that comes later than its gradients has the options of its own moment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sffx.runtime.update import Updates


class Counting(torch.optim.SGD):
    """Counts in its groups, as schedule-free and learning-rate-free optimizers do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["sum"] += 1.0
        return super().step(closure)


def optimizer_of(weight: nn.Parameter, lr: Any) -> torch.optim.Optimizer:
    group = {"params": [weight], "count": 0, "sum": torch.zeros(())}
    return Counting([group], lr=lr, momentum=0.0)


def step_later(lr: Any, change: Any) -> tuple[Tensor, dict[str, Any]]:
    """Step on a weight of 1 and a gradient of 1 with options that have changed since."""
    weight = nn.Parameter(torch.ones(()))
    optimizer = optimizer_of(weight, lr)
    updates = Updates(optimizer)
    options = updates.options([weight])
    change(optimizer.param_groups[0])
    updates.apply({weight: torch.ones(())}, options)
    return weight.detach(), optimizer.param_groups[0]


def test_a_later_step_has_the_learning_rate_of_its_own_moment() -> None:
    def lower(group: dict[str, Any]) -> None:
        group["lr"] = 0.125

    weight, group = step_later(0.5, lower)
    assert weight == 0.5
    assert group["lr"] == 0.125


def test_a_learning_rate_that_is_a_tensor_may_be_written_in_place() -> None:
    rate = torch.tensor(0.5)
    weight, group = step_later(rate, lambda group: group["lr"].fill_(0.125))
    assert weight == 0.5
    assert group["lr"] is rate
    assert rate == 0.125


def test_what_the_step_itself_counts_in_its_group_stays() -> None:
    _, group = step_later(0.5, lambda group: group.update(lr=0.125))
    assert group["count"] == 1
    assert group["sum"] == 1.0


def test_an_option_that_was_set_since_wins_over_the_step() -> None:
    _, group = step_later(0.5, lambda group: group.update(count=7))
    assert group["count"] == 7


def test_an_error_in_the_step_leaves_the_present_options() -> None:
    weight = nn.Parameter(torch.ones(()))
    optimizer = optimizer_of(weight, 0.5)
    updates = Updates(optimizer)
    options = updates.options([weight])
    optimizer.param_groups[0]["lr"] = 0.125
    optimizer.param_groups[0]["sum"] = "no number"
    try:
        with options.in_force():
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert optimizer.param_groups[0]["sum"] == "no number"
