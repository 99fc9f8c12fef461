"""What eight bits cost on scikit-learn's digits: a residual network, trained by SFF, exported, and quantised in four ways.

    python -m tools.int8 --out tools/results/int8

Weights have a scale for each channel or for each tensor, and take 8 bits or 7 (`reduce_range`, which processors without VNNI need). The
ranges of the activations are read from 300 of the training images; 597 images are tested.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from dataclasses import asdict
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sffx

WAYS = [
    (per_channel, reduce_range) for per_channel in (True, False) for reduce_range in (True, False)
]

Batches = list[tuple[Tensor, Tensor]]


class Residual(nn.Module):
    """Two 3 x 3 convolutions with BN and a shortcut, (B, C, H, W) to (B, 2C, H/2, W/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, 2, 1, bias=False),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(),
        )
        self.second = nn.Sequential(
            nn.Conv2d(2 * channels, 2 * channels, 3, 1, 1, bias=False), nn.BatchNorm2d(2 * channels)
        )
        self.shortcut = nn.Conv2d(channels, 2 * channels, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(self.first(x)) + self.shortcut(x))


def network() -> nn.Module:
    """A stem and two residual blocks on (B, 1, 8, 8)."""
    stem = [nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(
        *stem, Residual(32), Residual(64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)
    )


def digits() -> tuple[TensorDataset, Batches]:
    """Return 1,200 digits to train on, and batches of 597 others."""
    found = load_digits()
    x, y = (
        torch.tensor(found.images / 8 - 1, dtype=torch.float32)[:, None],
        torch.tensor(found.target),
    )
    return TensorDataset(x[:1200], y[:1200]), list(
        zip(x[1200:].split(100), y[1200:].split(100), strict=True)
    )


def exported(seed: int, epochs: int, train: TensorDataset, path: Path) -> Path:
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


def runs(seed: int, epochs: int) -> list[dict[str, Any]]:
    """Train and export once, and quantise in every way."""
    train, test = digits()
    calibration = list(DataLoader(train, 100))[:3]
    with tempfile.TemporaryDirectory() as folder:
        source, target = (
            exported(seed, epochs, train, Path(folder) / "net.onnx"),
            Path(folder) / "int8.onnx",
        )
        found = []
        for per_channel, reduce_range in WAYS:
            report = sffx.quantize_onnx(
                source,
                target,
                calibration,
                test,
                per_channel=per_channel,
                reduce_range=reduce_range,
            )
            found.append(
                {
                    **asdict(report),
                    "path": "int8.onnx",
                    "per_channel": per_channel,
                    "reduce_range": reduce_range,
                    "seed": seed,
                }
            )
        return found


def row(per_channel: bool, reduce_range: bool, found: list[dict[str, Any]]) -> str:
    mine = [
        run
        for run in found
        if (run["per_channel"], run["reduce_range"]) == (per_channel, reduce_range)
    ]
    names = ("accuracy_before", "accuracy_after", "agreement")
    shown = " | ".join(f"{mean(run[name] for run in mine):.2%}" for name in names)
    size = mean(run["bytes_after"] / run["bytes_before"] for run in mine)
    return f"| {7 if reduce_range else 8} | {'channel' if per_channel else 'tensor'} | {shown} | {size:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("tools/results/int8"))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found = [run for seed in range(args.seeds) for run in runs(seed, args.epochs)]
    stamp = f"{date.today()}, {platform.machine()}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"
    lines = [
        f"`python -m tools.int8`, {stamp}; {args.epochs} epochs, the mean over {args.seeds} seeds; 597 test images.",
        "",
    ]
    lines += [
        "| bits of a weight | a scale for each | accuracy before | after | same prediction | size |",
        "|---|---|---|---|---|---|",
    ]
    lines += [row(*way, found) for way in WAYS]
    (args.out / "record.json").write_text(
        json.dumps({"stamp": stamp, "epochs": args.epochs, "runs": found}, indent=1) + "\n"
    )
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
