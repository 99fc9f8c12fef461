"""CIFAR-10 with a conv-BN-pool network: backpropagation, SFF cut into BN groups and into layers, and CwC, side by side.

    python tools/cifar10.py --data cifar10 --out tools/results/cifar10

`--data` holds `train/` and `test/` with a folder per class. Each method takes the learning rate, of three, that gives the best validation
accuracy after one epoch on 10,000 images. A run writes a checkpoint after every epoch and resumes from it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from datetime import date
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

import sffx
from sffx.measure.costs import Training, relative_costs

METHODS = {
    "BP": None,
    "SFF, batchnorm": {"policy": "batchnorm"},
    "SFF, layer": {"policy": "layer"},
    "CwC, batchnorm": {"policy": "batchnorm", "goodness": "cwc"},
}
RATES = (3e-4, 1e-3, 3e-3)
BATCH, VALIDATION, SEARCH = 128, 5_000, 10_000


def network() -> nn.Sequential:
    widths = (3, 20, 40, 80, 80)
    groups = [
        nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        for i, o in itertools.pairwise(widths)
    ]
    return nn.Sequential(*groups, nn.Flatten(), nn.Linear(widths[-1] * 4, 10))


def build(method: str) -> nn.Module:
    torch.manual_seed(0)
    options = METHODS[method]
    model = network()
    return model if options is None else sffx.transform(model, example_input=torch.zeros(1, 3, 32, 32), **options)


def load(folder: Path, cache: Path) -> tuple[Tensor, Tensor]:
    """Return images as uint8 (N, 3, 32, 32) and labels (N,), decoded once and kept in `cache`."""
    if not cache.exists():
        images = ImageFolder(folder)
        x = torch.stack([pil_to_tensor(image) for image, _ in images])
        torch.save((x, torch.tensor(images.targets)), cache)
    return torch.load(cache)


def prepare(x: Tensor) -> Tensor:
    return (x.float() - 120.7) / 64.2


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Flip each image by chance, and shift the batch by up to 4 pixels."""
    flip = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
    dy, dx = torch.randint(0, 9, (2,), generator=generator)
    return F.pad(torch.where(flip, x.flip(3), x), (4, 4, 4, 4))[:, :, dy : dy + 32, dx : dx + 32]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return sffx.local_loss(model, x, y) if hasattr(model, "plan") else F.cross_entropy(model(x), y)


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    model.train()
    start = time.perf_counter()
    for index in torch.randperm(len(x), generator=generator).split(BATCH)[: len(x) // BATCH]:
        optimizer.zero_grad()
        loss_of(model, prepare(augment(x[index], generator)).contiguous(), y[index]).backward()
        optimizer.step()
    return time.perf_counter() - start


def accuracies(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    batches = [(prepare(a), b) for a, b in zip(x.split(500), y.split(500), strict=True)]
    if hasattr(model, "plan"):
        return sffx.evaluate(model, batches).accuracy
    model.eval()
    with torch.no_grad():
        return {"classifier": sum(int((model(a).argmax(1) == b).sum()) for a, b in batches) / len(y)}


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    groups = sffx.parameter_groups(model, lr=rate) if hasattr(model, "plan") else model.parameters()
    return torch.optim.AdamW(groups, lr=rate, weight_decay=0.01)


def search(method: str, x: Tensor, y: Tensor, validation: tuple[Tensor, Tensor]) -> dict[str, float]:
    scores = {}
    for rate in RATES:
        model = build(method)
        train_epoch(model, optimizer_of(model, rate), x[:SEARCH], y[:SEARCH], seed=0)
        found = accuracies(model, *validation)
        scores[str(rate)] = found.get("ensemble", found["classifier"])
    return scores


def run(method: str, data: dict[str, tuple[Tensor, Tensor]], epochs: int, out: Path) -> dict:
    """Train one method, from its checkpoint where there is one, and return its record."""
    path = out / f"{method.replace(', ', '-')}.pt"
    state = torch.load(path) if path.exists() else {"epoch": 0, "curve": [], "search": search(method, *data["train"], data["validation"])}
    rate = float(max(state["search"], key=state["search"].get))
    model = build(method)
    optimizer = optimizer_of(model, rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for part, key in ((model, "model"), (optimizer, "optimizer"), (schedule, "schedule")):
        if key in state:
            part.load_state_dict(state[key])
    for epoch in range(state["epoch"], epochs):
        seconds = train_epoch(model, optimizer, *data["train"], seed=epoch)
        schedule.step()
        state["curve"].append({"epoch": epoch + 1, "seconds": seconds, "validation": accuracies(model, *data["validation"])})
        state |= {"epoch": epoch + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
        print(f"{method}: epoch {epoch + 1}/{epochs}, {seconds:.0f} s, {state['curve'][-1]['validation']}", flush=True)
    return {"lr": rate, "search": state["search"], "curve": state["curve"], "test": accuracies(model, *data["test"])}


def costs(rounds: int) -> dict[str, dict[str, float]]:
    """Measure step time, alternating, and counted peak memory of each method relative to BP."""
    x, y = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
    models = {method: build(method).train() for method in METHODS}
    trainings = {method: Training(model, optimizer_of(model, 1e-3), partial(loss_of, model, x, y)) for method, model in models.items()}
    return relative_costs(trainings, "BP", rounds=rounds)


def table(record: dict) -> str:
    rows = [
        "| method | lr | ensemble | classifier | step time / BP | peak memory / BP | activations / BP |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, found in record["methods"].items():
        cost, test = record["costs"][method], found["test"]
        ensemble = f"{test['ensemble']:.2%}" if "ensemble" in test else "–"
        figures = (
            f"{found['lr']:g}",
            ensemble,
            f"{test['classifier']:.2%}",
            *(f"{cost[key]:.2f}" for key in ("time", "peak", "activations")),
        )
        rows.append(f"| {method} | {' | '.join(figures)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("tools/results/cifar10"), help="where the record and the table go")
    parser.add_argument("--runs", type=Path, default=Path("runs/cifar10"), help="where checkpoints and decoded images go")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=30, help="of the time measurement")
    args = parser.parse_args()
    for folder in (args.out, args.runs):
        folder.mkdir(parents=True, exist_ok=True)
    x, y = load(args.data / "train", args.runs / "train-images.pt")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    data = {
        "train": (x[VALIDATION:], y[VALIDATION:]),
        "validation": (x[:VALIDATION], y[:VALIDATION]),
        "test": load(args.data / "test", args.runs / "test-images.pt"),
    }
    methods = {method: run(method, data, args.epochs, args.runs) for method in METHODS}
    hardware = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    record = {"date": str(date.today()), "hardware": hardware, "epochs": args.epochs, "methods": methods, "costs": costs(args.rounds)}
    (args.out / "record.json").write_text(json.dumps(record, indent=1))
    (args.out / "table.md").write_text(f"{table(record)}\n\n{record['date']}, {hardware}, {args.epochs} epochs, batch {BATCH}, seed 0.\n")
    print(table(record))


if __name__ == "__main__":
    main()
