"""The options of an optimizer's parameter groups: kept for a later step, counted once a step."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sffx.tensors import differ

_ABSENT = object()  # in the place of an option that a group did not have


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
        # Whoever writes a tensor in place leaves the object as it is, but not its version.
        self._versions = _versions(self._originals)
        self._versions_of_copies = _versions(self.values)

    def changed_in(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return the earlier values of the options that have changed since; `_ABSENT` if new."""
        changed = {}
        for name, value in _without_parameters(group).items():
            if name not in self.values:
                changed[name] = _ABSENT
            elif self._has_changed(name, value):
                changed[name] = self.values[name]
        return changed

    def _has_changed(self, name: str, value: Any) -> bool:
        """Return whether an option is another one now, or was written to since."""
        is_other = differ(value, self._originals.get(name))
        return is_other or _versions_of(value) != self._versions.get(name, [])

    def give_back(self, group: dict[str, Any], present: dict[str, Any]) -> None:
        """Set the present options again, where the step was not the only one to change them."""
        for name, value in present.items():
            # The step ran with the values taken. It may have replaced one, or written to it.
            taken = self.values.get(name)
            is_replaced = group[name] is not taken
            is_written = _versions_of(taken) != self._versions_of_copies.get(name, [])
            step_changed = is_replaced or is_written
            if self._has_changed(name, value) or not step_changed:
                group[name] = value


class Counters:
    """What an optimizer counts in a parameter group that several blocks share.

    Adan and Lookahead count their steps there. In one training step they step on each of the
    blocks, which is still one step. So each block begins with the count that the first one found.
    """

    def __init__(self) -> None:
        # How often each block has stepped, by one of its parameters.
        self._rounds: dict[nn.Parameter, int] = {}
        # What a round began with, by the group and the round. Only what a step changes is kept.
        self._starts: dict[tuple[int, int], dict[str, Any]] = {}

    @contextmanager
    def counting_once(
        self, groups: Iterable[dict[str, Any]], block: nn.Parameter
    ) -> Iterator[None]:
        """Hold a context for the step on a block.

        Args:
            groups: that the block shares with others.
            block: a parameter of the block, always the same.
        """
        number = self._rounds.get(block, 0)
        self._rounds[block] = number + 1
        counted = []
        for group in groups:
            start = self._starts.setdefault((id(group), number), {})
            counted.append(_Counted(group, start))
        try:
            yield
        finally:
            for each in counted:
                each.end()


class _Counted:
    """One group, from the beginning to the end of a block's step.

    Args:
        group: begins with the values of `start`.
        start: what the first block's step of the same round began with, of what it changed.
    """

    def __init__(self, group: dict[str, Any], start: dict[str, Any]) -> None:
        self._group = group
        self._start = start
        self._present = {name: group[name] for name in start}
        for name, value in start.items():
            if value is _ABSENT:
                del group[name]
            else:
                group[name] = _copied(value)
        self._taken = _Taken(group)

    def end(self) -> None:
        """Keep what the first block has counted, and note what this one is the first to count."""
        for name, value in self._taken.changed_in(self._group).items():
            self._start.setdefault(name, value)
        self._group.update(self._present)


def _without_parameters(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _tensors_in(option: Any) -> list[Tensor]:
    """Return the tensors of an option, which may be one or a tuple with some, as betas are."""
    values = option if isinstance(option, (tuple, list)) else (option,)
    return [value for value in values if isinstance(value, Tensor)]


def _copied(option: Any) -> Any:
    return copy.deepcopy(option) if _tensors_in(option) else option


def _versions_of(option: Any) -> list[int]:
    """Return how often each tensor of an option was written to."""
    return [tensor._version for tensor in _tensors_in(option)]


def _versions(options: dict[str, Any]) -> dict[str, list[int]]:
    return {name: _versions_of(value) for name, value in options.items()}
