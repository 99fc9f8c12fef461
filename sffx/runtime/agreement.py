"""Processes tell each other what they are about to do, so that a difference is an error.

Without it, a process whose loader ends early would leave the others waiting, or its next sum over
the processes would meet another one of theirs.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sffx.errors import InputError, ProcessError, first_line
from sffx.runtime.groups import new_group

# What a process is about to do. Its number is sent, so the order must be the same everywhere.
ACTIONS = {
    "step": "trains step {count} by local_step",
    "loss": "trains step {count} by local_loss",
    "scores": "computes scores after step {count}",
    "evaluate": "evaluates after step {count}",
    "finish": "finishes after step {count}",
}

# How often a waiting process looks whether another one has failed.
_POLL = timedelta(seconds=1)
_FAILED = "failed"
_PLAN = "the plan"


@dataclass(frozen=True)
class Word:
    """What a process is about to do.

    Attributes:
        action: a key of `ACTIONS`.
        count: of its training steps so far, a beginning one included.
        detail: a checksum of all else that must be the same.
        loads: how often it has loaded a state dict.
    """

    action: str
    count: int
    detail: int = 0
    loads: int = 0

    def numbers(self) -> list[int]:
        """Return what is sent."""
        return [list(ACTIONS).index(self.action), self.count, self.detail, self.loads]

    def __str__(self) -> str:
        return ACTIONS[self.action].format(count=self.count)


class Agreement:
    """A group of processes of their own, in which each says what it is about to do.

    Attributes:
        group: has the backend gloo, so a word waits for no device.
        steps: the number of training steps so far, a present one included.
    """

    def __init__(self, ranks: list[int], timeout: timedelta) -> None:
        """Make the group. All processes must do so.

        Args:
            ranks: of the processes.
            timeout: how long a process waits for the others.
        """
        self.group = new_group(ranks, timeout)
        self.steps = 0
        self._words: list[Tensor] = []
        self._work: Any = None

    def start(self, word: Word) -> None:
        """Send a word, and begin to receive those of the others."""
        own = torch.tensor(word.numbers(), device="cpu")
        self._words = [torch.empty_like(own) for _ in range(self.group.size())]
        self._work = dist.all_gather(self._words, own, group=self.group, async_op=True)

    def require(self, word: Word) -> None:
        """Send a word, and wait until all processes have sent the same.

        Raises:
            ProcessError: a word differs, or another process failed.
        """
        self.start(word)
        self.reached(block=True)

    def reached(self, *, block: bool) -> bool:
        """Return whether all processes have sent the same word.

        Args:
            block: whether to wait for the others.

        Raises:
            ProcessError: a word differs, or another process failed.
        """
        if self._work is None:
            return True
        if not block and not self._work.is_completed():
            return False
        self.wait(self._work)
        self._work = None
        self._compare([each.tolist() for each in self._words])
        return True

    def wait(self, work: Any) -> None:
        """Wait for a collective of this group, or of another one with the backend gloo.

        Raises:
            ProcessError: another process failed, ended, or took too long.
        """
        while True:
            try:
                work.wait(timeout=_POLL)
                return
            except RuntimeError as error:
                self._raise_if_failed(error)
                # Only the poll's own timeout leaves a collective incomplete.
                if work.is_completed():
                    raise ProcessError(
                        "another process has ended, or took longer than the timeout: "
                        f"{first_line(error)}. Hint: the messages of the other processes "
                        "say why"
                    ) from error

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process has failed. They raise an error when they next wait."""
        text = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
        # The process that holds the store may be gone.
        with suppress(RuntimeError):
            store = self.group.get_group_store()
            if not store.check([_FAILED]):
                store.set(_FAILED, text)

    def _raise_if_failed(self, cause: BaseException) -> None:
        text = ""
        with suppress(RuntimeError):
            store = self.group.get_group_store()
            if store.check([_FAILED]):
                text = store.get(_FAILED).decode()
        if text:
            raise ProcessError(
                f"another process failed, {text} Hint: mend it there and start all processes anew"
            ) from cause

    def _compare(self, numbers: list[list[int]]) -> None:
        """Raise a ProcessError if the words of the processes differ."""
        if all(each == numbers[0] for each in numbers):
            return
        words = [Word(list(ACTIONS)[action], *others) for action, *others in numbers]
        said = [str(word) for word in words]
        hint = (
            "give all loaders as many batches (DistributedSampler, drop_last=True), and call the "
            "same functions of sffx in all processes"
        )
        if len(set(said)) == 1:
            said = [f"has loaded {word.loads} state dicts" for word in words]
            hint = "load the state dict in all processes"
        if len(set(said)) == 1:
            said = [f"{word} with layout {word.detail:x}" for word in words]
            hint = "the same blocks=..., modes and frozen parameters in all processes"
        ranks = dist.get_process_group_ranks(self.group)
        text = "; ".join(f"rank {rank} {each}" for rank, each in zip(ranks, said, strict=True))
        raise ProcessError(f"the processes do different things: {text}. Hint: {hint}")


