"""Measure the loss of accuracy by eight bits, on scikit-learn's digits.

    python -m tools.int8 --out tools/results/int8

A residual network is trained by SFF, exported, and quantised in four ways. Weights have a scale for
each channel or for each tensor. They take 8 bits, or 7 (`reduce_range`), which processors without
VNNI need. The ranges of the activations are read from 300 of the training images. The test uses 597
other images.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from dataclasses import asdict
from datetime import date
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sffx
from tools.options import at_least

# Whether weights have a scale for each channel, and whether they take 7 bits.
WAYS = list(product((True, False), (True, False)))

TRAINING_IMAGES = 1200

Batches = list[tuple[Tensor, Tensor]]


class Residual(nn.Module):
    """Two 3 x 3 convolutions with BN and a shortcut, (B, C, H, W) to (B, 2C, H/2, W/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.first = nn.Sequential(
            nn.Conv2d(channels, wide, 3, 2, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()
        )
        self.second = nn.Sequential(
            nn.Conv2d(wide, wide, 3, 1, 1, bias=False), nn.BatchNorm2d(wide)
        )
        self.shortcut = nn.Conv2d(channels, wide, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(self.first(x)) + self.shortcut(x))


def network() -> nn.Module:
    """Return a stem and two residual blocks for images (B, 1, 8, 8)."""
    stem = [nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    blocks = [Residual(32), Residual(64)]
    classifier = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)]
    return nn.Sequential(*stem, *blocks, *classifier)


def digits() -> tuple[TensorDataset, Batches]:
    """Return 1,200 digits to train on, and batches of 597 others."""
    source = load_digits()
    x = torch.tensor(source.images / 8 - 1, dtype=torch.float32)[:, None]
    y = torch.tensor(source.target)
    train = TensorDataset(x[:TRAINING_IMAGES], y[:TRAINING_IMAGES])
    test_images = x[TRAINING_IMAGES:].split(100)
    test_labels = y[TRAINING_IMAGES:].split(100)
    return train, list(zip(test_images, test_labels, strict=True))


def train_and_export(seed: int, epochs: int, train: TensorDataset, path: Path) -> Path:
    torch.manual_seed(seed)
    net = sffx.transform(network(), "batchnorm", torch.zeros(1, 1, 8, 8))
    optimizer = torch.optim.AdamW(sffx.parameter_groups(net, 3e-3))
    loader = DataLoader(train, 50, shuffle=True)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            sffx.local_loss(net, x, y).backward()
            optimizer.step()
    return sffx.export_onnx(net, path)


def run_seed(seed: int, epochs: int) -> list[dict[str, Any]]:
    """Train and export once, and quantise in every way."""
    train, test = digits()
    calibration = list(DataLoader(train, 100))[:3]
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        source = train_and_export(seed, epochs, train, Path(folder) / "net.onnx")
        target = Path(folder) / "int8.onnx"
        for per_channel, reduce_range in WAYS:
            way = {"per_channel": per_channel, "reduce_range": reduce_range}
            report = sffx.quantize_onnx(source, target, calibration, test, **way)
            runs.append({**asdict(report), "path": "int8.onnx", **way, "seed": seed})
    return runs


def row(per_channel: bool, reduce_range: bool, runs: list[dict[str, Any]]) -> str:
    """Return one way as a row of the table, the mean over the seeds."""
    way = (per_channel, reduce_range)
    own = [run for run in runs if (run["per_channel"], run["reduce_range"]) == way]
    cells = ["7" if reduce_range else "8", "channel" if per_channel else "tensor"]
    for name in ("accuracy_before", "accuracy_after", "agreement"):
        cells.append(f"{mean(run[name] for run in own):.2%}")
    size = mean(run["bytes_after"] / run["bytes_before"] for run in own)
    cells.append(f"{size:.2f}")
    return f"| {' | '.join(cells)} |"


def table(stamp: str, epochs: int, seeds: int, runs: list[dict[str, Any]]) -> str:
    lines = [
        f"`python -m tools.int8`, {stamp}; {epochs} epochs, the mean over {seeds} seeds; "
        "597 test images.",
        "",
        "| bits of a weight | a scale for each | accuracy before | after "
        "| same prediction | size |",
        "|---|---|---|---|---|---|",
    ]
    for per_channel, reduce_range in WAYS:
        lines.append(row(per_channel, reduce_range, runs))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("tools/results/int8"))
    parser.add_argument("--epochs", type=at_least(1), default=6)
    parser.add_argument("--seeds", type=at_least(1), default=3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in range(args.seeds):
        runs += run_seed(seed, args.epochs)
    versions = f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"
    stamp = f"{date.today()}, {platform.machine()}, {versions}"
    record = {"stamp": stamp, "epochs": args.epochs, "runs": runs}
    (args.out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    page = table(stamp, args.epochs, args.seeds, runs)
    (args.out / "table.md").write_text(page + "\n")
    print(page)


if __name__ == "__main__":
    main()
