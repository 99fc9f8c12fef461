"""Labels of pixels at a lower resolution: the most frequent label in each pixel of a block."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sffx.kernels.batch_slices import joined, small_slices


def majority_labels(
    y: Tensor, size: tuple[int, ...], num_classes: int, ignore_index: int
) -> Tensor:
    """Return the most frequent label in each pixel of another size, (B, *size).

    A pixel i of `size` pixels covers those of y from `floor(i * old / size)` to
    `ceil((i + 1) * old / size)`, as in torch's adaptive pools. It is left out unless a class is
    more frequent in it than `ignore_index`. Of two classes that are as frequent, the first counts.

    Args:
        y: class indices, (B, H, W) or (B, D, H, W).
        size: without the batch.
        num_classes: J.
        ignore_index: the label of pixels that are left out.
    """
    if tuple(y.shape[1:]) == tuple(size):
        return y
    # Column 0 counts pixels that are left out, the last one what lies beside a window.
    columns = num_classes + 2
    windows = []
    for old, new in zip(y.shape[1:], size, strict=True):
        windows.append(_windows(old, new, y.device))
    cells = torch.Size(size).numel()
    slices = small_slices(y, cells * columns)
    count = partial(_majority_of_slice, windows=windows, columns=columns, ignore_index=ignore_index)
    return joined(y, slices, count)


def _majority_of_slice(y: Tensor, windows: list[Tensor], columns: int, ignore_index: int) -> Tensor:
    """Return the labels of a slice of a batch.

    Args:
        y: class indices, (B, ...).
        windows: for each axis of space, the indices that `_windows` returns.
        columns: of the table of counts.
        ignore_index: the label of pixels that are left out.
    """
    size = [len(window) for window in windows]
    in_columns = (y + 1).masked_fill(y == ignore_index, 0)
    beside = [0, 1] * len(size)
    padded = torch.nn.functional.pad(in_columns, beside, value=columns - 1)
    cells = len(y) * torch.Size(size).numel()
    # The pixels in the window of each cell, (B, H, h, W, w) with h x w pixels.
    shape = [len(y)]
    shape_of_cells = [len(y)]
    for axis, window in enumerate(windows, start=1):
        padded = padded.index_select(axis, window.flatten())
        shape += window.shape
        shape_of_cells += [len(window), 1]
    rows = torch.arange(0, cells * columns, columns, device=y.device).view(shape_of_cells)
    places = (padded.view(shape) + rows).flatten()
    counts = torch.zeros(cells * columns, dtype=torch.int32, device=y.device)
    counts.scatter_add_(0, places, counts.new_ones(()).expand_as(places))
    # `max` takes the first of equal counts, as argmax does, in less time.
    column = counts.view(cells, columns)[:, :-1].max(dim=1).indices
    labels = (column - 1).masked_fill(column == 0, ignore_index)
    return labels.view(len(y), *size)


def _windows(old: int, new: int, device: torch.device) -> Tensor:
    """Return the old indices in the window of each new one, (new, longest window).

    Shorter windows are filled with the index `old`, which is behind the last one.
    """
    index = torch.arange(new, device=device)
    starts = index * old // new
    # Rounded up.
    ends = ((index + 1) * old + new - 1) // new
    longest = max(-(-(i + 1) * old // new) - i * old // new for i in range(new))
    places = starts[:, None] + torch.arange(longest, device=device)
    return places.masked_fill(places >= ends[:, None], old)
