"""The batches of one process of a pipeline: where they come from, and what each stage does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from sffx.errors import InputError
from sffx.inputs import batch_size, batches, bind, split_batch, targets_of
from sffx.net import plan_of
from sffx.runtime.pipeline.link import Incoming, Outgoing, Word
from sffx.runtime.pipeline.message import packed
from sffx.runtime.pipeline.ranks import Ranks
from sffx.runtime.stage import Stage, Values, nodes_read_by, stages_of
from sffx.runtime.walk import input_values
from sffx.tensors import storage_key


@dataclass
class Batch:
    """A batch as a process sees it.

    Attributes:
        values: that the first stage of the process reads.
        y: targets.
        samples: B.
        scores: of the blocks before, (B, J) each. Only an evaluation hands them on.
        following: the word about the next batch.
    """

    values: Values
    y: Tensor
    samples: int
    scores: list[Tensor]
    following: Word


class FromLoader:
    """The batches of the first stage.

    It looks one batch ahead, since each message says what the next one will be like.

    Args:
        net: the cut model.
        loader: yields (x, y).
        device: of the stage.
        agree: called with whether there is a further batch, before each.
        check: called with the targets of each batch and the number of its samples.
    """

    def __init__(
        self,
        net: fx.GraphModule,
        loader: Iterable[Any],
        device: torch.device,
        agree: Callable[[bool], None],
        check: Callable[[Tensor, int], None],
    ) -> None:
        self._net = net
        self._device = device
        self._agree = agree
        self._check = check
        # Lazily: a batch is taken from the loader when its pair is asked for.
        self._pairs = map(self._taken, batches(loader))
        self._next = self._pulled()

    def open(self) -> Word:
        """Return whether there is a batch: NEW or END."""
        return Word.END if self._next is None else Word.NEW

    def __iter__(self) -> Iterator[Batch]:
        """Yield all batches."""
        while self._next is not None:
            present = self._next
            self._next = self._pulled()
            # The message of this batch says what the next one is like.
            yield self._batch(present, self._word(present, self._next))

    def _pulled(self) -> tuple[Any, Tensor] | None:
        pair = next(self._pairs, None)
        # In training, replicas wait for each other, so one must not end before the others.
        self._agree(pair is not None)
        return pair

    def _batch(self, pair: tuple[Any, Tensor], following: Word) -> Batch:
        x, y = pair
        plan = plan_of(self._net)
        inputs = bind(plan, x)
        samples = batch_size(inputs)
        self._check(y, samples)
        targets = targets_of(plan, x, y)
        return Batch(input_values(self._net, inputs), targets, samples, [], following)

    def _taken(self, batch: Any) -> tuple[Any, Tensor]:
        """Return x and y of what the loader yielded, on the device and in memory of their own.

        The next batch is read ahead, and a loader may write it over this one.
        """

        def own(tensor: Tensor) -> Tensor:
            moved = tensor.to(self._device)
            return moved.clone() if moved is tensor else moved

        pair: tuple[Any, Tensor] = tree_map_only(Tensor, own, split_batch(batch))
        return pair

    @staticmethod
    def _word(present: tuple[Any, Tensor], following: tuple[Any, Tensor] | None) -> Word:
        if following is None:
            return Word.END
        try:
            is_same = packed(present).layout == packed(following).layout
        except InputError:
            # A sparse input has no layout, and need not be sent: the first block may read it alone.
            return Word.NEW
        return Word.SAME if is_same else Word.NEW


class FromStageBefore:
    """The batches of every other stage.

    Args:
        net: the cut model.
        incoming: from the stage before.
    """

    def __init__(self, net: fx.GraphModule, incoming: Incoming) -> None:
        self._nodes = {node.name: node for node in net.graph.nodes}
        self._incoming = incoming
        self._word = incoming.open()

    def open(self) -> Word:
        """Return whether there is a batch: NEW or END."""
        return self._word

    def __iter__(self) -> Iterator[Batch]:
        """Yield all batches."""
        while self._word is not Word.END:
            # As `Handover.send` made it.
            message, self._word = self._incoming.receive()
            values: Values = {}
            for name, value in message["values"].items():
                values[self._nodes[name]] = value
            yield Batch(
                values=values,
                y=message["y"],
                samples=message["samples"],
                scores=message["scores"],
                following=self._word,
            )


class Epoch:
    """The batches of an epoch on one process: they come in, and their values go on.

    Args:
        net: the cut model.
        stages: of this process, those that run.
        ranks: the processes.
        depth: how many batches may be on the way to the next stage.
        loader: of the first stage, None elsewhere.
        check: called with the targets of each batch and the number of its samples, in the first
            stage.
        trains: whether replicas wait for each other at each step, so that all must have as many
            batches, and one at the least.
        sends: whether the stage behind this process, if there is one, runs as well.

    Attributes:
        stages: of this process, those that run.
        bytes_sent: to the next stage.

    Raises:
        InputError: there is no batch to train on. All stages know of the first one.
    """

    def __init__(
        self,
        net: fx.GraphModule,
        stages: list[Stage],
        ranks: Ranks,
        depth: int,
        loader: Iterable[Any] | None,
        check: Callable[[Tensor, int], None],
        *,
        trains: bool,
        sends: bool,
    ) -> None:
        self.stages = stages
        self._trains = trains
        upstream = ranks.connections.upstream
        downstream = ranks.connections.downstream if sends else None
        self._source: FromLoader | FromStageBefore
        if upstream is None:
            agree = ranks.require_as_many_batches if trains else _agree_with_nobody
            # Not `loader or ()`: an iterable dataset has no length, so asking is an error.
            given = () if loader is None else loader
            self._source = FromLoader(net, given, ranks.device, agree, check)
        else:
            self._source = FromStageBefore(net, Incoming(upstream, ranks.watch))
        self._outgoing: Outgoing | None = None
        self._handover: Handover | None = None
        if downstream is not None:
            self._outgoing = Outgoing(downstream, ranks.watch, depth)
            self._handover = Handover(net, stages, self._outgoing)
        self._open()

    @property
    def bytes_sent(self) -> int:
        return 0 if self._outgoing is None else self._outgoing.bytes_sent

    @property
    def hands_over(self) -> bool:
        """Whether a stage behind this process gets the batches."""
        return self._handover is not None

    def __iter__(self) -> Iterator[Batch]:
        """Yield all batches, and then wait until the next stage has all of them."""
        yield from self._source
        if self._outgoing is not None:
            self._outgoing.drain()

    def send(self, batch: Batch) -> None:
        """Send the values of a batch to the next stage, if there is one."""
        if self._handover is not None:
            self._handover.send(batch)

    def _open(self) -> None:
        word = self._source.open()
        if self._outgoing is not None:
            self._outgoing.open(word)
        if word is Word.END and self._trains:
            # The stages behind raise the same error, so the word must reach them.
            if self._outgoing is not None:
                self._outgoing.drain()
            raise InputError(
                "the loader yielded no batches. Hint: with drop_last=True, it needs a whole batch"
            )


def _agree_with_nobody(has_batch: bool) -> None:
    """Stand for the agreement of replicas where each evaluates for itself."""


class Handover:
    """Sends what the stages behind this process read.

    Args:
        net: the cut model.
        stages: of this process.
        outgoing: to the next stage.
    """

    def __init__(self, net: fx.GraphModule, stages: list[Stage], outgoing: Outgoing) -> None:
        self._outgoing = outgoing
        self._crossing = crossing(net, stages[-1].index + 1)
        # The memory of the own parameters and buffers. A block may return a view of one.
        self._own: set[int] = set()
        for stage in stages:
            for part in stage.parts:
                module = net.get_submodule(part)
                own = (*module.parameters(), *module.buffers())
                self._own.update(storage_key(tensor) for tensor in own)

    def send(self, batch: Batch) -> None:
        """Send the values that later stages read, with the targets of the batch."""
        crossing_values = {}
        for node in self._crossing:
            crossing_values[node.name] = tree_map_only(Tensor, self._safe, batch.values[node])
        message = {
            "values": crossing_values,
            "y": batch.y,
            "samples": batch.samples,
            "scores": batch.scores,
        }
        self._outgoing.send(message, batch.following)

    def _safe(self, tensor: Tensor) -> Tensor:
        """Return a tensor that the optimizer does not change while it is under way."""
        return tensor.clone() if storage_key(tensor) in self._own else tensor


def crossing(net: fx.GraphModule, first: int) -> list[fx.Node]:
    """Return the nodes before a stage whose values it or later stages read.

    Args:
        net: the cut model.
        first: index of the stage.
    """
    behind = [node for stage in stages_of(net)[first:] for node in stage.nodes]
    return nodes_read_by(behind)
