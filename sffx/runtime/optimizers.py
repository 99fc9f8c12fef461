"""A parameter group for each block, and a reduce-on-plateau for each block by its own validation loss (section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from sffx.errors import InputError
from sffx.net import plan_of


def parameter_groups(
    net: fx.GraphModule, lr: float, classifier_lr: float | None = None
) -> list[dict[str, Any]]:
    """Return a parameter group for each block that has trainable parameters, for any torch optimizer.

    Args:
        net: what `transform` returned.
        lr: learning rate of the feature blocks and their heads.
        classifier_lr: learning rate of the classifier, `lr` where None.

    Returns:
        Groups with the keys "params", "lr" and "name", which is the block's target: "block_0", ..., "classifier".

    Raises:
        InputError: `net` is no cut model, or a learning rate is negative.
    """
    plan = plan_of(net)
    rates = {"lr": lr, "classifier_lr": lr if classifier_lr is None else classifier_lr}
    for name, rate in rates.items():
        if not rate >= 0:
            raise InputError(f"{name} is {rate}. Hint: learning rates are not negative")
    groups = [
        _group(net, block.target, (block.target, f"head_{i}"), lr) for i, block in enumerate(plan)
    ]
    groups.append(
        _group(net, plan.classifier.target, (plan.classifier.target,), rates["classifier_lr"])
    )
    return [group for group in groups if group["params"]]


def _group(net: fx.GraphModule, name: str, targets: tuple[str, ...], lr: float) -> dict[str, Any]:
    parameters = [
        p for target in targets for p in net.get_submodule(target).parameters() if p.requires_grad
    ]
    return {"params": parameters, "lr": lr, "name": name}


class BlockPlateau:
    """Lowers the learning rate of each block when the validation loss of that block has stopped improving.

    One of torch's `ReduceLROnPlateau` watches the groups of the optimizer that have one name, such as a block's group that was parted for
    the sake of weight decay.

    Args:
        optimizer: over `parameter_groups(net, ...)`.
        options: as `ReduceLROnPlateau` takes them (`factor`, `patience`, `threshold`, `min_lr`, ...).

    Raises:
        InputError: a group of the optimizer has no name.
    """

    def __init__(self, optimizer: Optimizer, **options: Any) -> None:
        unnamed = [i for i, group in enumerate(optimizer.param_groups) if "name" not in group]
        if unnamed:
            raise InputError(
                f"parameter group {unnamed[0]} of the optimizer has no name. Hint: make the groups by sffx.parameter_groups"
            )
        self.optimizer = optimizer
        self.schedulers = {
            name: ReduceLROnPlateau(_view(groups), **options)
            for name, groups in _by_name(optimizer).items()
        }

    def step(self, losses: Mapping[str, float]) -> None:
        """Take the validation loss of each block by its name, as `Evaluation.loss` has it; other names are passed over.

        Raises:
            InputError: the loss of a group is missing.
        """
        if not isinstance(losses, Mapping):
            raise InputError(
                f"losses is of type {type(losses).__name__}, not a mapping of names. Hint: pass evaluate(...).loss"
            )
        missing = [name for name in self.schedulers if name not in losses]
        if missing:
            raise InputError(
                f"losses lack {', '.join(map(repr, missing))}, got {', '.join(map(repr, losses))}. Hint: pass evaluate(...).loss"
            )
        for name, groups in _by_name(self.optimizer).items():
            scheduler = self.schedulers[name]
            scheduler.optimizer.param_groups = (
                groups  # loading a state dict into the optimizer makes new ones
            )
            scheduler.step(losses[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each block's scheduler by the block's name."""
        return {name: scheduler.state_dict() for name, scheduler in self.schedulers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            InputError: it is of other blocks.
        """
        if set(state) != set(self.schedulers):
            raise InputError(
                f"the state is of {', '.join(state)}, but the optimizer has {', '.join(self.schedulers)}"
            )
        for name, scheduler in self.schedulers.items():
            scheduler.load_state_dict(state[name])


def require_optimizer_of(net: nn.Module, optimizer: Optimizer) -> None:
    """Raise an InputError if an optimizer holds none of the parameters of a net: it would train something else, and not say so."""
    held = {p for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(net.parameters()):
        raise InputError(
            f"the optimizer holds {len(held)} parameters, none of them of net. Hint: make it by {type(optimizer).__name__}"
            "(sffx.parameter_groups(net, lr)), of this net and not of a copy or of the original model"
        )


def _by_name(optimizer: Optimizer) -> dict[str, list[dict[str, Any]]]:
    """Return the groups of an optimizer by their names."""
    found: dict[str, list[dict[str, Any]]] = {}
    for group in optimizer.param_groups:
        found.setdefault(group["name"], []).append(group)
    return found


def _view(groups: list[dict[str, Any]]) -> Optimizer:
    """Return an optimizer that has these groups alone, which is how a scheduler is made to watch some of them."""
    view = SGD([nn.Parameter(torch.zeros(()))], lr=groups[0]["lr"])
    view.param_groups = groups
    return view
