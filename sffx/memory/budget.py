"""The policy that cuts for a memory budget."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, UntypedStorage, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sffx.blocks import Block, Options
from sffx.compiler.analyse import Analysis
from sffx.compiler.examples import DATA_DEPENDENT, TRACE_BATCH
from sffx.compiler.facts import block_facts, facts
from sffx.compiler.fake import fake_copy
from sffx.compiler.partition import make_plan
from sffx.compiler.policies import check_positive, group_ends, layer
from sffx.compiler.rewrite import block_module, rewrite
from sffx.compiler.trace.costs import noting_saved
from sffx.compiler.trace.trace import Trace
from sffx.errors import CutError, InputError
from sffx.learning.heads import make_head, make_heads
from sffx.learning.norms import make_norms
from sffx.memory.footprint import COUNTER, STATES, UPDATE, fake_footprint
from sffx.tensors import storage_key

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}

Segment = tuple[int, int]


@dataclass(frozen=True)
class Memory:
    """A policy for a memory budget, made by `memory`.

    Attributes:
        allowed: bytes.
        batch_size: B.
        __name__: by which a plan calls it.
        options: that the model will be cut with, since heads and norms take memory as well.
        recompute: as for `transform`.
    """

    allowed: int
    batch_size: int
    __name__: str
    options: Options = field(default_factory=Options)
    recompute: bool = True

    def __call__(self, analysis: Analysis) -> list[str]:
        """Return the names of the nodes to cut after.

        Raises:
            CutError: no cuts stay within the budget; names the smallest peak that some would reach.
        """
        search = _Search(analysis, self.batch_size, self.options, self.recompute)
        found = search.coarsest(self.allowed)
        if found is None:
            least = search.smallest()
            raise CutError(
                f"no cuts keep a step with batch size {self.batch_size} within {_spell(self.allowed)}: the smallest achievable peak is "
                f"{_spell(least.peak)}, in {len(least.segments) - 1} feature block(s). Hint: pass a larger budget or a smaller batch size"
            )
        return [analysis.steps[end].node for _, end in found.segments[:-1]]


def memory(budget: str | int, batch_size: int) -> Memory:
    """Return the policy that makes the fewest blocks with which the predicted peak of a training step stays within a budget.

    The step is `local_loss(net, x, y).backward(); optimizer.step()` with AdamW (see `sffx.footprint`), with the heads and the `recompute`
    that `transform` is called with. The cuts are found by dynamic programming over the ends of BN groups and of layers; among plans of as
    few blocks, that of the least peak is chosen. All its blocks were counted on fake tensors; blocks that were not are ruled out by what
    they keep at least.

    Args:
        budget: "2 GiB", "500 MB", or a number of bytes.
        batch_size: B.

    Raises:
        InputError: the budget cannot be read, or the batch size is no positive integer.
        CutError: (by the policy) no cuts stay within the budget; names the smallest peak that some would reach.
    """
    check_positive("batch_size", batch_size)
    return Memory(_bytes_of(budget), batch_size, f"memory({budget}, {batch_size})")


@dataclass(frozen=True)
class _Path:
    """Blocks from the first step on. All sizes in bytes.

    Attributes:
        segments: for each block, the step before it and its last step.
        lasting: what is held all the time: parameters, the optimizer's state, the input batch.
        gradients: of the blocks so far.
        running: the peak so far, without what is lasting.
        largest: the largest parameter of the model and of the heads so far.
    """

    segments: tuple[Segment, ...]
    lasting: int
    gradients: int
    running: int
    largest: int

    @property
    def peak(self) -> int:
        """The peak of a step as far as it has come."""
        return self.lasting + self.running

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.lasting, self.gradients, self.running, self.largest


@dataclass(frozen=True)
class _Owned:
    """Tensors of the model or of a head.

    Attributes:
        everything: bytes of all.
        trainable: bytes of those that are trained.
        largest: bytes of the largest that is trained.
        count: the number of those that are trained.
    """

    everything: int
    trainable: int
    largest: int
    count: int

    @property
    def lasting(self) -> int:
        """Bytes with the optimizer's state."""
        return self.everything + STATES * self.trainable + COUNTER * self.count


