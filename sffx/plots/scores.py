"""Pictures of what a cut net says of the samples: which classes it takes for which, and how goodness tells the true class from others."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from sffx.draw.render import PICTURES, check_path
from sffx.errors import InputError
from sffx.net import plan_of
from sffx.plots.results import COLOURS, blank, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of a sample's other classes at most so many are looked at, evenly spaced, so that a thousand classes do not fill the memory.
OTHERS = 32

# Up to so many classes every one has its name beside the matrix, and up to so many its share is written out.
NAMED = 40
WRITTEN = 12

# The shares of samples below the lower edge of the band, the line, and the upper edge.
QUANTILES = (0.1, 0.5, 0.9)


def plot_confusion(
    net: fx.GraphModule,
    loader: Iterable[Any],
    path: str | os.PathLike[str],
    classes: Sequence[str] | None = None,
) -> Path:
    """Draws the confusion matrix of the ensemble: a line for each true class, with the shares of its samples by predicted class.

    Args:
        net: what `sffx.transform` returned; it is evaluated in eval mode, and its mode is as before afterwards.
        loader: yields (x, y), as for `sffx.evaluate`.
        path: of the file, .svg, .png or .pdf.
        classes: their names, in the order of the labels; without them the numbers are shown.

    Returns:
        the path that was written; the file is replaced as a whole.

    Raises:
        InputError: `net` is no cut model, the loader yields no samples, or the number of names or the path cannot be used.
        MissingExtra: matplotlib is not installed.
    """
    path, size = check_path(path, PICTURES), plan_of(net).num_classes
    names = [str(label) for label in range(size)] if classes is None else list(classes)
    if len(names) != size:
        raise InputError(
            f"classes has {len(names)} names, but the net tells {size} classes apart. Hint: one name for each label, in order"
        )
    side = min(12.0, 2.5 + 0.3 * size)
    beside = 0.07 * max(map(len, names))  # inches of the longest name, below and beside the matrix
    figure = blank(side + 1 + beside, side + beside, "plotting a confusion matrix")
    shares = confusion(net, loader)
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    _label(axes, names)
    for true, predicted in [] if size > WRITTEN else shares.nonzero().tolist():
        share = float(shares[true, predicted])
        axes.text(
            predicted,
            true,
            f"{share:.0%}",
            ha="center",
            va="center",
            fontsize=7,
            color="white" if share > 0.5 else "black",
        )
    return save(figure, path)


def plot_goodness(net: fx.GraphModule, loader: Iterable[Any], path: str | os.PathLike[str]) -> Path:
    """Draws how the goodness of the true class and of the other classes lies, block by block: the median and the middle 80 % of it.

    Args:
        net: what `sffx.transform` returned; it is evaluated in eval mode, and its mode is as before afterwards.
        loader: yields (x, y), as for `sffx.evaluate`.
        path: of the file, .svg, .png or .pdf.

    Returns:
        the path that was written; the file is replaced as a whole.

    Raises:
        InputError: `net` is no cut model, the loader yields no samples, or the path cannot be used.
        MissingExtra: matplotlib is not installed.
    """
    path, blocks = check_path(path, PICTURES), len(plan_of(net))
    figure = blank(min(12.0, 3 + 0.45 * blocks), 4.2, "plotting goodness")
    from matplotlib.ticker import MaxNLocator  # after `blank`, which tells how to install it

    axes = figure.subplots()
    for goodness, label, colour in zip(
        goodnesses(net, loader), ("true class", "other classes"), COLOURS, strict=False
    ):
        low, median, high = torch.quantile(
            goodness, torch.tensor(QUANTILES, dtype=goodness.dtype), dim=1
        ).tolist()
        axes.fill_between(range(blocks), low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(range(blocks), median, color=colour, marker="o", markersize=4, label=label)
    axes.set_xlabel("block")
    axes.set_ylabel("goodness: median, middle 80 %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return save(figure, path)


@torch.no_grad()
def confusion(net: fx.GraphModule, loader: Iterable[Any]) -> Tensor:
    """Return the confusion matrix of the ensemble, (J, J): row by row the shares of a true class; zeros where it has no samples."""
    from sffx.runtime.evaluate import evaluating, scored

    size = plan_of(net).num_classes
    counts = torch.zeros(size * size, dtype=torch.float64)
    with evaluating(net):
        for scores, y in scored(net, loader):
            pairs = y * size + scores[:-1].mean(dim=0).argmax(dim=1)
            counts += torch.bincount(pairs, minlength=size * size).cpu()
    counts = counts.reshape(size, size)
    return counts / counts.sum(dim=1, keepdim=True).clamp(min=1)


@torch.no_grad()
def goodnesses(net: fx.GraphModule, loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Return the goodness of the true class, and that of other classes, each (blocks, samples or more), without the classifier's logits."""
    from sffx.runtime.evaluate import evaluating, scored

    size = plan_of(net).num_classes
    steps = torch.linspace(1, size - 1, min(OTHERS, size - 1)).long()
    true, others = [], []
    with evaluating(net):
        for scores, y in scored(net, loader):
            goodness, labels = scores[:-1].cpu(), y.cpu()
            true.append(_of(goodness, labels[:, None]))
            others.append(_of(goodness, (labels[:, None] + steps) % size))
    return torch.cat(true, dim=1), torch.cat(others, dim=1)


def _of(goodness: Tensor, classes: Tensor) -> Tensor:
    """Pick of each sample's goodness, (K, B, J), that of its classes, (B, N): (K, B * N)."""
    return goodness.gather(2, classes.expand(len(goodness), -1, -1)).flatten(1)


def _label(axes: Axes, names: Sequence[str]) -> None:
    step = -(-len(names) // NAMED)
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=90, fontsize=8)
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
