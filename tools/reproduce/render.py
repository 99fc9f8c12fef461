"""Tables and plots of the records."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from sffx.files import write
from sffx.plots.figure import blank, save
from sffx.tables import MIB
from tools.reproduce import sweeps
from tools.reproduce.experiments import EXPERIMENTS, PUBLISHED, RECIPES, Experiment
from tools.reproduce.methods import METHODS

READOUTS = (
    "ensemble",
    "mean of softmax",
    "weighted",
    "last",
    "classifier",
    "all and classifier",
    "linear probe",
    "probe of the last",
)

# The fields of an experiment that an option of the command may replace.
OPTIONS = ("epochs", "trials", "trial_epochs", "precision")

# What a classifier that has not learnt says nothing of.
OF_CLASSIFIER = ("classifier", "all and classifier")

# The records of one experiment, by method.
Methods = dict[str, list[dict[str, Any]]]


def records(out: Path) -> dict[str, Methods]:
    """Return the records below `out` by experiment and method, in the order of the definitions."""
    by_experiment: dict[str, Methods] = {}
    for path in sorted(out.glob("*/*.json")):
        record = json.loads(path.read_text())
        if "method" in record:
            methods = by_experiment.setdefault(record["experiment"], {})
            methods.setdefault(record["method"], []).append(record)
    ordered = {}
    for name, experiment in EXPERIMENTS.items():
        methods = by_experiment.get(name, {})
        if methods:
            ordered[name] = {each: methods[each] for each in experiment.methods if each in methods}
    return ordered


def spread(values: Iterable[float]) -> str:
    """Return the mean of shares and their standard deviation over seeds, in per cent."""
    per_cent = [100 * value for value in values]
    if len(per_cent) == 1:
        return f"{per_cent[0]:.2f}"
    return f"{fmean(per_cent):.2f} ± {stdev(per_cent):.2f}"


def table(methods: Methods, costs: dict[str, Any]) -> str:
    """Return the table of one experiment.

    It has the test accuracy of every readout in per cent over seeds, and the cost of a step, where
    it was measured.
    """
    # Older measurements have no bytes.
    has_bytes = any("peak_bytes" in cost for cost in costs.values())
    titles = ["method", *READOUTS, "parameters", "peak / BP", "time / BP"]
    titles += [*(["peak, MiB"] if has_bytes else []), "seeds", "epochs"]
    rows = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for method, runs in methods.items():
        rows.append(_row(method, runs, costs.get(method, {}), has_bytes))
    return "\n".join(rows)


def _row(method: str, runs: list[dict[str, Any]], cost: dict[str, float], has_bytes: bool) -> str:
    cells = [method]
    untrained = () if METHODS[method].trains_classifier else OF_CLASSIFIER
    for readout in READOUTS:
        if readout in runs[0]["test"] and readout not in untrained:
            cells.append(spread(run["test"][readout] for run in runs))
        else:
            cells.append("–")
    cells.append(f"{runs[0]['parameters']:,}")
    for key in ("peak", "time"):
        cells.append(f"{cost[key]:.2f}" if key in cost else "–")
    if has_bytes:
        cells.append(f"{cost['peak_bytes'] / MIB:.0f}" if "peak_bytes" in cost else "–")
    epochs = [run["epochs"] for run in runs]
    cells += [str(len(runs)), f"{min(epochs)} to {max(epochs)}"]
    return f"| {' | '.join(cells)} |"


def gains(methods: Methods, costs: dict[str, Any], base: str = "mlp") -> str:
    """Return a table of what each method adds to the base.

    It has the gain of the ensemble in percentage points, the mean and standard deviation of the
    differences of equal seeds, and the cost of a step over that of the base. BP has no ensemble.
    """
    titles = ["method", f"gain over {base}", "seeds", f"peak / {base}", f"time / {base}"]
    rows = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    of_base = {run["seed"]: run["test"]["ensemble"] for run in methods[base]}
    for method, runs in methods.items():
        pairs = [run for run in runs if run["seed"] in of_base and "ensemble" in run["test"]]
        if method == base or not pairs:
            continue
        differences = spread(run["test"]["ensemble"] - of_base[run["seed"]] for run in pairs)
        cells = [method, differences, str(len(pairs))]
        for key in ("peak", "time"):
            known = method in costs and base in costs
            cells.append(f"{costs[method][key] / costs[base][key]:.2f}" if known else "–")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def description(name: str, methods: Methods) -> str:
    """Return how an experiment was run, by its records."""
    runs = [run for of_one_method in methods.values() for run in of_one_method]
    config = runs[0]["config"]
    versions = runs[-1]["versions"]
    samples = "all images" if config["samples"] is None else f"{config['samples']} images"
    size = f"{config['size']} x {config['size']}"
    patience = f"patience {config['patience']}, early stopping after {config['stop']}"
    momentum = ""
    if config["momentum"] is not None:
        momentum = f", BN momentum {config['momentum']:g}"
    pretrained = ""
    if config.get("pretrained"):
        pretrained = f", from the weights of {config['pretrained']}"
    searched_elsewhere = ""
    if config["settings"] is not None:
        searched_elsewhere = f" in {config['settings']}"
    trials = f"{config['trials']} tried for {config['trial_epochs']} epochs"
    held_out = config.get("held_out", 0.2)
    return (
        f"{config['network']}, {config['data']}, {samples} ({held_out:.0%} of them validate), "
        f"{size}, policy `{config['policy']}`, batch {config['batch']}"
        f"{reduced_precision(methods)}, "
        f"at most {config['epochs']} epochs ({patience}){momentum}{pretrained}. "
        "Learning rates of features and classifier, and weight decay, of "
        f"{trials}{searched_elsewhere}: {_settings(methods)}. "
        f"{versions['date']}, {versions['hardware']}, torch {versions['torch']}. "
        + commands(name, methods)
    )


def commands(name: str, methods: Methods) -> str:
    """Return the commands that make the records of an experiment, with the options they had."""
    by_options: dict[str, list[str]] = {}
    for method, runs in methods.items():
        by_options.setdefault(_options(name, runs[0]["config"]), []).append(method)
    lines = []
    for options, own in by_options.items():
        some = f" --methods {shlex.join(own)}" if len(by_options) > 1 else ""
        lines.append(f"`python -m tools.reproduce {name}{options}{some}`")
    return ", ".join(lines)


def _options(name: str, config: dict[str, Any]) -> str:
    """Return the options by which a record differs from the definition of its experiment."""
    given = ""
    for field in OPTIONS:
        value = config.get(field, getattr(Experiment, field, None))
        if value != getattr(EXPERIMENTS[name], field):
            given += f" --{field.replace('_', '-')} {value}"
    return given


def reduced_precision(methods: Methods) -> str:
    """Return words for a caption on the methods that trained in bfloat16, "" where none did."""
    reduced = []
    for method, runs in methods.items():
        if any(run["config"].get("precision") == "bfloat16" for run in runs):
            reduced.append(method)
    if not reduced:
        return ""
    return ", bfloat16" if len(reduced) == len(methods) else f", bfloat16 ({', '.join(reduced)})"


def _settings(methods: Methods) -> str:
    """Return the setting of each method that the search chose."""
    shown = []
    for method, runs in methods.items():
        setting = runs[0]["setting"]
        rates = f"{setting['lr']:g}, {setting['classifier_lr']:g}"
        strength = setting.get("strength")
        with_strength = "" if strength is None else f", strength {strength:g}"
        shown.append(f"{method}: {rates}, {setting['weight_decay']:g}{with_strength}")
    return "; ".join(shown)


def _published(name: str, methods: Methods) -> str:
    """Return a line on what was published, "" where there is nothing."""
    known = [f"{each}: {PUBLISHED[name, each]}" for each in methods if (name, each) in PUBLISHED]
    return f"Published: {'; '.join(known)}." if known else ""


def plot(name: str, methods: Methods, path: Path) -> None:
    """Plot test accuracy by block, and validation accuracy by epoch; the mean over seeds."""
    figure = blank(10, 3.6, "plotting experiments")
    blocks, curves = figure.subplots(1, 2)
    for i, (method, runs) in enumerate(methods.items()):
        _plot_blocks(blocks, runs, f"C{i}", METHODS[method].trains_classifier)
        # As far as all seeds go: a mean over fewer would jump where a seed ends.
        length = min(len(run["curve"]) for run in runs)
        validation = []
        for epoch in range(length):
            validation.append(100 * fmean(run["curve"][epoch]["validation"] for run in runs))
        curves.plot(range(1, length + 1), validation, color=f"C{i}", label=method)
    blocks.xaxis.get_major_locator().set_params(integer=True)
    blocks.set(xlabel="block, squares: classifier", ylabel="test accuracy, per cent", title=name)
    curves.set(xlabel="epoch", ylabel="validation accuracy, per cent")
    curves.legend(fontsize=7)  # for both, which share their colours
    save(figure, path)


def _plot_blocks(
    axes: Any, runs: list[dict[str, Any]], color: str, trains_classifier: bool
) -> None:
    """Plot the blocks as a line and the classifier as a square, or as a line without blocks.

    A classifier that does not learn is left out.
    """
    by_block = zip(*(run["blocks"] for run in runs), strict=True)
    *features, classifier = [100 * fmean(values) for values in by_block]
    if not features:
        axes.axhline(classifier, color=color, linestyle="--")
        return
    count = len(features)
    axes.plot(range(1, count + 1), features, marker="o", color=color)
    if trains_classifier:
        axes.plot(count + 1, classifier, marker="s", color=color, linestyle="")


def render(out: Path) -> None:
    """Write `tables.md` and a plot for each experiment from the records below `out`."""
    parts = [
        "# What was run",
        "",
        "Test accuracy in per cent, mean and standard deviation over seeds. "
        "Made by `python -m tools.reproduce --render`.",
    ]
    found = records(out)
    for name, methods in found.items():
        costs = _costs(name, out)
        plot(name, methods, out / f"{name}.png")
        parts += ["", f"## {name}", "", table(methods, costs)]
        if name in RECIPES and "mlp" in methods:
            parts += ["", gains(methods, costs)]
        published = _published(name, methods)
        if published:
            parts += ["", published]
        parts += ["", description(name, methods), "", f"![{name}]({name}.png)"]
    _plot_sweeps(found, out)
    page = "\n".join(parts) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    write(out / "tables.md", page.encode())
    print(page, end="")


def _costs(name: str, out: Path) -> dict[str, Any]:
    """Return the costs of an experiment by method, none where they were not measured."""
    path = out / name / "costs.json"
    costs: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return costs


def _plot_sweeps(found: dict[str, Methods], out: Path) -> None:
    """Plot each sweep of which two experiments or more were run."""
    for sweep, experiments in sweeps.SWEEPS.items():
        known = {}
        for count, name in experiments.items():
            if name in found:
                known[count] = (found[name], _costs(name, out))
        if len(known) > 1:
            sweeps.plot(sweep, known, out / f"{sweep}.png")
