"""The options of an optimizer's parameter groups: kept for a later step, counted once a step."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn

from sffx.tensors import differ

# A parameter group of an optimizer: its parameters under "params", and options by name.
Group: TypeAlias = dict[str, Any]

_ABSENT = object()  # in the place of an option that a group did not have


class Options:
    """The options of some parameter groups at one moment: learning rates, weight decay, ...

    In a replica, a block's gradients travel while the others learn, and the step comes later. A
    scheduler may change the options in between, which then are meant for the next step.
    """

    def __init__(self, groups: list[Group]) -> None:
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

    def __init__(self, group: Group) -> None:
        # The objects in the group, to see whether one was replaced; and copies, since a tensor may
        # also be written to.
        self._originals = _without_parameters(group)
        self.values = {name: _copied(value) for name, value in self._originals.items()}
        # Whoever writes a tensor in place leaves the object as it is, but not its version.
        self._versions = _versions(self._originals)
        self._versions_of_copies = _versions(self.values)

    def changed_in(self, group: Group) -> dict[str, Any]:
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

    def give_back(self, group: Group, present: dict[str, Any]) -> None:
        """Set the present options again, where the step was not the only one to change them.

        Args:
            group: behind a step with the values taken.
            present: its options right before that step.
        """
        for name, value in present.items():
            others_changed = self._has_changed(name, value)
            only_the_step_changed = self._step_changed(name, group) and not others_changed
            if not only_the_step_changed:
                group[name] = value

    def _step_changed(self, name: str, group: Group) -> bool:
        """Return whether a step with the values taken has replaced an option, or written to it."""
        taken = self.values.get(name)
        is_replaced = group[name] is not taken
        is_written = _versions_of(taken) != self._versions_of_copies.get(name, [])
        return is_replaced or is_written


class Counters:
    """What an optimizer counts in a parameter group that several blocks share.

    Adan and Lookahead count their steps there. In one training step they step on each of the
    blocks, which is still one step. So each block begins with the count that the first one found.

    For example, a count of 4 becomes 5 at the first block. The second block begins with 4 again and
    makes 5 of it, and so do the others. Round 5 begins with 5.
    """

    def __init__(self) -> None:
        # How often each block has stepped, by one of its parameters. An epoch of a pipeline is many
        # rounds, and a block that had no gradients in one of them is behind the others.
        self._rounds: dict[nn.Parameter, int] = {}
        # What a round began with, by the group and the round. Only what a step changes is kept.
        self._starts: dict[tuple[int, int], dict[str, Any]] = {}

    @contextmanager
    def counting_once(self, groups: Iterable[Group], block: nn.Parameter) -> Iterator[None]:
        """Hold a context for the step on a block.

        Args:
            groups: that the block shares with others.
            block: a parameter of the block, always the same.
        """
        number = self._rounds.get(block, 0)
        self._rounds[block] = number + 1
        counted: dict[tuple[int, int], _Counted] = {}
        for group in groups:
            key = (id(group), number)
            counted[key] = _Counted(group, self._starts.get(key, {}))
        try:
            yield
        finally:
            for key, each in counted.items():
                each.end()
                # Most optimizers count nothing here, and would fill the memory with empty entries.
                if each.start:
                    self._starts[key] = each.start


class _Counted:
    """One group, from the beginning to the end of a block's step.

    Args:
        group: begins with the values of `start`.
        start: what the first block's step of the same round began with, of what it changed. It is
            empty before the step of the first block.

    Attributes:
        start: as above, with what this step has changed from its end on.
    """

    def __init__(self, group: Group, start: dict[str, Any]) -> None:
        self._group = group
        self.start = start
        # As the first block's step left it.
        self._counted = {name: group[name] for name in start}
        for name, value in start.items():
            if value is _ABSENT:
                del group[name]
            else:
                group[name] = _copied(value)
        self._taken = _Taken(group)

    def end(self) -> None:
        """Keep what the first block has counted, and note what this one is the first to count."""
        for name, value in self._taken.changed_in(self._group).items():
            self.start.setdefault(name, value)
        self._group.update(self._counted)


def _without_parameters(group: Group) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _tensors_in(option: Any) -> list[Tensor]:
    """Return the tensors of an option, which may be one or a tuple with some, as betas are."""
    values = option if isinstance(option, (tuple, list)) else (option,)
    return [value for value in values if isinstance(value, Tensor)]


def _copied(option: Any) -> Any:
    # What is no tensor is not written to, only replaced.
    return copy.deepcopy(option) if _tensors_in(option) else option


def _versions_of(option: Any) -> list[int]:
    """Return how often each tensor of an option was written to."""
    return [tensor._version for tensor in _tensors_in(option)]


def _versions(options: dict[str, Any]) -> dict[str, list[int]]:
    return {name: _versions_of(value) for name, value in options.items()}
