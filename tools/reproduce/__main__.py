"""Run experiments of the paper: search, three seeds, tests; then render the tables.

    python -m tools.reproduce --data data table3-cifar10-cnnb
    python -m tools.reproduce --list
    python -m tools.reproduce --render

`--data` holds `cifar10/` and `imagenette/`, each with `train/` and `test/` and there a folder for each class. What is done lies
below `--runs`; the same command goes on where it was interrupted. Results are gathered in `--out`. `--costs` wants a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict, fields, replace
from datetime import date
from pathlib import Path

import torch
import torchvision

from sffx.files import write
from tools.reproduce.costs import costs
from tools.reproduce.data import Images, load, load_digits, split
from tools.reproduce.experiments import EXPERIMENTS, Experiment
from tools.reproduce.networks import torchvision_weights
from tools.reproduce.render import render
from tools.reproduce.search import search
from tools.reproduce.training import Run, Setting


def versions() -> dict[str, str]:
    return {
        "date": str(date.today()),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def images(experiment: Experiment, folders: argparse.Namespace) -> tuple[Images, Images]:
    """Return the training and the test images of an experiment."""
    if experiment.data == "digits":
        return load_digits(experiment.size)
    train, test = (
        load(folders.data / experiment.data / part, folders.runs / "images", experiment.size)
        for part in ("train", "test")
    )
    return train, test


def run(
    name: str,
    experiment: Experiment,
    methods: tuple[str, ...],
    seeds: range,
    folders: argparse.Namespace,
) -> None:
    """Run an experiment to its end: seeds outermost, so that all methods are there as early as may be."""
    for seed in seeds:
        for method in methods:
            record, _ = places(name, method, seed, folders)
            if record.exists():
                require_same(record, experiment)
            else:
                run_once(name, experiment, method, seed, folders)


def places(name: str, method: str, seed: int, folders: argparse.Namespace) -> tuple[Path, Path]:
    """Return where the record and the checkpoint of a run are."""
    stem = f"{method.replace(' ', '-')}-{seed}"
    return folders.out / name / f"{stem}.json", folders.runs / name / f"{stem}.pt"


def run_once(
    name: str, experiment: Experiment, method: str, seed: int, folders: argparse.Namespace
) -> None:
    """Train by one method from one seed, or go on with it, and write its record."""
    record, checkpoint = places(name, method, seed, folders)
    train, test = images(experiment, folders)
    setting = found_setting(name, experiment, method, folders)
    parted = split(train, test, experiment.samples, seed)
    made = Run(experiment, method, setting, seed, parted, starting_weights(experiment, folders))
    made.train(experiment.epochs, checkpoint)
    result = made.result()
    record.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "experiment": name,
        "method": method,
        "config": asdict(experiment),
        "versions": versions(),
        **result,
    }
    write(record, json.dumps(facts).encode())
    shown = ", ".join(f"{key} {value:.2%}" for key, value in result["test"].items())
    print(
        f"{name}, {method}, seed {seed}, {result['epochs']} epochs, {setting}: {shown}", flush=True
    )


def found_setting(
    name: str, experiment: Experiment, method: str, folders: argparse.Namespace
) -> Setting:
    """Search for a method's setting, for the experiment itself or for the one whose setting it takes."""
    if experiment.settings is not None:
        name = experiment.settings
        experiment = replace(
            EXPERIMENTS[name], trials=experiment.trials, trial_epochs=experiment.trial_epochs
        )
    train, test = images(experiment, folders)
    parted = split(train, test, experiment.samples, 0)
    return search(
        name, experiment, method, parted, folders.runs / name, starting_weights(experiment, folders)
    )


def starting_weights(
    experiment: Experiment, folders: argparse.Namespace
) -> dict[str, torch.Tensor] | None:
    """Return the weights that the experiment starts from; where another experiment makes them, its run is first brought to its end."""
    name = experiment.pretrained
    if name is None:
        return None
    if name == "torchvision":
        return torchvision_weights(experiment.network)
    record, checkpoint = places(name, "BP", 0, folders)
    if record.exists():
        require_same(record, EXPERIMENTS[name])
    if not (record.exists() and checkpoint.exists()):
        run_once(name, EXPERIMENTS[name], "BP", 0, folders)
    return torch.load(checkpoint, weights_only=False)["best"]["state"]


def require_same(record: Path, experiment: Experiment) -> None:
    """Check that a record is of the experiment as it is asked for.

    Raises:
        SystemExit: it is not; says where they differ.
    """
    defaults = {each.name: each.default for each in fields(Experiment)}
    config, asked = (
        defaults | json.loads(record.read_text())["config"],
        json.loads(json.dumps(asdict(experiment))),
    )
    del asked["methods"]  # which others there are makes no difference to a record
    other = [
        f"{key} {config[key]!r} instead of {value!r}"
        for key, value in asked.items()
        if config[key] != value
    ]
    if other:
        raise SystemExit(
            f"{record} was made with {', '.join(other)}. Hint: another --out and --runs for another experiment"
        )


def main(arguments: list[str] | None = None) -> int:
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
    parser.add_argument("--seeds", type=int, default=3)
    for option, what in (
        ("epochs", "at most"),
        ("trials", "settings tried for each method"),
        ("trial_epochs", "of such a trial"),
    ):
        parser.add_argument(
            f"--{option.replace('_', '-')}",
            type=int,
            help=f"{what}, instead of the experiment's own; the record says so",
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
    args = parser.parse_args(arguments)
    unknown = [name for name in args.experiments if name not in EXPERIMENTS]
    if unknown:
        parser.error(
            f"there is no experiment {unknown[0]!r}. Hint: choose from {', '.join(EXPERIMENTS)}"
        )
    if args.list:
        print("\n".join(f"{name}: {', '.join(e.methods)}; {e}" for name, e in EXPERIMENTS.items()))
        return 0
    for name in args.experiments:
        asked = {
            key: value
            for key in ("epochs", "trials", "trial_epochs")
            if (value := getattr(args, key)) is not None
        }
        experiment = replace(EXPERIMENTS[name], **asked)
        strange = [method for method in args.methods or () if method not in experiment.methods]
        if strange:
            parser.error(
                f"{name} has no method {strange[0]!r}. Hint: it has {', '.join(experiment.methods)}"
            )
        methods = tuple(args.methods or experiment.methods)
        if args.costs:
            (args.out / name).mkdir(parents=True, exist_ok=True)
            write(
                args.out / name / "costs.json",
                json.dumps(
                    {**costs(replace(experiment, methods=methods)), "versions": versions()}
                ).encode(),
            )
            continue
        try:
            run(name, experiment, methods, range(args.seeds), args)
        except FileNotFoundError as error:
            parser.error(str(error))
    render(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
