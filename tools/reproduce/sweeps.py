"""Accuracy, memory and time of one network over the number of its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from sffx.plots.figure import blank, save
from tools.reproduce.methods import METHODS

# By the name of a sweep, its experiments by the number of blocks. One block is the uncut network.
SWEEPS = {
    "depth": {1: "depth-1", 2: "depth-2", 4: "depth-4", 9: "depth-9"},
    "depth-full": {1: "depth-full-1", 2: "depth-full-2", 4: "depth-full-4", 9: "depth-full-9"},
    "depth-mobilenetv3": {
        1: "depth-mobilenetv3-1",
        4: "depth-mobilenetv3-4",
        13: "depth-mobilenetv3-13",
    },
}

# The records of one experiment, by method, and its costs, by method.
Methods = Mapping[str, list[dict[str, Any]]]
Costs = Mapping[str, Mapping[str, float]]


def plot(name: str, experiments: Mapping[int, tuple[Methods, Costs]], path: Path) -> None:
    """Plot test accuracy, peak memory and time of a step over the number of blocks.

    Accuracies are means over seeds, with their standard deviation. Memory and time are those of a
    step beside BP's.

    Args:
        name: of the sweep.
        experiments: the records and costs of each experiment, by its number of blocks.
        path: of the picture.
    """
    figure = blank(11, 3.6, "plotting a sweep")
    accuracy, peak, time = figure.subplots(1, 3)
    names = dict.fromkeys(each for methods, _ in experiments.values() for each in methods)
    for i, method in enumerate(names):
        color = f"C{i}"
        _plot_accuracy(accuracy, method, experiments, color)
        if METHODS[method].heads:
            _plot_cost(peak, method, "peak", experiments, color)
            _plot_cost(time, method, "time", experiments, color)
    for axes, what in ((peak, "peak memory"), (time, "time")):
        axes.axhline(1, color="grey", linestyle="--")
        axes.set(xlabel="blocks", ylabel=f"{what} of a step / BP's")
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    accuracy.set(xlabel="blocks", ylabel="test accuracy, per cent", title=name)
    for axes in (accuracy, peak, time):
        axes.set_xticks(list(experiments))
    # Below the axes, where it hides no line.
    lines, labels = accuracy.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(labels), fontsize=7)
    save(figure, path)


def accuracies(
    method: str, experiments: Mapping[int, tuple[Methods, Costs]]
) -> dict[int, tuple[float, float]]:
    """Return a method's test accuracy by the number of blocks, in per cent.

    It is the mean over seeds and their standard deviation, which is 0 for one seed.
    """
    readout = METHODS[method].readout
    found = {}
    for count, (methods, _) in experiments.items():
        values = [100 * run["test"][readout] for run in methods.get(method, [])]
        if values:
            found[count] = fmean(values), stdev(values) if len(values) > 1 else 0.0
    return found


def _plot_accuracy(
    axes: Any, method: str, experiments: Mapping[int, tuple[Methods, Costs]], color: str
) -> None:
    """Plot a line with a point for each number of blocks, or a level line for an uncut network."""
    found = accuracies(method, experiments)
    means = [mean for mean, _ in found.values()]
    deviations = [deviation for _, deviation in found.values()]
    if METHODS[method].heads:
        counts = list(found)
        axes.errorbar(counts, means, deviations, marker="o", capsize=3, color=color, label=method)
    else:
        axes.axhline(means[0], color=color, linestyle="--", label=method)


def _plot_cost(
    axes: Any,
    method: str,
    key: str,
    experiments: Mapping[int, tuple[Methods, Costs]],
    color: str,
) -> None:
    """Plot one kind of cost of a method over the number of blocks, where it was measured."""
    known = {}
    for count, (_, costs) in experiments.items():
        if method in costs:
            known[count] = costs[method][key]
    axes.plot(list(known), list(known.values()), marker="o", color=color)
