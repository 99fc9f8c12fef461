"""Let an optimizer step on the parameters of one block, and leave no trace of it."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sffx.runtime.gradients import Gradients


class Updates:
    """The steps of one optimizer on one block after the other.

    Args:
        optimizer: over the parameters of several blocks.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        # Looked up by parameter, so that a block does not go through the groups of all others.
        self._places: dict[nn.Parameter, int] = {}
        for place, group in enumerate(optimizer.param_groups):
            self._places.update(dict.fromkeys(group["params"], place))

    def options(self, parameters: Iterable[nn.Parameter]) -> Options:
        """Return the options of the groups of some parameters as they are now."""
        return Options(self._groups_of(parameters))

    def announce(self) -> None:
        """Let torch's schedulers take a step that comes later for done, or they would warn."""
        if hasattr(self._optimizer.step, "_wrapped_by_lr_sched"):
            self._optimizer._opt_called = True  # type: ignore[attr-defined]

    def apply(self, gradients: Gradients, options: Options | None = None) -> None:
        """Let the optimizer step on these parameters only, and leave none of their gradients.

        Args:
            gradients: by parameter.
            options: of an earlier moment, with which the optimizer steps; the present ones if None.
        """
        with nullcontext() if options is None else options.in_force():
            self._apply(gradients)

    def _apply(self, gradients: Gradients) -> None:
        groups = self._optimizer.param_groups
        own = self._groups_of(gradients)
        all_parameters = [group["params"] for group in own]
        # An interrupt may come in the middle of a restore, and would leave the optimizer with the
        # parameters of one block. The second restore then completes the first.
        try:
            try:
                _step_on(self._optimizer, own, gradients)
            finally:
                _restore(self._optimizer, groups, own, all_parameters, gradients)
        finally:
            _restore(self._optimizer, groups, own, all_parameters, gradients)

    def _groups_of(self, parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
        places = {self._places[p] for p in parameters if p in self._places}
        return [self._optimizer.param_groups[place] for place in sorted(places)]


class Options:
    """The options of some parameter groups at one moment: learning rates, weight decay, ...

    A scheduler may change them before the step that they are meant for.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self._groups = groups
        self._taken = [_Taken(group) for group in groups]

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Give the groups these options for a while.

        Afterwards they have their present ones again. But an option that nobody has changed in the
        meantime keeps what the optimizer's step made of it: some optimizers count in their groups.
        """
        present = [_without_parameters(group) for group in self._groups]
        for group, taken in zip(self._groups, self._taken, strict=True):
            group.update(taken.values)
        try:
            yield
        finally:
            for group, taken, now in zip(self._groups, self._taken, present, strict=True):
                taken.give_back(group, now)


class _Taken:
    """The options of one group at one moment.

    Attributes:
        values: by name, tensors as copies.
    """

    def __init__(self, group: dict[str, Any]) -> None:
        self._originals = _without_parameters(group)
        self.values = {name: _copied(value) for name, value in self._originals.items()}
        self._versions = _versions(self._originals)
        self._own_versions = _versions(self.values)

    def give_back(self, group: dict[str, Any], present: dict[str, Any]) -> None:
        """Set the present options again, where the step was not the only one to change them."""
        versions = _versions(present)
        own_versions = _versions(self.values)
        for name, value in present.items():
            was_changed = (
                _differ(value, self._originals.get(name)) or versions[name] != self._versions[name]
            )
            is_replaced = group[name] is not self.values.get(name)
            step_changed = is_replaced or own_versions[name] != self._own_versions[name]
            if was_changed or not step_changed:
                group[name] = value


def _without_parameters(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _tensors_in(option: Any) -> list[Tensor]:
    """Return the tensors of an option, which may be one or a tuple with some, as betas are."""
    values = option if isinstance(option, (tuple, list)) else (option,)
    return [value for value in values if isinstance(value, Tensor)]


def _copied(option: Any) -> Any:
    return copy.deepcopy(option) if _tensors_in(option) else option


def _versions(options: dict[str, Any]) -> dict[str, list[int]]:
    """Return how often each tensor of an option was written to, by the option's name.

    An option that is not there has none.
    """
    versions: dict[str, list[int]] = defaultdict(list)
    for name, value in options.items():
        versions[name] = [tensor._version for tensor in _tensors_in(value)]
    return versions


def _differ(one: Any, other: Any) -> bool:
    """Return whether two options differ. Tensors are compared as objects."""
    if one is other:
        return False
    if _tensors_in(one) or _tensors_in(other):
        return True
    return bool(one != other)


def _step_on(optimizer: Optimizer, own: list[dict[str, Any]], gradients: Gradients) -> None:
    """Step on the groups of a block, with all other parameters hidden from the optimizer."""
    for group in own:
        group["params"] = [p for p in group["params"] if p in gradients]
    optimizer.param_groups = own
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
        # Torch calls these hooks when a backward pass sets .grad. Here nothing else calls them.
        for hook in (parameter._post_accumulate_grad_hooks or {}).values():
            hook(parameter)
    optimizer.step()


def _restore(
    optimizer: Optimizer,
    groups: list[dict[str, Any]],
    own: list[dict[str, Any]],
    all_parameters: list[list[nn.Parameter]],
    gradients: Gradients,
) -> None:
    """Show the optimizer all its parameters again, without the gradients that it stepped on."""
    optimizer.param_groups = groups
    for group, parameters in zip(own, all_parameters, strict=True):
        group["params"] = parameters
    for parameter in gradients:
        parameter.grad = None
    # Autocast caches casts of the parameters as they were before the step.
    torch.clear_autocast_cache()
