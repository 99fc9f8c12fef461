"""Train networks with other tasks than classes of a sample, by several methods.

    python -m tools.tasks --data data --runs runs diabetes language camvid-lraspp
    python -m tools.tasks --render

Each method tries the same learning rates on seed 0, for a third of the epochs, and the best by
validation trains to the end with each seed. The readout and the epoch are chosen by validation, and
tested. Each run keeps its state after each epoch in `--runs`, so the same command goes on where it
was interrupted. Records of runs and trials go to `--out`; what has one is not made again. `--costs`
adds time and counted peak of a step, and wants a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sffx.files import write
from sffx.tables import MIB
from tools.costs import Training, relative_costs
from tools.reproduce.versions import versions
from tools.tasks.experiments import EXPERIMENTS, Experiment, Method
from tools.tasks.largest import largest
from tools.tasks.training import Run

OUT = Path(__file__).parent.parent / "results" / "tasks"
ROUNDS = 20

# Random images have squares of so many pixels, which divide their sides, with one of the labels.
SQUARE = 15
ROAD_LABELS = 12


def key(method: str) -> str:
    """Return a method's name as part of a file's name."""
    return method.replace(" ", "-").replace(",", "").replace("=", "")


def train(name: str, experiment: Experiment, options: argparse.Namespace) -> None:
    """Make the runs of one experiment that have no record yet."""
    for method in experiment.methods:
        lr = _searched(name, experiment, method, options)
        for seed in experiment.seeds:
            record = options.out / name / f"{key(method)}-{seed}.json"
            if not record.exists():
                found = _run(name, experiment, method, lr, seed, experiment.epochs, options)
                made = {"epochs": experiment.epochs, "versions": versions()}
                _write(record, {"method": method, "seed": seed, "lr": lr, **made, **found})


def _searched(name: str, experiment: Experiment, method: str, options: argparse.Namespace) -> float:
    """Return the learning rate whose trial was best by validation."""
    best, chosen = experiment.worst, experiment.rates[0]
    epochs = max(experiment.epochs // 3, 1)
    for lr in experiment.rates:
        record = options.out / name / "trials" / f"{key(method)}-{lr:g}-{epochs}.json"
        if not record.exists():
            _write(record, _run(name, experiment, method, lr, 0, epochs, options, tested=False))
        value = json.loads(record.read_text())["validation"]
        if experiment.better(value, best):
            best, chosen = value, lr
    return chosen


def _run(
    name: str,
    experiment: Experiment,
    method: str,
    lr: float,
    seed: int,
    epochs: int,
    options: argparse.Namespace,
    *,
    tested: bool = True,
) -> dict[str, Any]:
    data = experiment.data(options.data, seed)
    run = Run(experiment, experiment.methods[method], lr, seed, epochs, data)
    place = options.runs / name / f"{key(method)}-{lr:g}-{seed}-{epochs}.pt"
    best = run.train(place, tested=tested)
    place.unlink()
    found = f"{best['readout']} {best['test' if tested else 'validation']:.4f}"
    print(f"{name}, {method}, lr {lr:g}, seed {seed}, {epochs} epochs: {found}", flush=True)
    return best


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, f"{json.dumps(content, indent=1)}\n".encode())


def costs(name: str, experiment: Experiment, options: argparse.Namespace) -> None:
    """Measure a training step of each method beside BP's."""
    x, y = _batch(experiment, options)
    methods = dict(experiment.methods)
    if experiment.image_size:
        # What the heads add, without what recomputing adds.
        methods["SFF, no recomputing"] = Method(options={"recompute": False})
    trainings = {}
    for label, method in methods.items():
        net = method.net(experiment.build(), experiment.task, experiment.policy, x).train()
        optimizer = torch.optim.AdamW(net.parameters(), 1e-4)
        loss = partial(method.loss, net, experiment.task, x, y)
        trainings[label] = Training(net, optimizer, loss)
    # Processor time, which other processes on the machine disturb less. One thread does the work.
    torch.set_num_threads(1)
    found = relative_costs(trainings, "BP", rounds=ROUNDS, clock=time.process_time)
    _write(options.out / name / "costs.json", {"date": str(date.today()), "costs": found})


