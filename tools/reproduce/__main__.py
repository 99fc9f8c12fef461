"""Run experiments of the paper: search, three seeds, tests; then render the tables.

    python -m tools.reproduce --data data table3-cifar10-cnnb
    python -m tools.reproduce --list
    python -m tools.reproduce --render

`--data` holds `cifar10/` and `imagenette/`, each with `train/` and `test/`, and in these a folder
for each class; and `MNIST/`, as torchvision lays it out. Checkpoints and searches go to `--runs`;
the same command goes on where it was interrupted. Results are gathered in `--out`. `--costs` wants
a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sffx.files import write
from tools.options import at_least
from tools.precision import PRECISIONS
from tools.reproduce import sameness
from tools.reproduce.costs import costs
from tools.reproduce.data import Images, Split, load, load_digits, load_mnist, load_pairs, split
from tools.reproduce.experiments import EXPERIMENTS, Experiment
from tools.reproduce.networks import torchvision_weights
from tools.reproduce.render import OPTIONS, render
from tools.reproduce.search import search
from tools.reproduce.training import Run, Setting
from tools.reproduce.versions import versions

# The fields of an experiment that an option may replace.
SHORTENING = {
    "epochs": "at most",
    "trials": "settings tried for each method",
    "trial_epochs": "of such a trial",
}


@dataclass(frozen=True)
class Folders:
    """Where data is read, where runs are kept, and where records go."""

    data: Path
    runs: Path
    out: Path

    def record(self, name: str, method: str, seed: int) -> Path:
        return self.out / name / f"{method.replace(' ', '-')}-{seed}.json"

    def checkpoint(self, name: str, method: str, seed: int) -> Path:
        return self.runs / name / f"{method.replace(' ', '-')}-{seed}.pt"


def images(experiment: Experiment, folders: Folders) -> tuple[Images, Images]:
    """Return the training and the test images of an experiment."""
    if experiment.data == "digits":
        return load_digits(experiment.size)
    if experiment.data == "mnist":
        return load_mnist(folders.data, experiment.size)
    if experiment.data == "mnist-pairs":
        return load_pairs(folders.data, experiment.size)
    source = folders.data / experiment.data
    cache = folders.runs / "images"
    train = load(source / "train", cache, experiment.size)
    test = load(source / "test", cache, experiment.size)
    return train, test


def run(
    name: str, experiment: Experiment, methods: Sequence[str], seeds: range, folders: Folders
) -> None:
    """Run an experiment to its end."""
    # Seeds outermost, so that all methods have a first result as early as possible.
    for seed in seeds:
        for method in methods:
            record = folders.record(name, method, seed)
            if record.exists():
                require_same(record, experiment)
            else:
                run_once(name, experiment, method, seed, folders)


def _split(experiment: Experiment, train: Images, test: Images, seed: int) -> Split:
    return split(train, test, experiment.samples, seed, experiment.held_out, experiment.scale)


def run_once(name: str, experiment: Experiment, method: str, seed: int, folders: Folders) -> None:
    """Train by one method from one seed, or go on with it, and write its record."""
    train, test = images(experiment, folders)
    setting = find_setting(name, experiment, method, folders)
    data = _split(experiment, train, test, seed)
    weights = starting_weights(experiment, folders)
    training = Run(experiment, method, setting, seed, data, weights)
    training.train(experiment.epochs, folders.checkpoint(name, method, seed))
    result = training.result()
    facts = {
        "experiment": name,
        "method": method,
        "config": asdict(experiment),
        "versions": versions(),
        **result,
    }
    record = folders.record(name, method, seed)
    record.parent.mkdir(parents=True, exist_ok=True)
    write(record, json.dumps(facts).encode())
    accuracies = ", ".join(f"{readout} {value:.2%}" for readout, value in result["test"].items())
    heading = f"{name}, {method}, seed {seed}, {result['epochs']} epochs, {setting}"
    print(f"{heading}: {accuracies}", flush=True)


def find_setting(name: str, experiment: Experiment, method: str, folders: Folders) -> Setting:
    """Return the setting of a method: a recipe, that of an earlier seed, or the result of a search.

    The search is the experiment's own, or that of the experiment whose settings it takes.
    """
    recipe = experiment.recipe(method)
    if recipe is not None:
        return Setting(recipe.lr, recipe.classifier_lr, recipe.weight_decay)
    found = _recorded_setting(name, experiment, method, folders)
    if found is not None:
        return found
    if experiment.settings is not None:
        name = experiment.settings
        experiment = replace(
            EXPERIMENTS[name],
            trials=experiment.trials,
            trial_epochs=experiment.trial_epochs,
            precision=experiment.precision,
        )
        # What was found in one precision serves the other, on a machine that is slow in the first.
        free = ("epochs", "precision")
        found = _recorded_setting(name, experiment, method, folders, leaving_out=free)
        if found is not None:
            return found
    train, test = images(experiment, folders)
    data = _split(experiment, train, test, 0)
    weights = starting_weights(experiment, folders)
    return search(name, experiment, method, data, folders.runs / name, weights)


def _recorded_setting(
    name: str,
    experiment: Experiment,
    method: str,
    folders: Folders,
    leaving_out: Sequence[str] = (),
) -> Setting | None:
    """Return the setting that the first seed of an experiment was run with, if it was."""
    record = folders.record(name, method, 0)
    if not record.exists():
        return None
    return Setting(**require_same(record, experiment, leaving_out)["setting"])


def starting_weights(experiment: Experiment, folders: Folders) -> dict[str, torch.Tensor] | None:
    """Return the weights that the experiment starts from, None for those drawn at random.

    Where another experiment makes them, its run is first brought to its end.
    """
    name = experiment.pretrained
    if name is None:
        return None
    if name == "torchvision":
        return torchvision_weights(experiment.network)
    record = folders.record(name, "BP", 0)
    checkpoint = folders.checkpoint(name, "BP", 0)
    if record.exists():
        require_same(record, EXPERIMENTS[name])
    if not (record.exists() and checkpoint.exists()):
        run_once(name, EXPERIMENTS[name], "BP", 0, folders)
    return torch.load(checkpoint, weights_only=False)["best"]["state"]


def require_same(
    record: Path, experiment: Experiment, leaving_out: Sequence[str] = ()
) -> dict[str, Any]:
    """Return a record, which must be of the experiment as it is asked for.

    Raises:
        SystemExit: it is not; names the differences.
    """
    found: dict[str, Any] = json.loads(record.read_text())
    sameness.require_same(record, found["config"], found["method"], experiment, leaving_out)
    return found


def write_costs(name: str, experiment: Experiment, folders: Folders) -> None:
    record = folders.out / name / "costs.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    strengths = {}
    for method in experiment.methods:
        searched = folders.record(name, method, 0)
        if searched.exists():
            strengths[method] = json.loads(searched.read_text())["setting"].get("strength")
    # Of methods that are not measured now, older measurements stay. Each is beside a BP of its run.
    older: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    measured = {**older, **costs(experiment, strengths), "versions": versions()}
    write(record, json.dumps(measured).encode())


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    folders = Folders(args.data, args.runs, args.out)
    for name in args.experiments:
        if name not in EXPERIMENTS:
            known = ", ".join(EXPERIMENTS)
            parser.error(f"there is no experiment {name!r}. Hint: choose from {known}")
    if args.list:
        for name, experiment in EXPERIMENTS.items():
            print(f"{name}: {', '.join(experiment.methods)}; {experiment}")
        return 0
    for name in args.experiments:
        experiment = with_options(EXPERIMENTS[name], args)
        methods = tuple(args.methods or experiment.methods)
        for method in methods:
            if method not in experiment.methods:
                known = ", ".join(experiment.methods)
                parser.error(f"{name} has no method {method!r}. Hint: it has {known}")
        if args.costs:
            write_costs(name, replace(experiment, methods=methods), folders)
            continue
        try:
            run(name, experiment, methods, range(args.seeds), folders)
        except FileNotFoundError as error:
            parser.error(str(error))
    render(args.out)
    return 0


def with_options(experiment: Experiment, args: argparse.Namespace) -> Experiment:
    """Return the experiment with the options that shorten it, and with another precision."""
    given = {key: getattr(args, key) for key in OPTIONS}
    return replace(experiment, **{key: value for key, value in given.items() if value is not None})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiments", nargs="*", help="names, as --list shows them")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs/reproduce"),
        help="where checkpoints, searches and decoded images go",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("tools/results/reproduce"),
        help="where the records and tables go",
    )
    parser.add_argument("--methods", nargs="+", help="some of the experiment's methods")
    parser.add_argument("--seeds", type=at_least(1), default=3)
    for name, meaning in SHORTENING.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=at_least(1),
            help=f"{meaning}, instead of the experiment's own; the record says so",
        )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="instead of the experiment's own; a CPU without instructions for bfloat16 takes ten "
        "times as long with it as with float32",
    )
    parser.add_argument(
        "--costs",
        action="store_true",
        help="measure memory and time of a step of each method, and train nothing",
    )
    parser.add_argument("--list", action="store_true", help="list the experiments")
    parser.add_argument(
        "--render", action="store_true", help="only render the tables and plots from the records"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
