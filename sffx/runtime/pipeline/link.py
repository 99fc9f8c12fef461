"""The connection between two neighbouring stages: messages go one way, downstream.

Each message carries a word about the next one. So the receiver can post the receives of the next
message before it works on this one, and it knows when a batch has another size:

    opening word    NEW or END
    layout          only if the word before was NEW
    tensors
    word            about the next message: SAME layout, NEW layout, or END

Words and layouts go through a group on the CPU. On GPUs the receiver would wait for the device
otherwise.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sffx.errors import InputError
from sffx.runtime.groups import as_bytes
from sffx.runtime.pipeline.message import Layout, packed, read_layout
from sffx.runtime.pipeline.watch import Watch


class Word(IntEnum):
    """What is said about the next message."""

    END = 0
    SAME = 1
    NEW = 2


@dataclass(frozen=True)
class Groups:
    """The process groups of one link.

    Attributes:
        peer: rank of the process at the other end.
        control: for words and layouts, on the CPU.
        data: for tensors.
        device: of the tensors.
    """

    peer: int
    control: dist.ProcessGroup
    data: dist.ProcessGroup
    device: torch.device


class Outgoing:
    """Sends messages to the next stage, a few at a time.

    Args:
        groups: of the link.
        watch: waits for the next stage.
        depth: so many messages may be under way.
    """

    def __init__(self, groups: Groups, watch: Watch, depth: int) -> None:
        self._groups = groups
        self._watch = watch
        self._depth = depth
        # Of each message, the oldest first: what torch returned, and the tensors.
        self._under_way: deque[tuple[list[dist.Work], list[Tensor]]] = deque()
        # Of the last message, and what it has said about the next one.
        self._layout = b""
        self._promised = Word.END
        self.bytes_sent = 0

    def open(self, word: Word) -> None:
        """Begin a sequence of messages: NEW if there is one, END if there is none."""
        self._begin(1)
        self._send_control(_number(word))
        self._promised = word

    def send(self, message: Any, following: Word) -> None:
        """Send a message, a tree of tensors and other values, and go on.

        Args:
            message: to send. Its tensors must not change until it has arrived.
            following: the word about the next message.

        Raises:
            InputError: the message has another layout than the one before, but was promised to
                have the same.
            ProcessError: the next stage is gone.
        """
        self._begin(self._depth)
        ready = packed(message)
        if self._promised is Word.SAME and ready.layout != self._layout:
            raise InputError(
                "the shapes of what crosses this boundary depend on the values of a batch, and "
                "the receiver cannot know them. Hint: cuts=[...] puts the boundary elsewhere"
            )
        if self._promised is not Word.SAME:
            encoded = torch.frombuffer(bytearray(ready.layout), dtype=torch.uint8)
            self._send_control(_number(len(encoded)))
            self._send_control(encoded)
        for tensor in ready.tensors:
            if tensor.numel():
                self._send(as_bytes(tensor), self._groups.data)
        self._send_control(_number(following))
        self._layout = ready.layout
        self._promised = following

    def drain(self) -> None:
        """Wait until all messages have arrived."""
        while self._under_way:
            self._wait_for_oldest()

    def _begin(self, most: int) -> None:
        """Begin a message, and wait while as many as allowed are under way."""
        while len(self._under_way) >= most:
            self._wait_for_oldest()
        self._under_way.append(([], []))

    def _wait_for_oldest(self) -> None:
        works, _ = self._under_way.popleft()
        complete(works, self._groups, self._watch)

    def _send_control(self, tensor: Tensor) -> None:
        self._send(tensor, self._groups.control)

    def _send(self, tensor: Tensor, group: dist.ProcessGroup) -> None:
        works, tensors = self._under_way[-1]
        with self._watch.naming(self._groups.peer):
            work = dist.isend(tensor, self._groups.peer, group)
        assert work is not None  # this process is part of the group
        works.append(work)
        # Torch does not keep what is under way alive.
        tensors.append(tensor)
        self.bytes_sent += tensor.numel() * tensor.element_size()


class Incoming:
    """Receives the messages of the stage before, the next one while this one is worked on.

    Args:
        groups: of the link.
        watch: waits for the stage before.
    """

    def __init__(self, groups: Groups, watch: Watch) -> None:
        self._groups = groups
        self._watch = watch
        self._layout: Layout | None = None
        self._posted: _Posted | None = None

    def open(self) -> Word:
        """Return the word about the first message: NEW, or END if there is none."""
        word = _number()
        self._receive_now(word)
        return Word(int(word))

    def receive(self) -> tuple[Any, Word]:
        """Return the next message, and the word about the one after it.

        Raises:
            ProcessError: the stage before is gone.
        """
        posted = self._posted
        # A message of the same layout was posted when the word about it came.
        if posted is None:
            self._layout = self._new_layout()
            posted = self._post()
        assert self._layout is not None  # the first message has a new layout
        complete(posted.works, self._groups, self._watch)
        following = Word(int(posted.word))
        # Before this message is worked on, so that the next one arrives meanwhile.
        self._posted = self._post() if following is Word.SAME else None
        return self._layout.unpacked(posted.tensors), following

    def _new_layout(self) -> Layout:
        length = _number()
        self._receive_now(length)
        encoded = torch.empty(int(length), dtype=torch.uint8, device="cpu")
        self._receive_now(encoded)
        return read_layout(encoded.numpy().tobytes())

    def _post(self) -> _Posted:
        """Post the receives of a message of the present layout."""
        assert self._layout is not None
        tensors = self._layout.allocate(self._groups.device)
        word = _number()
        works = []
        for tensor in tensors:
            if tensor.numel():
                works.append(self._receive(as_bytes(tensor), self._groups.data))
        works.append(self._receive(word, self._groups.control))
        return _Posted(tensors, word, works)

    def _receive_now(self, tensor: Tensor) -> None:
        work = self._receive(tensor, self._groups.control)
        self._watch.wait([work], self._groups.peer)

    def _receive(self, tensor: Tensor, group: dist.ProcessGroup) -> dist.Work:
        with self._watch.naming(self._groups.peer):
            work = dist.irecv(tensor, self._groups.peer, group)
        assert work is not None  # this process is part of the group
        return work


def _number(value: int = 0) -> Tensor:
    """Return a word or a length as it is sent: on the CPU, whatever the default device is."""
    return torch.tensor([value], dtype=torch.int64, device="cpu")


@dataclass(frozen=True)
class _Posted:
    """A message whose receives are posted."""

    tensors: list[Tensor]
    word: Tensor
    works: list[dist.Work]


def complete(works: list[dist.Work], groups: Groups, watch: Watch) -> None:
    """Wait until all parts of a message are sent or have arrived.

    Args:
        works: of the message.
        groups: of the link.
        watch: waits.

    Raises:
        ProcessError: the process at the other end is gone.
    """
    if groups.device.type != "cuda":
        watch.wait(works, groups.peer)
        return
    # On a GPU, waiting orders streams and does not block the process. The event does, and bounds
    # how far the process runs ahead of its device.
    for work in works:
        work.wait()
    event = torch.cuda.current_stream(groups.device).record_event()
    watch.call(event.synchronize, groups.peer)
