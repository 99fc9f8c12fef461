"""Cached outputs of frozen blocks: a data set from which the later blocks learn."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.data import Dataset

from sffx.checks import positive_integer, require_flag
from sffx.errors import InputError, shown
from sffx.files import writing
from sffx.inputs import batch_size, batches, bind, split_batch, targets_of
from sffx.net import plan_of
from sffx.runtime.cut_values import (
    CutValues,
    nodes_at,
    require_by_sample,
    require_feature_block,
)
from sffx.runtime.find_residency import residency_of
from sffx.runtime.learn import require_train_mode
from sffx.runtime.stage import Stage
from sffx.runtime.views import training_input
from sffx.runtime.walk import run_frozen
from sffx.tables import in_mib

MOST_BYTES = 4 * 2**30
ALIGNMENT = 16  # bytes, the size of the largest dtype
TARGET = ""  # the name of y, which no node has


class CachedOutputs(Dataset[tuple[CutValues, Tensor]]):
    """What the first blocks of a net give for each sample of a data set, and the sample's target.

    `cache_outputs` makes it. A `DataLoader` over it yields pairs (x, y) for `local_loss`,
    `local_step` and `block_losses`.

    Attributes:
        after: name of the block behind which the values lie.
        path: of the file that holds them, None where they are in memory.
    """

    def __init__(self, after: str, rows: _Rows, path: Path | None) -> None:
        self.after = after
        self.path = path
        self._layout = rows.layout
        self._samples = rows.samples
        self._chunks = rows.chunks
        if path is not None:
            self._chunks = [self._mapped(path)]
        self._starts = _starts(self._chunks)

    @property
    def nbytes(self) -> int:
        """The bytes that the values and the targets take."""
        return self._samples * self._layout.size

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> tuple[CutValues, Tensor]:
        if not hasattr(index, "__index__"):
            raise InputError(
                f"the index is {shown(index)}, not that of a sample. "
                "Hint: torch.utils.data.Subset for several samples"
            )
        # A range reads negative indices, and raises an IndexError for those out of it.
        position = range(self._samples)[index]
        # The last chunk that begins at this sample or before it.
        chunk = bisect_right(self._starts, position) - 1
        row = self._chunks[chunk][position - self._starts[chunk]]
        # A copy, so that whoever writes into a sample does not write into the cache.
        values = self._layout.unpack(row.clone())
        y = values.pop(TARGET)
        return CutValues(values), y

    def _mapped(self, path: Path) -> Tensor:
        """Return the rows in a file, (N, bytes), which are read when they are used.

        Raises:
            InputError: the file is gone, or has another size.
        """
        size = path.stat().st_size if path.exists() else 0
        if size != self.nbytes:
            raise InputError(
                f"{path} has {size:,} bytes, and the values cached after {self.after} had "
                f"{self.nbytes:,}. Hint: cache_outputs writes the file anew; each cache that is "
                "in use needs a path of its own"
            )
        flat = torch.from_file(str(path), shared=False, size=self.nbytes, dtype=torch.uint8)
        return flat.reshape(self._samples, self._layout.size)

    def __getstate__(self) -> dict[str, Any]:
        # A worker process of a loader maps the file itself.
        state = dict(vars(self))
        if self.path is not None:
            state["_chunks"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.path is not None:
            self._chunks = [self._mapped(self.path)]

    def __repr__(self) -> str:
        place = "in memory" if self.path is None else f"in {self.path}"
        size = in_mib(self.nbytes)
        return f"CachedOutputs({self._samples} samples after {self.after}, {size} {place})"


@torch.no_grad()
def cache_outputs(
    net: fx.GraphModule,
    loader: Iterable[Any],
    after: str,
    *,
    path: str | os.PathLike[str] | None = None,
    max_bytes: int = MOST_BYTES,
    fixed_views: bool = False,
) -> CachedOutputs:
    """Return what the first blocks give for all samples of a loader, to train the later ones on.

    Blocks that are frozen for good, as `BlockSchedule.frozen` lists them, run once for each sample
    and not once in each step. They run in eval mode, as frozen blocks do in a step. So a step on
    cached values is the step on the input itself, to the bit where the layers compute a sample the
    same in any batch.

        cached = sffx.cache_outputs(net, loader, after="block_1")
        for x, y in DataLoader(cached, batch_size=128, shuffle=True):
            sffx.local_step(net, x, y, optimizer)  # block_2 and later learn

    The cache does not notice when the first blocks change later, and holds each sample as the
    loader gave it: random changes of images would be the same in each epoch. Leave them out, or
    cache several passes over the loader.

    Args:
        net: what `transform` returned, in train mode.
        loader: yields (x, y) for each sample once, in any order. Both are moved to the model's
            device, and the values come back to the CPU. It may go over `CachedOutputs` of an
            earlier block.
        after: name of the last block that is frozen: "block_1".
        path: of a file for the values, which is replaced. It is mapped into memory and read as
            samples are used. None keeps the values in memory.
        max_bytes: the most that the values and targets may take.
        fixed_views: whether an objective that makes views in each step, as "ff" does, makes them
            once here, with the same negatives in all epochs. Otherwise it is refused.

    Raises:
        InputError: `net` is no cut model, is in eval mode, or is offloaded, replicated or sharded;
            there is no such feature block; a value behind it has no batch axis; the objective makes
            views; the loader yields nothing or samples of several shapes; or the values take more
            than `max_bytes`.
    """
    plan_of(net)  # raises if it is no cut model
    require_train_mode(net)
    max_bytes = positive_integer("max_bytes", max_bytes)
    require_flag("fixed_views", fixed_views)
    last = require_feature_block(net, after)
    require_by_sample(net, last)
    _require_fixed_views(net, fixed_views)
    if path is None:
        rows = _Rows(after, max_bytes)
        _run(net, loader, last, rows)
        return CachedOutputs(after, rows, None)
    with writing(path) as draft, draft.open("wb") as file:
        rows = _Rows(after, max_bytes, file)
        _run(net, loader, last, rows)
    return CachedOutputs(after, rows, Path(path))


def _require_fixed_views(net: fx.GraphModule, fixed_views: bool) -> None:
    objective = plan_of(net).objective
    if objective.makes_views and not fixed_views:
        raise InputError(
            f"the objective {objective.name!r} makes new views of a batch in each step, which "
            "cached outputs do not have. Hint: fixed_views=True caches one set of views, or train "
            "without a cache"
        )


def _run(net: fx.GraphModule, loader: Iterable[Any], last: Stage, rows: _Rows) -> None:
    """Run the first blocks on all batches of a loader, and keep what they give."""
    device = residency_of(net).device
    for batch in batches(loader):
        x, y = _pair(batch, device)
        samples, y = _checked(net, x, y)
        if not samples:
            continue
        # The views of an objective; for others the input itself.
        x = training_input(net, x, y)
        values = run_frozen(net, x, last)
        kept: dict[str, Tensor] = {}
        for node in nodes_at(net, last):
            kept[node.name] = _by_sample(net, values[node], samples, node.name)
        rows.add({**kept, TARGET: y})
    if not rows.samples:
        raise InputError("the loader yielded no samples. Hint: pass data to cache")


def _pair(batch: Any, device: torch.device) -> tuple[Any, Tensor]:
    """Return x and y of what a loader yielded, on a device. Cached values stay `CutValues`."""
    moved, y = split_batch(batch, device)
    # `split_batch` has refused all but pairs. It makes a plain mapping of cached values.
    x = batch[0]
    if isinstance(x, CutValues):
        return x.to(device), y
    return moved, y


def _checked(net: fx.GraphModule, x: Any, y: Tensor) -> tuple[int, Tensor]:
    """Return the batch size, and the targets without padding."""
    plan = plan_of(net)
    if isinstance(x, CutValues):
        return x.samples, y
    samples = batch_size(bind(plan, x))
    plan.task.check_targets(y, samples, plan.num_classes)
    plan.objective.check_targets(y, samples, plan.num_classes)
    return samples, targets_of(plan, x, y)


def _by_sample(net: fx.GraphModule, value: Any, samples: int, name: str) -> Tensor:
    """Return a value of a batch with one row a sample, (B, ...) or (B, views, ...)."""
    has_views = plan_of(net).objective.makes_views
    rows = len(value) if isinstance(value, Tensor) and value.ndim else 0
    fits = rows % samples == 0 if has_views else rows == samples
    if not rows or not fits:
        raise InputError(
            f"{name}, which later blocks read, is a {type(value).__name__} that cannot be parted "
            f"among {samples} samples. Hint: cache after another block"
        )
    if not has_views:
        return value
    # Row v * B + n is view v of sample n, and the views of a sample go together.
    return value.unflatten(0, (rows // samples, samples)).movedim(0, 1)


@dataclass(frozen=True)
class _Field:
    """Where a tensor of one sample lies in a row of bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def stop(self) -> int:
        return self.start + prod(self.shape) * self.dtype.itemsize


