"""Let an optimizer step on the parameters of one block, and leave no trace of it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sffx.errors import InputError, SffxError, failure_in_words
from sffx.runtime.gradients import Gradients
from sffx.runtime.options import Counters, Options


class Updates:
    """The steps of one optimizer on one block after the other.

    Args:
        optimizer: over the parameters of several blocks.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._holders = [_Holder(each) for each in _with_wrapped(optimizer)]
        self._counters = Counters()

    def options(self, parameters: Iterable[nn.Parameter]) -> Options:
        """Return the options of the groups of some parameters as they are now."""
        return Options(self._holders[0].groups_of(parameters))

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
        shown = [_Shown(holder, gradients) for holder in self._holders]
        # An optimizer and one that it wraps may have the same groups.
        shared = {id(group): group for each in shown for group in each.shared}
        # An interrupt may come in the middle of a restore, and would leave the optimizer with the
        # parameters of one block. The second restore then completes the first.
        try:
            try:
                with self._counters.counting_once(shared.values(), next(iter(gradients))):
                    _step_on(self._optimizer, shown, gradients)
            finally:
                _restore(shown, gradients)
        finally:
            _restore(shown, gradients)


def _with_wrapped(optimizer: Optimizer) -> list[Optimizer]:
    """Return an optimizer and those that it wraps, as Lookahead and SAM do."""
    found = [optimizer]
    for each in found:
        for value in vars(each).values():
            inner = value if isinstance(value, (list, tuple)) else [value]
            for one in inner:
                if isinstance(one, Optimizer) and all(one is not other for other in found):
                    found.append(one)
    return found


class _Holder:
    """An optimizer that holds parameters of several blocks."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        # Looked up by parameter, so that a block does not go through the groups of all others.
        self._places: dict[nn.Parameter, int] = {}
        for place, group in enumerate(optimizer.param_groups):
            self._places.update(dict.fromkeys(group["params"], place))

    def groups_of(self, parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
        """Return the groups that hold some parameters."""
        places = {self._places[p] for p in parameters if p in self._places}
        return [self.optimizer.param_groups[place] for place in sorted(places)]


class _Shown:
    """What an optimizer is shown while it steps on one block.

    Attributes:
        shared: the block's groups that hold parameters of other blocks as well.
    """

    def __init__(self, holder: _Holder, gradients: Gradients) -> None:
        self._optimizer = holder.optimizer
        self._groups = holder.optimizer.param_groups
        self._own = holder.groups_of(gradients)
        self._all_parameters = [group["params"] for group in self._own]
        self.shared = []
        for group in self._own:
            if any(p not in gradients for p in group["params"]):
                self.shared.append(group)

    def hide_others(self, gradients: Gradients) -> None:
        """Hide all parameters but those of the block."""
        for group in self._own:
            group["params"] = [p for p in group["params"] if p in gradients]
        self._set_groups(self._own)

    def restore(self) -> None:
        """Show the optimizer all its parameters again."""
        self._set_groups(self._groups)
        for group, parameters in zip(self._own, self._all_parameters, strict=True):
            group["params"] = parameters

    def _set_groups(self, groups: list[dict[str, Any]]) -> None:
        # Optimizers that join others only read the groups of those, which are set themselves.
        with suppress(AttributeError):
            self._optimizer.param_groups = groups


def _step_on(optimizer: Optimizer, shown: list[_Shown], gradients: Gradients) -> None:
    """Step on the groups of a block, with all other parameters hidden from the optimizer."""
    for each in shown:
        each.hide_others(gradients)
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
        # Torch calls these hooks when a backward pass sets .grad. Here nothing else calls them.
        for hook in (parameter._post_accumulate_grad_hooks or {}).values():
            hook(parameter)
    try:
        optimizer.step()
    except Exception as error:
        # Some raise for the missing argument, others an error of their own.
        if isinstance(error, SffxError) or "closure" not in str(error):
            raise
        raise InputError(
            f"{type(optimizer).__name__} computes the loss itself: {failure_in_words(error)}. "
            "Hint: sffx.local_loss in its closure"
        ) from error


def _restore(shown: list[_Shown], gradients: Gradients) -> None:
    """Show the optimizer all its parameters again, without the gradients that it stepped on."""
    for each in shown:
        each.restore()
    for parameter in gradients:
        parameter.grad = None
    # Autocast caches casts of the parameters as they were before the step.
    torch.clear_autocast_cache()
