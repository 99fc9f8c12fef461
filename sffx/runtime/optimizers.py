"""Parameter groups and learning rate plateaus for each block by itself (section 3 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Set
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from sffx.checks import is_number
from sffx.errors import InputError, shown
from sffx.parts import CLASSIFIER
from sffx.runtime.stage import Stage, stages_that_learn


def parameter_groups(
    net: fx.GraphModule, lr: float, classifier_lr: float | None = None
) -> list[dict[str, Any]]:
    """Return a parameter group for each block with trainable parameters, for any torch optimizer.

    A classifier that the objective leaves as it is, as `objective="ff"` does, has none.

    Args:
        net: what `transform` returned.
        lr: learning rate of the feature blocks and their heads.
        classifier_lr: learning rate of the classifier, `lr` where None.

    Returns:
        Groups with the keys "params", "lr" and "name". The name is the block's: "block_0", ...,
        "classifier".

    Raises:
        InputError: `net` is no cut model, or a learning rate is negative or no number.
    """
    return groups_of_stages(stages_that_learn(net), lr, classifier_lr)


def require_rate(name: str, rate: Any) -> None:
    """Raise an InputError if an argument is no learning rate, or no other factor like one."""
    # It may be a tensor of one number, as capturable optimizers take it.
    is_tensor = isinstance(rate, torch.Tensor) and rate.numel() == 1
    is_rate = (is_number(rate) or is_tensor) and 0 <= rate < math.inf
    if not is_rate:
        raise InputError(f"{name} is {shown(rate)}. Hint: pass a number that is not negative")


def groups_of_stages(
    stages: Iterable[Stage], lr: float, classifier_lr: float | None = None
) -> list[dict[str, Any]]:
    """Return a parameter group for each of some stages, as `parameter_groups` does for all."""
    if classifier_lr is None:
        classifier_lr = lr
    require_rate("lr", lr)
    require_rate("classifier_lr", classifier_lr)
    groups = []
    for stage in stages:
        parameters = stage.trainable
        if not parameters:
            continue
        rate = classifier_lr if stage.name == CLASSIFIER else lr
        groups.append({"params": parameters, "lr": rate, "name": stage.name})
    return groups


class BlockPlateau:
    """Lowers the learning rate of each block when its own validation loss stops improving.

    One of torch's `ReduceLROnPlateau` watches each name of the optimizer's groups. Several groups
    may have one name, such as a block's weights with and without weight decay.

    Args:
        optimizer: over `parameter_groups(net, ...)`.
        options: as `ReduceLROnPlateau` takes them (`factor`, `patience`, `threshold`, `min_lr`,
            ...).

    Raises:
        InputError: a group of the optimizer has no name, or an option cannot be used.
    """

    def __init__(self, optimizer: Optimizer, **options: Any) -> None:
        require_optimizer(optimizer)
        for i, group in enumerate(optimizer.param_groups):
            if "name" not in group:
                raise InputError(
                    f"parameter group {i} of the optimizer has no name. "
                    "Hint: make the groups by sffx.parameter_groups"
                )
        self.optimizer = optimizer
        self.schedulers: dict[str, ReduceLROnPlateau] = {}
        for name, groups in _by_name(optimizer).items():
            try:
                self.schedulers[name] = ReduceLROnPlateau(_view(groups), **options)
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"the options {options} cannot be used: {error}. "
                    "Hint: they are those of torch.optim.lr_scheduler.ReduceLROnPlateau"
                ) from error

    def step(self, losses: Mapping[str, float], blocks: Collection[str] | None = None) -> None:
        """Take the validation loss of each block by its name, as `Evaluation.loss` has it.

        Other names are passed over.

        Args:
            losses: by the names of the groups.
            blocks: names of the groups that take a step, all if None: those of the blocks that
                learnt, as `BlockSchedule.learning` returns them. The loss of a frozen block does
                not fall, which says nothing about its learning rate.

        Raises:
            InputError: the loss of a group that takes a step is missing.
        """
        if not isinstance(losses, Mapping):
            raise InputError(
                f"losses is of type {type(losses).__name__}, not a mapping of names. "
                "Hint: pass evaluate(...).loss"
            )
        stepping = [name for name in self.schedulers if blocks is None or name in blocks]
        missing = [name for name in stepping if name not in losses]
        if missing:
            raise InputError(
                f"losses lack {', '.join(map(repr, missing))}, got {', '.join(map(repr, losses))}. "
                "Hint: pass evaluate(...).loss"
            )
        for name, groups in _by_name(self.optimizer).items():
            if name not in stepping:
                continue
            scheduler = self.schedulers[name]
            # Loading a state dict into the optimizer replaces its groups.
            scheduler.optimizer.param_groups = groups
            scheduler.step(losses[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each block's scheduler by the block's name."""
        return {name: scheduler.state_dict() for name, scheduler in self.schedulers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            InputError: it is of other blocks.
        """
        if not isinstance(state, Mapping):
            raise InputError(
                f"the state is a {type(state).__name__}, not a mapping of names. "
                "Hint: pass what state_dict() returned"
            )
        if set(state) != set(self.schedulers):
            raise InputError(
                f"the state is of {', '.join(state)}, "
                f"but the optimizer has {', '.join(self.schedulers)}. "
                "Hint: load the state of a net with the same blocks"
            )
        for name, scheduler in self.schedulers.items():
            scheduler.load_state_dict(state[name])


def require_optimizer(optimizer: Any) -> None:
    """Raise an InputError if something is no optimizer. Wrappers of optimizers count as ones."""
    if isinstance(optimizer, type):
        raise InputError(
            f"optimizer is the class {optimizer.__name__}. "
            f"Hint: make one by {optimizer.__name__}(sffx.parameter_groups(net, lr))"
        )
    if not isinstance(getattr(optimizer, "param_groups", None), list):
        raise InputError(
            f"optimizer is a {type(optimizer).__name__}, not a torch optimizer. "
            "Hint: make one by torch.optim.AdamW(sffx.parameter_groups(net, lr))"
        )


def require_optimizers_of(net: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Raise an InputError if an optimizer holds none of the parameters of a net.

    Such an optimizer would train something else without a word.
    """
    own = set(net.parameters())
    for optimizer in optimizers:
        require_optimizer_of(optimizer, own, "sffx.parameter_groups(net, lr)")


def require_optimizer_of(optimizer: Optimizer, parameters: Set[nn.Parameter], groups: str) -> None:
    """Raise an InputError if an optimizer holds none of some parameters.

    Args:
        optimizer: to look at.
        parameters: of which it should have some.
        groups: the code that makes its groups, for the hint.
    """
    require_optimizer(optimizer)
    held: set[Tensor] = set()
    for group in optimizer.param_groups:
        held.update(group["params"])
    if held.isdisjoint(parameters):
        raise InputError(
            f"the optimizer holds {len(held)} parameters, none of them of net. "
            f"Hint: make it by {type(optimizer).__name__}({groups}), "
            "of this net and not of a copy or of the original model"
        )


def _by_name(optimizer: Optimizer) -> dict[str, list[dict[str, Any]]]:
    """Return the groups of an optimizer by their names."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for group in optimizer.param_groups:
        groups.setdefault(group["name"], []).append(group)
    return groups


def _view(groups: list[dict[str, Any]]) -> Optimizer:
    """Return an optimizer that has only these groups.

    A torch scheduler watches all groups of its optimizer, so each gets an optimizer of its own.
    """
    view = SGD([nn.Parameter(torch.zeros(()))], lr=groups[0]["lr"])
    view.param_groups = groups
    return view