class _Layout:
    """How the tensors of one sample lie in a row of bytes."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        fields: list[_Field] = []
        self.size = 0
        for name, tensor in tensors.items():
            field = _Field(name, tuple(tensor.shape[1:]), tensor.dtype, self.size)
            fields.append(field)
            # Rounded up: a dtype can be read only at an address that is a multiple of its size.
            self.size = -(-field.stop // ALIGNMENT) * ALIGNMENT
        self.fields = tuple(fields)

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the rows of a batch, (B, size) of uint8, on the CPU."""
        samples = len(tensors[TARGET])
        rows = torch.zeros(samples, self.size, dtype=torch.uint8, device="cpu")
        for field in self.fields:
            dense = tensors[field.name].cpu().contiguous()
            as_bytes = dense.reshape(samples, -1).view(torch.uint8)
            rows[:, field.start : field.stop] = as_bytes
        return rows

    def unpack(self, row: Tensor) -> dict[str, Tensor]:
        """Return the tensors of a sample, given its row, (size,)."""
        tensors: dict[str, Tensor] = {}
        for field in self.fields:
            part = row[field.start : field.stop]
            tensors[field.name] = part.view(field.dtype).reshape(field.shape)
        return tensors


class _Rows:
    """The rows of all batches so far: in memory, or written to a file.

    Args:
        after: name of the block, for messages.
        max_bytes: the most that all rows may take.
        file: open for bytes; None keeps the rows.
    """

    layout: _Layout

    def __init__(self, after: str, max_bytes: int, file: Any = None) -> None:
        self.after = after
        self.max_bytes = max_bytes
        self.file = file
        self.chunks: list[Tensor] = []
        self.samples = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add a batch, tensors (B, ...) by name.

        Raises:
            InputError: the shapes are not those of the first batch, or there is no room left.
        """
        layout = _Layout(tensors)
        # All rows have the layout of the first ones, or a sample could not be found by its index.
        if not self.samples:
            self.layout = layout
        for first, now in zip(self.layout.fields, layout.fields, strict=True):
            if first != now:
                raise InputError(
                    f"{now.name or 'y'} is {now.shape} of {now.dtype} in one sample and "
                    f"{first.shape} of {first.dtype} in another. "
                    "Hint: cache samples of one shape, or train without a cache"
                )
        self.samples += len(tensors[TARGET])
        if self.samples * layout.size > self.max_bytes:
            raise InputError(
                f"the values after {self.after} take more than max_bytes, "
                f"{in_mib(self.max_bytes)}, from sample {self.samples} on: {layout.size:,} bytes "
                "each. Hint: max_bytes=..., with path=... in a file, or cache after a later block"
            )
        rows = layout.pack(tensors)
        if self.file is None:
            self.chunks.append(rows)
        else:
            self.file.write(rows.numpy().data)


def _starts(chunks: Sequence[Tensor]) -> list[int]:
    """Return the index of the first sample of each chunk."""
    starts = []
    start = 0
    for chunk in chunks:
        starts.append(start)
        start += len(chunk)
    return starts
