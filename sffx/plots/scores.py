"""Pictures of the scores of a cut model: its confusion matrix, and the goodness of the classes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from sffx.draw.render import PICTURES, check_path
from sffx.errors import InputError
from sffx.learning.readouts import readout_of
from sffx.net import cut_model, plan_of
from sffx.plots.figure import COLOURS, blank, plain, save
from sffx.runtime.evaluate import scored
from sffx.runtime.modes import evaluating
from sffx.tasks import Classification

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of the other classes of a sample at most so many count, evenly spaced, so that a thousand classes
# do not fill the memory.
OTHERS = 32

# Up to so many classes each has its name beside the matrix, or its share written in it.
NAMED = 40
WRITTEN = 12

# The shares of samples below the lower edge of the band, below the line, and below the upper edge.
QUANTILES = (0.1, 0.5, 0.9)


def plot_confusion(
    net: nn.Module,
    loader: Iterable[Any],
    path: str | os.PathLike[str],
    classes: Sequence[str] | None = None,
) -> Path:
    """Draw the confusion matrix of the ensemble.

    Each row is a true class, with the shares of its samples by predicted class.

    Args:
        net: what `sffx.transform` returned, also inside a wrapper such as `AveragedModel`. It is
            evaluated in eval mode, and its mode is as before afterwards.
        loader: yields (x, y), as for `sffx.evaluate`.
        path: of the file, .svg, .png or .pdf.
        classes: their names, in the order of the labels; None shows the numbers.

    Returns:
        The path of the file, which is replaced as a whole.

    Raises:
        InputError: `net` is no cut model, the loader yields no samples, or the number of names or
            the path cannot be used.
        MissingExtra: matplotlib is not installed.
    """
    path = check_path(path, PICTURES)
    net = cut_model(net)
    size = _num_classes(net)
    names = [str(label) for label in range(size)] if classes is None else _names(classes, size)
    side = min(12.0, 2.5 + 0.3 * size)
    # The longest name stands below the matrix and beside it.
    longest = 0.07 * max(map(len, names))
    figure = blank(side + 1 + longest, side + longest, "plotting a confusion matrix")
    shares = confusion(net, loader)
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    _name_classes(axes, names)
    if size <= WRITTEN:
        _write_shares(axes, shares)
    return save(figure, path)


def plot_goodness(net: nn.Module, loader: Iterable[Any], path: str | os.PathLike[str]) -> Path:
    """Draw the goodness of the true class and of the other classes, block by block.

    A line is the median, and the band around it holds the middle 80 %.

    Args:
        net: what `sffx.transform` returned, also inside a wrapper such as `AveragedModel`. It is
            evaluated in eval mode, and its mode is as before afterwards.
        loader: yields (x, y), as for `sffx.evaluate`.
        path: of the file, .svg, .png or .pdf.

    Returns:
        The path of the file, which is replaced as a whole.

    Raises:
        InputError: `net` is no cut model, the loader yields no samples, or the path cannot be used.
        MissingExtra: matplotlib is not installed.
    """
    path = check_path(path, PICTURES)
    net = cut_model(net)
    _num_classes(net)  # raises for another task
    blocks = len(plan_of(net))
    figure = blank(min(12.0, 3 + 0.45 * blocks), 4.2, "plotting goodness")
    # Behind `blank`, whose error names the extra that installs matplotlib.
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    true, others = goodnesses(net, loader)
    _draw_band(axes, true, "true class", COLOURS[0])
    _draw_band(axes, others, "other classes", COLOURS[1])
    axes.set_xlabel("block")
    axes.set_ylabel("goodness: median, middle 80 %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return save(figure, path)


@torch.no_grad()
def confusion(net: fx.GraphModule, loader: Iterable[Any]) -> Tensor:
    """Return the confusion matrix of the ensemble, (J, J).

    A row holds the shares of one true class; zeros if the class has no samples.
    """
    size = _num_classes(net)
    readout = readout_of(net)
    counts = torch.zeros(size * size, dtype=torch.float64)
    with evaluating(net):
        for scores, y in scored(net, loader):
            predicted = readout.read(scores, "ensemble").argmax(dim=1)
            # A number for each cell of the matrix, row by row.
            pairs = y * size + predicted
            counts += torch.bincount(pairs, minlength=size * size).cpu()
    counts = counts.reshape(size, size)
    # A class without samples is divided by 1, which leaves its zeros.
    samples = counts.sum(dim=1, keepdim=True).clamp(min=1)
    return counts / samples


@torch.no_grad()
def goodnesses(net: fx.GraphModule, loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Return the goodness of the true class (K, N), and that of other classes (K, N * others).

    K counts the feature blocks and N the samples.
    """
    size = _num_classes(net)
    # From the label of a sample to those of the other classes, around the end to the beginning.
    steps = torch.linspace(1, size - 1, min(OTHERS, size - 1)).long()
    true = []
    others = []
    with evaluating(net):
        for scores, y in scored(net, loader):
            # The last scores are the logits of the classifier, which are no goodness.
            goodness = scores[:-1].cpu()
            labels = y.cpu()[:, None]
            true.append(_of_classes(goodness, labels))
            others.append(_of_classes(goodness, (labels + steps) % size))
    return torch.cat(true, dim=1), torch.cat(others, dim=1)


def _of_classes(goodness: Tensor, classes: Tensor) -> Tensor:
    """Return the goodness (K, B, J) of some classes of each sample, (B, N), as (K, B * N)."""
    return goodness.gather(2, classes.expand(len(goodness), -1, -1)).flatten(1)


def _draw_band(axes: Axes, goodness: Tensor, label: str, colour: str) -> None:
    """Draw the quantiles of a goodness, (K, N), over the K blocks."""
    quantiles = torch.tensor(QUANTILES, dtype=goodness.dtype)
    low, median, high = torch.quantile(goodness, quantiles, dim=1).tolist()
    blocks = range(len(median))
    axes.fill_between(blocks, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(blocks, median, color=colour, marker="o", markersize=4, label=label)


def _names(classes: Any, size: int) -> list[str]:
    """Return the names of the classes.

    Raises:
        InputError: they are not in an order, or not as many as there are classes.
    """
    # A mapping or a set need not have the order of the labels, and a text is no list of names.
    has_order = not isinstance(classes, (str, bytes, Mapping, AbstractSet))
    try:
        names = list(map(str, classes)) if has_order else []
    except TypeError:  # it cannot be iterated over
        has_order = False
    if not has_order:
        raise InputError(
            f"classes is a {type(classes).__name__}, no list of names. "
            "Hint: one name for each label, in order"
        )
    if len(names) != size:
        raise InputError(
            f"classes has {len(names)} names, but the net tells {size} classes apart. "
            "Hint: one name for each label, in order"
        )
    return names


def _name_classes(axes: Axes, names: Sequence[str]) -> None:
    names = list(map(plain, names))
    step = math.ceil(len(names) / NAMED)
    places = range(0, len(names), step)
    axes.set_xticks(places, names[::step], rotation=90, fontsize=8)
    axes.set_yticks(places, names[::step], fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")


def _write_shares(axes: Axes, shares: Tensor) -> None:
    for true, predicted in shares.nonzero().tolist():
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


def _num_classes(net: fx.GraphModule) -> int:
    """Return J.

    Raises:
        InputError: the net does not tell classes of a sample apart.
    """
    plan = plan_of(net)
    if not isinstance(plan.task, Classification):
        raise InputError(
            f"this picture is of classes of a sample, but the net has the task {plan.task!r}. "
            "Hint: sffx.evaluate(net, loader).by_class has the metric of each class"
        )
    return plan.num_classes
