"""Tables and plots of what was recorded."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from sffx.files import write
from sffx.plots.figure import blank, save
from tools.reproduce.experiments import EXPERIMENTS

READOUTS = ("ensemble", "mean of softmax", "weighted", "last", "classifier", "all and classifier")
Records = dict[str, dict[str, list[dict[str, Any]]]]


def records(out: Path) -> Records:
    """Return the records below `out` by experiment and method, in the order in which both are defined."""
    found: Records = defaultdict(lambda: defaultdict(list))
    for path in sorted(out.glob("*/*.json")):
        record = json.loads(path.read_text())
        if "method" in record:
            found[record["experiment"]][record["method"]].append(record)
    return {
        name: {
            method: found[name][method] for method in experiment.methods if method in found[name]
        }
        for name, experiment in EXPERIMENTS.items()
        if name in found
    }


def spread(values: Iterable[float]) -> str:
    """Write the mean of shares and their standard deviation over seeds, in per cent."""
    values = [100 * value for value in values]
    return f"{fmean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def table(methods: dict[str, list[dict[str, Any]]], costs: dict[str, Any]) -> str:
    """Write one experiment: test accuracy of every readout in per cent over seeds, and what a step costs, where it was measured."""
    head = ["method", *READOUTS, "parameters", "peak / BP", "time / BP", "seeds", "epochs"]
    rows = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for method, runs in methods.items():
        tests = [run["test"] for run in runs]
        cells = [
            spread(test[name] for test in tests) if name in tests[0] else "–" for name in READOUTS
        ]
        cost = [f"{costs[method][key]:.2f}" if method in costs else "–" for key in ("peak", "time")]
        epochs = f"{min(run['epochs'] for run in runs)} to {max(run['epochs'] for run in runs)}"
        cells += [f"{runs[0]['parameters']:,}", *cost, str(len(runs)), epochs]
        rows.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(rows)


def description(name: str, methods: dict[str, list[dict[str, Any]]]) -> str:
    """Say how an experiment was run, as its records have it."""
    runs = [run for found in methods.values() for run in found]
    config, versions = runs[0]["config"], runs[-1]["versions"]
    samples = "all images" if config["samples"] is None else f"{config['samples']} images"
    settings = "; ".join(
        f"{method}: {setting['lr']:g}, {setting['classifier_lr']:g}, {setting['weight_decay']:g}"
        for method, setting in ((method, found[0]["setting"]) for method, found in methods.items())
    )
    momentum = "" if config["momentum"] is None else f", BN momentum {config['momentum']:g}"
    pretrained = f", from the weights of {config['pretrained']}" if config.get("pretrained") else ""
    return (
        f"{config['network']}, {config['data']}, {samples} (80/20 training and validation), {config['size']} x {config['size']}, policy "
        f"`{config['policy']}`, batch {config['batch']}, at most {config['epochs']} epochs (patience {config['patience']}, early stopping "
        f"after {config['stop']}){momentum}{pretrained}. Learning rates of features and classifier, and weight decay, of "
        f"{config['trials']} tried for {config['trial_epochs']} epochs"
        f"{'' if config['settings'] is None else ' in ' + config['settings']}: {settings}. "
        f"{versions['date']}, {versions['hardware']}, torch {versions['torch']}. "
        f"`python -m tools.reproduce {name}`"
    )


def plot(name: str, methods: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot test accuracy by block, and validation accuracy by epoch; the mean over seeds."""
    figure = blank(10, 3.6, "plotting experiments")
    blocks, curves = figure.subplots(1, 2)
    for i, (method, runs) in enumerate(methods.items()):
        *features, classifier = [
            100 * fmean(values) for values in zip(*(run["blocks"] for run in runs), strict=True)
        ]
        if features:
            blocks.plot(
                range(1, len(features) + 1), features, marker="o", color=f"C{i}", label=method
            )
            blocks.plot(
                len(features) + 1,
                classifier,
                marker="s",
                color=f"C{i}",
                label=f"{method}, classifier",
                linestyle="",
            )
        else:
            blocks.axhline(classifier, color=f"C{i}", linestyle="--", label=method)
        # As far as all seeds go, since a mean over fewer would jump where a seed ends.
        epochs = list(
            zip(*([epoch["validation"] for epoch in run["curve"]] for run in runs), strict=False)
        )
        curves.plot(
            range(1, len(epochs) + 1), [100 * fmean(e) for e in epochs], color=f"C{i}", label=method
        )
    blocks.xaxis.get_major_locator().set_params(integer=True)
    blocks.set(xlabel="block", ylabel="test accuracy, per cent", title=name)
    curves.set(xlabel="epoch", ylabel="validation accuracy, per cent")
    blocks.legend(fontsize=7)
    curves.legend(fontsize=7)
    save(figure, path)


def render(out: Path) -> None:
    """Write `tables.md` and a plot for each experiment from the records below `out`."""
    parts = [
        "# What was run",
        "",
        "Test accuracy in per cent, mean and standard deviation over seeds. Made by `python -m tools.reproduce --render`.",
    ]
    for name, methods in records(out).items():
        costs = out / name / "costs.json"
        found = json.loads(costs.read_text()) if costs.exists() else {}
        plot(name, methods, out / f"{name}.png")
        parts += [
            "",
            f"## {name}",
            "",
            table(methods, found),
            "",
            description(name, methods),
            "",
            f"![{name}]({name}.png)",
        ]
    out.mkdir(parents=True, exist_ok=True)
    write(out / "tables.md", ("\n".join(parts) + "\n").encode())
    print("\n".join(parts))