def require_processes(group: dist.ProcessGroup | None) -> None:
    """Raise an InputError if processes cannot agree on anything.

    Args:
        group: of the processes, the default group if None.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise InputError(
            "there is no process group. Hint: start the processes by torchrun and call "
            "torch.distributed.init_process_group()"
        )
    if group is not None and not isinstance(group, dist.ProcessGroup):
        # What torch returns to a process that is not in a new group is no group either.
        raise InputError(
            f"group is a {type(group).__name__}, not a process group that this process is in. "
            "Hint: pass torch.distributed.group.WORLD for all processes"
        )


def require_same(
    own: Mapping[str, str], group: dist.ProcessGroup, problem: str | None = None
) -> None:
    """Raise an InputError in all processes if one has something else than the first one.

    Args:
        own: what this process has, by name.
        group: of the processes.
        problem: with what this process has, None without one. It is an error in all processes.
    """
    first: list[Any] = [dict(own)]
    dist.broadcast_object_list(first, group=group, group_src=0)
    if problem is None:
        problem = _first_difference(own, first[0])
    problems: list[Any] = [None] * group.size()
    dist.all_gather_object(problems, problem, group=group)
    for rank, found in zip(dist.get_process_group_ranks(group), problems, strict=True):
        if found is not None:
            raise InputError(f"rank {rank}: {found}")


def structure_of(net: nn.Module) -> dict[str, str]:
    """Return the shape, dtype and kind of each parameter and buffer of a net, by name."""
    structure = {_PLAN: str(getattr(net, "plan", ""))}
    for name, parameter in net.named_parameters():
        kind = "parameter" if parameter.requires_grad else "frozen parameter"
        structure[name] = f"{kind} {_layout(parameter)}"
    for name, buffer in net.named_buffers():
        structure[name] = f"buffer {_layout(buffer)}"
    return structure


def checksums_of(net: nn.Module) -> dict[str, str]:
    """Return a checksum of each parameter and buffer of a net, by name.

    Tensors on the meta device have no values.
    """
    checksums = {}
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if not tensor.is_meta:
            checksums[name] = f"values with checksum {checksum(tensor):x}"
    return checksums


def checksum(tensor: Tensor) -> int:
    """Return a checksum of a tensor's bytes."""
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(plain.view(torch.uint8).numpy().data)


def _layout(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _first_difference(own: Mapping[str, str], first: Mapping[str, str]) -> str | None:
    """Return what this process has otherwise than the first one, None if nothing."""
    hint = "Hint: cut the same model with the same options and weights in every process"
    for name in (*first, *own):
        here = own.get(name, "not there")
        there = first.get(name, "not there")
        if here == there:
            continue
        if name == _PLAN:
            return f"net has another plan than that of the first process. {hint}"
        return f"{name} is {here}, and in the first process {there}. {hint}"
    return None
