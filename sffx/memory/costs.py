"""What the blocks of a model take in bytes, for the search that cuts for a memory budget.

A *place* is the index of a step that a cut may follow; -1 is the start of the model, and the last
place is the logits. A *span* is a block: the place before it, and the place where it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node

from sffx.blocks import Block, BlockPlan, Options
from sffx.compiler.analyse import Analysis
from sffx.compiler.facts import block_facts, facts
from sffx.compiler.fake import fake_copy
from sffx.compiler.inplace import keep_foreign_values
from sffx.compiler.memory import save_memory, save_memory_in
from sffx.compiler.partition import partition
from sffx.compiler.policies import Cuts
from sffx.compiler.rewrite import block_module, rewrite
from sffx.compiler.spans import group_ends, layer_ends
from sffx.compiler.trace.costs import noting_saved
from sffx.compiler.trace.randomness import generators_restored
from sffx.kernels.batch_slices import counting
from sffx.learning.heads import make_head, make_heads
from sffx.learning.norms import make_norms
from sffx.memory.footprint import COUNTER, STATES, fake_footprint
from sffx.memory.values import why_values_are_needed
from sffx.progress import Progress
from sffx.tensors import storage_key

Place = int
Span = tuple[Place, Place]

START: Place = -1


@dataclass(frozen=True)
class Owned:
    """The tensors of the model, of a part of it or of a head.

    Attributes:
        everything: bytes of all.
        trainable: bytes of those that are trained.
        largest: bytes of the largest that is trained.
        count: the number of those that are trained.
    """

    everything: int = 0
    trainable: int = 0
    largest: int = 0
    count: int = 0

    @property
    def lasting(self) -> int:
        """Bytes with the optimizer's state."""
        return self.everything + STATES * self.trainable + COUNTER * self.count