class _Search:
    """Finds blocks by dynamic programming over the places where a cut may lie.

    A block's bytes while it runs are taken from a count where there is one, else from below: what its backward pass keeps. What is found
    with such bounds is counted and the search repeated, until all blocks of what is found were counted, as they are in it.
    """

    def __init__(
        self, analysis: Analysis, batch_size: int, options: Options, recompute: bool
    ) -> None:
        self.analysis, self.batch_size, self.options, self.recompute = (
            analysis,
            batch_size,
            options,
            recompute,
        )
        self.features = group_ends(analysis)
        self.ends = sorted(
            {
                *self.features,
                *(analysis.step_of[name] for name in layer(analysis)),
                len(analysis.steps) - 1,
            }
        )
        self.counted: dict[Segment, int] = {}
        self.heads = self._heads()
        self.bounds = dict(self._bounds())

    def coarsest(self, allowed: int) -> _Path | None:
        """Return the path of fewest blocks, and then of the least peak, that stays within what is allowed, if there is one."""
        return self._settled(allowed, lambda path: (len(path.segments), path.peak))

    def smallest(self) -> _Path:
        """Return the path of the least peak, and then of the fewest blocks."""
        found = self._settled(None, lambda path: (path.peak, len(path.segments)))
        assert found is not None  # without a limit there is always a path
        return found

    def _settled(
        self, allowed: int | None, rank: Callable[[_Path], tuple[int, int]]
    ) -> _Path | None:
        while True:
            paths = self._paths(allowed)
            if not paths:
                return None
            best = min(paths, key=rank)
            if all(segment in self.counted for segment in best.segments) and not self._raised(best):
                return best
            self._count(best)

    def _raised(self, path: _Path) -> bool:
        """Count all blocks of a path again, and say whether one of them takes more than it did in the path that it was counted in.

        Which blocks compute again what costs little is decided by what is the largest of a plan, so a block may keep more in another.
        """
        before = [self.counted[segment] for segment in path.segments]
        self._count(path, again=True)
        return before != [self.counted[segment] for segment in path.segments]

    def _paths(self, allowed: int | None) -> list[_Path]:
        """Return the paths to the logits that no other is better than."""
        last = self.ends[-1]
        paths: dict[int, list[_Path]] = {-1: [self._start()]}
        for end in self.ends:
            reached = [
                longer
                for start, bound in self.bounds[end]
                for path in paths.get(start, ())
                if allowed is None or path.lasting + path.gradients + bound <= allowed
                for longer in [self._extended(path, start, end, bound)]
                if allowed is None or longer.peak <= allowed
            ]
            paths[end] = _undominated(reached, by_length=allowed is not None)
        return paths[last]

    def _start(self) -> _Path:
        whole = _owned([tensor for tensors in self._tensors_by_step for tensor in tensors])
        return _Path((), whole.lasting + self._input_bytes(), 0, 0, whole.largest)

    def _extended(self, path: _Path, start: int, end: int, bound: int) -> _Path:
        """Return the path with one more block; the last one is followed by the optimizer's step."""
        head = self.heads.get(end, _owned([]))
        gradients = (
            path.gradients + self._trainable[end + 1] - self._trainable[start + 1] + head.trainable
        )
        largest = max(path.largest, head.largest)
        running = max(path.running, path.gradients + self.counted.get((start, end), bound))
        if end == self.ends[-1]:
            running = max(running, gradients + UPDATE * largest)
        return _Path(
            (*path.segments, (start, end)), path.lasting + head.lasting, gradients, running, largest
        )

    def _bounds(self) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """Yield, for each place, the places where a block that ends there may start, with the least bytes that it keeps."""
        steps, saved = self.analysis.steps, self._saved()
        for end in self.ends:
            found: list[tuple[int, int]] = []
            inside: dict[int, int] = {}
            weighted = False
            for i in range(end, -1, -1):
                inside.update(
                    {
                        key: size
                        for name in steps[i].nodes
                        for key, size in saved.get(name, {}).items()
                    }
                )
                weighted = weighted or steps[i].weighted
                misplaced = end == self.ends[-1] and i - 1 < self.features[-1]
                if weighted and not misplaced and (i == 0 or i - 1 in self.heads):
                    found.append((i - 1, sum(inside.values())))
            yield end, found

    def _saved(self) -> dict[str, dict[int, int]]:
        """Return what each node keeps for the backward pass when the whole model is one lean block: bytes by storage.

        Shorter blocks keep no less, since each has the same values to come back to, and a head besides.
        """
        trace, mode = self._fake_trace
        names = [name for name, node in self.analysis.nodes.items() if node.op != "placeholder"]
        inputs = [node for node in self.analysis.nodes.values() if node.op == "placeholder"]
        plan = make_plan(self.analysis, "memory", lambda analysis: analysis.candidates[-1:])
        whole = replace(
            plan.classifier, nodes=tuple(names), inputs=tuple(node.name for node in inputs)
        )
        block = block_module(
            trace,
            replace(plan, blocks=(), classifier=whole),
            whole,
            self.analysis.nodes,
            recompute=self.recompute,
        )
        with mode:
            x = [
                facts(node).example.new_empty((self.batch_size, *facts(node).example.shape[1:]))
                for node in inputs
            ]
            run = _SavedBytes(block.train(), [*x, *block.parameters(), *block.buffers()])
            with contextlib.suppress(
                *DATA_DEPENDENT
            ):  # without bounds; the count will say what is wrong
                run.run(*x)
        return run.saved

    @cached_property
    def _trainable(self) -> list[int]:
        """The bytes of trainable parameters before each step."""
        return [0, *accumulate(_owned(tensors).trainable for tensors in self._tensors_by_step)]

    @cached_property
    def _tensors_by_step(self) -> list[list[Tensor]]:
        """Parameters and buffers of each step, each with the step that has it first."""
        seen: set[int] = set()
        owned: list[list[Tensor]] = []
        for step in self.analysis.steps:
            tensors = {
                id(t): t
                for name in step.nodes
                for t in self.analysis.state(self.analysis.nodes[name]).values()
            }
            owned.append([t for key, t in tensors.items() if key not in seen])
            seen.update(tensors)
        return owned

    def _heads(self) -> dict[int, _Owned]:
        """Return what the head at each place owns.

        The heads are made for the smallest blocks, whose outputs are those of larger ones as well.
        """
        names = [self.analysis.steps[end].node for end in self.ends[:-1]]
        plan = make_plan(self.analysis, "memory", lambda _: names, options=self.options)
        return {
            end: self._head(block, plan.num_classes)
            for end, block in zip(self.ends[:-1], plan, strict=True)
        }

    def _head(self, block: Block, num_classes: int) -> _Owned:
        like = next(p for p in self.analysis.trace.root.parameters() if p.is_floating_point())
        # A callable may read values while it makes a head, and a tensor on "meta" has none.
        device = "cpu" if callable(self.options.goodness) else "meta"
        with torch.random.fork_rng(devices=[]), torch.device(device):
            head = make_head(self.options, block, num_classes)
        return _owned([*head.to(like.dtype).parameters(), *head.buffers()])

    def _input_bytes(self) -> int:
        inputs = [
            facts(node).example for node in self.analysis.nodes.values() if node.op == "placeholder"
        ]
        return self.batch_size * (8 + sum(value.nbytes // TRACE_BATCH for value in inputs))

    def _count(self, path: _Path, *, again: bool = False) -> None:
        """Count the blocks of a path that were not counted before, or all of them, of which the larger count is kept."""
        names = [self.analysis.steps[end].node for _, end in path.segments[:-1]]
        plan = make_plan(self.analysis, "memory", lambda _: names, options=self.options)
        with torch.random.fork_rng(devices=[]):
            heads = make_heads(plan, self.analysis.trace.root)
            norms = make_norms(plan, self.analysis.trace.root)
        trace, mode = self._fake_trace
        heads = list(fake_copy(nn.ModuleList(heads), mode))
        norms = [None if norm is None else fake_copy(norm, mode) for norm in norms]
        with mode:
            net = rewrite(trace, plan, heads, norms, recompute=self.recompute)
            net.plan = plan  # type: ignore[assignment]
            known = [
                i
                for i, segment in enumerate(path.segments)
                if segment in self.counted and not again
            ]
            found = fake_footprint(net.train(), self.batch_size, skip=known).running
        for segment, size in zip(path.segments, found, strict=True):
            self.counted[segment] = max(size, self.counted.get(segment, 0))

    @cached_property
    def _fake_trace(self) -> tuple[Trace, FakeTensorMode]:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        return replace(
            self.analysis.trace, root=fake_copy(self.analysis.trace.root, mode).train()
        ), mode


class _SavedBytes(fx.Interpreter):
    """Runs a block and notes what each node keeps for its backward pass.

    Attributes:
        saved: bytes by storage, by the node's origin; given tensors left aside.
    """

    def __init__(self, block: fx.GraphModule, given: list[Tensor]) -> None:
        super().__init__(block)
        self.saved: dict[str, dict[int, int]] = {}
        self._given = {storage_key(tensor) for tensor in given}
        self._alive: list[UntypedStorage] = []  # or the addresses of storages would be used again

    def run_node(self, n: fx.Node) -> Any:
        own = self.saved.setdefault(block_facts(n).origin or n.name, {})
        with (
            noting_saved(own, self._alive, lambda tensor: storage_key(tensor) in self._given),
            torch.enable_grad(),
        ):
            return super().run_node(n)


def _owned(tensors: list[Tensor]) -> _Owned:
    trainable = [t for t in tensors if t.requires_grad]
    sizes = [t.nbytes for t in trainable]
    return _Owned(sum(t.nbytes for t in tensors), sum(sizes), max(sizes, default=0), len(trainable))


def _undominated(paths: list[_Path], *, by_length: bool) -> list[_Path]:
    """Drop paths to a step to which another one, as short where that counts, holds no more in any respect."""
    kept_paths: list[_Path] = []
    size = lambda path: (len(path.segments) if by_length else 0, *path.sizes)  # noqa: E731
    for path in sorted(paths, key=size):
        own = size(path)
        if not any(
            all(a <= b for a, b in zip(size(other), own, strict=True)) for other in kept_paths
        ):
            kept_paths.append(path)
    return kept_paths


def _bytes_of(budget: str | int) -> int:
    """Read a number of bytes.

    Raises:
        InputError: it cannot be read, or is not positive.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?i?B)?\s*", str(budget), re.IGNORECASE)
    try:
        size = int(float(match[1]) * _UNITS[(match[2] or "B").upper()]) if match else 0
    except ValueError:
        size = 0
    if isinstance(budget, bool) or size < 1:
        raise InputError(
            f"the budget {budget!r} cannot be read. Hint: '2 GiB', '500 MB', or a number of bytes"
        )
    return size


def _spell(size: int) -> str:
    return next(
        f"{size / unit:.2f} {name}"
        for name, unit in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))
        if size >= unit
    )
