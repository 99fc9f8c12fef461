"""What heads of low rank cost in accuracy: three handwritten digits side by side, 1,000 classes.

    python tools/rank.py --out tools/results/rank

A residual network learns numbers from 000 to 999, each three of scikit-learn's digits, by SFF with whole heads and with heads of several
ranks. Training and test numbers are made of different digits; of the numbers, all occur in training.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import date
from pathlib import Path
from statistics import mean

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sffx


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
    stem = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(
        *stem, Residual(16), Residual(32), nn.Flatten(), nn.Linear(64 * 2 * 6, 1000)
    )


def numbers(images: Tensor, labels: Tensor, count: int, seed: int) -> TensorDataset:
    """Make numbers of three digits each: images (N, 1, 8, 24), labels 0 to 999."""
    chosen = torch.randint(len(images), (count, 3), generator=torch.Generator().manual_seed(seed))
    return TensorDataset(
        images[chosen].permute(0, 2, 1, 3).reshape(count, 1, 8, 24),
        labels[chosen] @ torch.tensor([100, 10, 1]),
    )


def digits() -> tuple[TensorDataset, TensorDataset]:
    found = load_digits()
    images, labels = (
        torch.tensor(found.images, dtype=torch.float32) / 8 - 1,
        torch.tensor(found.target),
    )
    train, test = train_test_split(
        range(len(images)), test_size=0.3, random_state=0, stratify=labels
    )
    return numbers(images[train], labels[train], 8_000, 0), numbers(
        images[test], labels[test], 2_000, 1
    )


def trained(
    rank: int | None, seed: int, epochs: int, train: TensorDataset, test: TensorDataset
) -> dict[str, float]:
    """Return the accuracy of the ensemble, the last block and the classifier."""
    torch.manual_seed(seed)
    net = sffx.transform(network(), example_input=torch.zeros(1, 1, 8, 24), rank=rank)
    loader = DataLoader(train, 128, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(sffx.parameter_groups(net, lr=3e-3, classifier_lr=3e-3))
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, epochs * len(loader))
    net.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            sffx.local_loss(net, x, y).backward()
            optimizer.step()
            schedule.step()
    accuracy = sffx.evaluate(net, DataLoader(test, 500)).accuracy
    heads = sum(p.numel() for name, p in net.named_parameters() if name.startswith("head_"))
    return {
        **{name: accuracy[name] for name in ("ensemble", "last", "classifier")},
        "head parameters": heads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("tools/results/rank"))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train, test = digits()
    stamp = f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    record = {"stamp": stamp, "epochs": args.epochs, "runs": {}}
    lines = [
        f"{stamp}; {args.epochs} epochs, {args.seeds} seeds; test accuracy, mean over the seeds (lowest to highest).",
        "",
    ]
    lines += [
        "| rank | parameters of the heads | ensemble | last block | classifier |",
        "|---|---|---|---|---|",
    ]
    for rank in (None, 32, 16, 8):
        runs = [trained(rank, seed, args.epochs, train, test) for seed in range(args.seeds)]
        record["runs"][str(rank)] = runs
        cells = [[run[name] for run in runs] for name in ("ensemble", "last", "classifier")]
        shown = " | ".join(
            f"{mean(values):.2%} ({min(values):.2%} to {max(values):.2%})" for values in cells
        )
        lines.append(f"| {rank or 'whole'} | {runs[0]['head parameters']:,} | {shown} |")
        print(lines[-1], flush=True)
        (args.out / "record.json").write_text(json.dumps(record, indent=1))
        (args.out / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