class BlockCosts:
    """The places of a model, and the bytes that each span takes.

    The bytes of a block while it runs are known once it was counted on fake tensors, as a block of
    a plan. Before that there is a lower bound, the bytes that its backward pass keeps at least.

    A block is counted in a plan, because the plan says whether it recomputes. So one span may take
    more in another plan than in the one where it was counted; the largest count is kept.

    Attributes:
        places: in order; the last one is the logits.
        bounds: for each place, the spans that end there, with their lower bounds.
        heads: what the head and the norms at each place own.
    """

    def __init__(self, analysis: Analysis, batch_size: int, options: Options) -> None:
        self.analysis = analysis
        self.batch_size = batch_size
        self.options = options
        features = group_ends(analysis)
        logits = len(analysis.steps) - 1
        self.places = sorted({*features, *layer_ends(analysis), logits})
        self.heads = self._heads()
        self.bounds: dict[Place, dict[Span, int]] = {}
        saved = self._saved_by_node()
        for place in self.places:
            # The classifier begins behind the last BN group, and no earlier.
            earliest = features[-1] if place == logits else START
            self.bounds[place] = self._bounds_to(place, earliest, saved)
        self._counted: dict[Span, int] = {}
        self._progress = Progress("memory of blocks counted")

    @cached_property
    def model(self) -> Owned:
        """All tensors of the model."""
        tensors: list[Tensor] = []
        for new in self._tensors_by_step:
            tensors += new
        return _owned(tensors)

    @cached_property
    def input_bytes(self) -> int:
        """The bytes of the input batch and its labels."""
        traced = self.analysis.trace.batch_size
        samples = [facts(node).example.nbytes // traced for node in self._placeholders]
        output = facts(self.analysis.nodes[self.analysis.logits]).example.shape
        targets = self.analysis.trace.task.example_targets((1, *output[1:]), "meta")
        return self.batch_size * (targets.nbytes + sum(samples))

    def running(self, span: Span) -> int:
        """Return the bytes that a block takes while it runs: its count, or its lower bound."""
        return self._counted.get(span, self.bounds[span[1]][span])

    def trainable(self, span: Span) -> int:
        """Return the bytes of a block's trainable parameters, without its head."""
        start, end = span
        return self._trainable_before[end + 1] - self._trainable_before[start + 1]

    def is_counted(self, span: Span) -> bool:
        """Return whether a block was counted."""
        return span in self._counted

    def count(self, spans: Sequence[Span], *, again: bool = False) -> None:
        """Count the blocks of a plan on fake tensors.

        Args:
            spans: all blocks of the plan, in order.
            again: whether to count those that were counted before.
        """
        known = []
        if not again:
            known = [i for i, span in enumerate(spans) if span in self._counted]
        cuts = [end for _, end in spans[:-1]]
        net = self._fake_net(cuts)
        with self._fake_mode:
            running = fake_footprint(net.train(), self.batch_size, skip=known).running
        for span, size in zip(spans, running, strict=True):
            self._counted[span] = max(size, self._counted.get(span, 0))
        self._progress.advance(len(spans) - len(known))

    def _bounds_to(
        self, end: Place, earliest: Place, saved: dict[str, dict[int, int]]
    ) -> dict[Span, int]:
        """Return the spans that end at a place, with the least bytes that they keep.

        Args:
            end: the place.
            earliest: the first place where they may start.
            saved: what each node keeps, by storage.
        """
        bounds: dict[Span, int] = {}
        kept: dict[int, int] = {}
        has_weight = False
        # The block grows backwards, one step at a time.
        for i in range(end, -1, -1):
            step = self.analysis.steps[i]
            for name in step.nodes:
                kept.update(saved.get(name, {}))
            has_weight = has_weight or step.weighted
            start = i - 1
            is_place = start == START or start in self.heads
            if has_weight and is_place and start >= earliest:
                span = (start, end)
                bounds[span] = sum(kept.values())
        return bounds

    def _saved_by_node(self) -> dict[str, dict[int, int]]:
        """Return what each node keeps for the backward pass, in bytes by storage.

        It is noted with the whole model as one memory-saving block. Shorter blocks keep no less:
        each has the same values to come back to, and a head besides.
        """
        block = self._whole_model()
        with self._fake_mode, counting():
            x = []
            for node in self._placeholders:
                example = facts(node).example
                shape = (self.batch_size, *example.shape[1:])
                x.append(example.new_empty(shape))
            given = [*x, *block.parameters(), *block.buffers()]
            run = _SavedBytes(block, given)
            try:
                run.run(*x)
            except (RuntimeError, NotImplementedError) as cause:
                # Where the model needs values there are no bounds; the count will report it.
                if not why_values_are_needed(cause):
                    raise
        return run.saved

    def _whole_model(self) -> GraphModule:
        """Return the whole model as one memory-saving block, on fake tensors."""
        # Any cut would do: of the plan, the classifier alone counts, whose output is the model's.
        last_cut = Cuts(self.analysis.candidates[-1:])
        plan = partition(self.analysis, last_cut, self.options)
        inputs = tuple(node.name for node in self._placeholders)
        nodes = []
        for name, node in self.analysis.nodes.items():
            if node.op != "placeholder":
                nodes.append(name)
        whole = replace(plan.classifier, nodes=tuple(nodes), inputs=inputs)
        module = block_module(self._fake_root, whole, self.analysis.nodes)
        save_memory_in(module, feeds_head=False, recompute=self.options.recompute)
        return module.train()

    @cached_property
    def _placeholders(self) -> list[Node]:
        return [node for node in self.analysis.nodes.values() if node.op == "placeholder"]

    @cached_property
    def _trainable_before(self) -> list[int]:
        """The bytes of trainable parameters before each step."""
        before = [0]
        for tensors in self._tensors_by_step:
            before.append(before[-1] + _owned(tensors).trainable)
        return before

    @cached_property
    def _tensors_by_step(self) -> list[list[Tensor]]:
        """Parameters and buffers of each step, each with the first step that has it."""
        seen: set[int] = set()
        by_step = []
        for step in self.analysis.steps:
            new: list[Tensor] = []
            for name in step.nodes:
                for tensor in self.analysis.state(self.analysis.nodes[name]).values():
                    if id(tensor) not in seen:
                        seen.add(id(tensor))
                        new.append(tensor)
            by_step.append(new)
        return by_step

    def _heads(self) -> dict[Place, Owned]:
        """Return what the head and the norms at each place own.

        They are made for the smallest blocks, whose outputs are those of larger ones as well.
        """
        places = self.places[:-1]
        plan = self._plan(places)
        with generators_restored():
            norms = make_norms(plan, self.analysis.trace.root)
        heads = {}
        for place, block, own_norms in zip(places, plan, norms, strict=True):
            tensors = self._head(block, plan)
            for norm in own_norms:
                if norm is not None:
                    tensors += [*norm.parameters(), *norm.buffers()]
            heads[place] = _owned(tensors)
        return heads

    def _head(self, block: Block, plan: BlockPlan) -> list[Tensor]:
        """Return the parameters and buffers of the head of a block."""
        parameters = self.analysis.trace.root.parameters()
        dtype = next(each.dtype for each in parameters if each.is_floating_point())
        # A callable may read values while it makes a head, and a tensor on "meta" has none.
        device = "cpu" if callable(self.options.goodness) else "meta"
        with generators_restored(), torch.device(device):
            head = make_head(self.options, block, plan.num_classes, plan.task)
        head.to(dtype)
        return [*head.parameters(), *head.buffers()]

    def _plan(self, places: Sequence[Place]) -> BlockPlan:
        cuts = tuple(self.analysis.steps[place].cut for place in places)
        return partition(self.analysis, Cuts(cuts), self.options)

    def _fake_net(self, places: Sequence[Place]) -> GraphModule:
        """Return the model, cut at some places, on fake tensors."""
        plan = self._plan(places)
        root = self.analysis.trace.root
        with generators_restored():
            heads = make_heads(plan, root)
            norms = make_norms(plan, root)
        # One copy of all heads, so that those that share a tensor still do.
        fake_heads = list(fake_copy(nn.ModuleList(heads), self._fake_mode))
        fake_norms: list[list[nn.Module | None]] = []
        for norms_of_block in norms:
            own: list[nn.Module | None] = []
            for norm in norms_of_block:
                own.append(None if norm is None else fake_copy(norm, self._fake_mode))
            fake_norms.append(own)
        trace = replace(self.analysis.trace, root=self._fake_root)
        with self._fake_mode:
            net = rewrite(trace, plan, fake_heads, fake_norms)
            keep_foreign_values(net)
            save_memory(net)
        return net

    @cached_property
    def _fake_mode(self) -> FakeTensorMode:
        return FakeTensorMode(allow_non_fake_inputs=True)

    @cached_property
    def _fake_root(self) -> nn.Module:
        return fake_copy(self.analysis.trace.root, self._fake_mode).train()


class _SavedBytes(Interpreter):
    """Runs a block and notes what each node keeps for its backward pass.

    Attributes:
        saved: bytes by storage, by the name of the traced node; the given tensors do not count.
    """

    def __init__(self, block: GraphModule, given: list[Tensor]) -> None:
        super().__init__(block)
        self.saved: dict[str, dict[int, int]] = {}
        self._given = {storage_key(tensor) for tensor in given}
        # The key of a storage is its address, which a later one may get unless this one is held.
        self._alive: list[UntypedStorage] = []

    def run_node(self, n: Node) -> Any:
        own = self.saved.setdefault(block_facts(n).origin or n.name, {})
        with noting_saved(own, self._alive, self._given), torch.enable_grad():
            return super().run_node(n)


def _owned(tensors: list[Tensor]) -> Owned:
    sizes = [t.nbytes for t in tensors if t.requires_grad]
    return Owned(
        everything=sum(t.nbytes for t in tensors),
        trainable=sum(sizes),
        largest=max(sizes, default=0),
        count=len(sizes),
    )