def _batch(experiment: Experiment, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return the first batch of an experiment, or random images with squares of one label."""
    if not options.random:
        data = experiment.data(options.data, 0)
        return next(data.train.batches(experiment.batch))
    height, width = experiment.image_size
    labels = torch.randint(0, ROAD_LABELS, (experiment.batch, height // SQUARE, width // SQUARE))
    y = labels.repeat_interleave(SQUARE, 1).repeat_interleave(SQUARE, 2)
    return torch.randn(experiment.batch, 3, height, width), y


def buys(name: str, experiment: Experiment, options: argparse.Namespace) -> None:
    """Count what the saved memory of an experiment on images buys."""
    _write(options.out / name / "largest.json", largest(experiment))


def table(out: Path) -> Iterator[str]:
    """Yield the lines of the page of results."""
    yield "# Other tasks"
    yield ""
    yield "Made by `python -m tools.tasks`. The metric is of test data, at the epoch and with the"
    yield "readout that were best by validation. Where seeds differ in it, all readouts are named."
    yield "Time (of one processor) and counted peak are of a training step with AdamW, relative to"
    yield "BP. K is the number of blocks, the classifier among them."
    for name, experiment in EXPERIMENTS.items():
        rows = list(_rows(out / name, experiment))
        bought = list(_bought(out / name / "largest.json"))
        if rows or bought:
            yield ""
            yield f"## {name}"
        if rows:
            yield ""
            yield f"| method | {experiment.metric.replace('_', ' ')} | readouts | time | peak |"
            yield "|---|---|---|---|---|"
            yield from rows
            yield from _made(out / name)
            if experiment.note:
                yield experiment.note
        yield from bought


def _made(folder: Path) -> Iterator[str]:
    """Yield the lines on how the runs of an experiment were made."""
    records = [json.loads(file.read_text()) for file in sorted(folder.glob("*-*.json"))]
    if not records:
        return
    newest = max(records, key=lambda record: record.get("versions", {}).get("date", ""))
    seeds = len({record["seed"] for record in records})
    yield ""
    versions = newest.get("versions")
    if versions is None:
        yield f"{seeds} seeds. The records do not say when and where they were made."
        return
    place = f"{versions['hardware']}, torch {versions['torch']}"
    yield f"{newest['epochs']} epochs, {seeds} seeds. {versions['date']}, {place}."


def _bought(file: Path) -> Iterator[str]:
    """Yield the lines on what the saved memory buys, if it was counted."""
    if not file.exists():
        return
    found = json.loads(file.read_text())
    yield ""
    peak = found["peak"] / MIB
    yield f"The peak of BP with a batch of {found['batch']} is {peak:.0f} MiB. Into it"
    yield "fits one of these two, the batch or the image (counted by `--largest`, with AdamW):"
    yield ""
    yield "| method | batch | image, height x width |"
    yield "|---|---|---|"
    for method, fits in found["methods"].items():
        height, width = fits["image"]
        yield f"| {method} | {fits['batch']} | {height} x {width} |"


def _rows(folder: Path, experiment: Experiment) -> Iterator[str]:
    costs = folder / "costs.json"
    measured = json.loads(costs.read_text())["costs"] if costs.exists() else {}
    for method in dict.fromkeys([*experiment.methods, *measured]):
        records = []
        for seed in experiment.seeds:
            file = folder / f"{key(method)}-{seed}.json"
            if file.exists():
                records.append(json.loads(file.read_text()))
        own = measured.get(method, {})
        if not records and not own:
            continue
        time = f"{own['time']:.2f}" if own else "–"
        peak = f"{own['peak']:.2f}" if own else "–"
        yield f"| {method} | {_tested(records)} | {time} | {peak} |"


def _tested(records: list[dict[str, Any]]) -> str:
    """Return the mean of some runs' tests and their readouts, two cells of a table."""
    if not records:
        return "– | –"
    values = [record["test"] for record in records]
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    readouts = ", ".join(dict.fromkeys(record["readout"] for record in records))
    return f"{statistics.mean(values):.3f}{spread} | {readouts}"


def main(arguments: Sequence[str] | None = None) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m tools.tasks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    parser.add_argument("--data", type=Path, default=Path("data"), help="holds camvid/")
    parser.add_argument("--runs", type=Path, default=Path("runs/tasks"), help="states of runs")
    parser.add_argument("--out", type=Path, default=OUT, help="records")
    parser.add_argument("--costs", action="store_true", help="measure steps, and train nothing")
    parser.add_argument("--random", action="store_true", help="with --costs: random images")
    parser.add_argument("--largest", action="store_true", help="count what memory buys only")
    parser.add_argument("--render", action="store_true", help="write the page of results only")
    options = parser.parse_args(arguments)
    for name in options.experiments:
        if name not in EXPERIMENTS:
            parser.error(f"there is no experiment {name!r}; there are {', '.join(EXPERIMENTS)}")
        needs_images = options.largest or options.random
        if needs_images and not EXPERIMENTS[name].image_size:
            parser.error(f"{name} has no images, which --largest and --random need")
    work = train
    if options.costs:
        work = costs
    elif options.largest:
        work = buys
    for name in [] if options.render else options.experiments:
        work(name, EXPERIMENTS[name], options)
    options.out.mkdir(parents=True, exist_ok=True)
    page = "\n".join(table(options.out))
    write(options.out / "README.md", f"{page}\n".encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
