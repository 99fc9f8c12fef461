"""SCFF on MNIST in plain torch, as its authors have it, with parts left out.

    python -m tools.reproduce.scff --data data
    python -m tools.reproduce.scff --data data --without triangle shifts --epochs 20 0

It tells which part of the authors' settings an accuracy comes from. The settings are those of
github.com/neurophysics-cnrsthales/contrastive-forward-forward, in bfloat16. A linear probe reads
the standardised outputs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sffx.learning.objectives.mixing import moved, others_of
from sffx.learning.objectives.self_contrastive import standardized
from tools.options import at_least
from tools.reproduce.data import load_mnist
from tools.reproduce.readouts import LONG_PROBE, fit_probe

UNITS = 2000
BATCH = 100
PIXELS = 2
WEIGHT_DECAY = 1e-4

# What may be left out.
PARTS = {
    "triangle": "the mean over units is subtracted before the ReLU of what goes on",
    "shifts": "each half of a pair is moved by itself",
    "decay": "the learning rates fall",
    "goodness of ReLU": "the goodness is that of a plain ReLU, whatever goes on",
}


@dataclass(frozen=True)
class Layer:
    """How a layer learns: its first rate, the rate's factor after so many steps, and the loss."""

    lr: float
    factor: float
    period: int
    positive: float
    negative: float
    penalty: float


LAYERS = (
    Layer(lr=3e-3, factor=0.9, period=1000, positive=4, negative=6, penalty=1e-4),
    Layer(lr=2e-3, factor=0.6, period=1500, positive=1, negative=1, penalty=0),
)


class TwoLayers:
    """The network, and the ways through it.

    Args:
        without: names of parts that are left out.
    """

    def __init__(self, without: Collection[str]) -> None:
        self.without = without
        self.first = nn.Linear(28 * 28, UNITS)
        self.second = nn.Linear(UNITS, UNITS)

    def act(self, z: Tensor) -> Tensor:
        """Return what goes on from a layer that gives z, (B, units)."""
        if "triangle" in self.without:
            return F.relu(z)
        return F.relu(z - z.mean(1, keepdim=True))

    def goodness(self, z: Tensor) -> Tensor:
        """Return the goodness of each sample, (B,)."""
        output = self.act(z) if "goodness of ReLU" in self.without else F.relu(z)
        return output.square().mean(1)

    def first_features(self, halves: Tensor) -> Tensor:
        """Return the standardised outputs of the first layer, (B, units), for means of two halves.

        Both halves go through the same weights and are added, which is twice their mean.
        """
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return standardized(self.act(2 * self.first(halves)).float())

    def second_features(self, features: Tensor) -> Tensor:
        """Return those of the second layer, (B, units), for those of the first."""
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return standardized(self.act(self.second(features)).float())


def pairs(images: Tensor, is_moved: bool) -> Tensor:
    """Return the means of positive and, behind them, of negative pairs, (2 * B, 784)."""
    halves = []
    for _ in range(2):
        half = moved(images, PIXELS) if is_moved else images
        halves.append(standardized(half.flatten(1)))
    first, second = halves
    return torch.cat([first + second, first + others_of(second)]) / 2


def train(net: TwoLayers, images: Tensor, index: int, epochs: int) -> None:
    """Train one layer on all images, (N, 1, 28, 28).

    Args:
        net: whose earlier layer is trained.
        images: between 0 and 1.
        index: of the layer.
        epochs: how many.
    """
    layer = LAYERS[index]
    linear = (net.first, net.second)[index]
    optimizer = torch.optim.AdamW(linear.parameters(), layer.lr, weight_decay=WEIGHT_DECAY)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, layer.period, layer.factor)
    for epoch in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            x = pairs(images[batch], "shifts" not in net.without)
            if index == 1:
                x = net.first_features(x)
            with torch.autocast("cpu", torch.bfloat16):
                z = linear(x)
            goodness = net.goodness(2 * z.float() if index == 0 else z.float())
            positive, negative = goodness.chunk(2)
            loss = F.softplus(layer.positive - positive).mean()
            loss = loss + F.softplus(negative - layer.negative).mean()
            loss = loss + layer.penalty * positive.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if "decay" not in net.without:
                scheduler.step()
        print(f"layer {index}, epoch {epoch}: loss {loss.item():.3f}", flush=True)


def probe(features: Tensor, y: Tensor, tests: Tensor, y_test: Tensor, epochs: int) -> float:
    """Return the test accuracy of a linear probe.

    Args:
        features: of the training images, (N, units).
        y: their classes, (N,).
        tests: features of the test images.
        y_test: their classes.
        epochs: how long the probe learns.
    """
    linear = nn.Linear(features.shape[1], 10)
    fit_probe(linear, features, y, replace(LONG_PROBE, epochs=epochs))
    with torch.no_grad():
        right = linear(tests.float()).argmax(1) == y_test
    return float(right.float().mean())


def run(
    data: Path, without: Collection[str], epochs: Sequence[int], probe_epochs: int
) -> dict[str, float]:
    """Train both layers, and return the accuracies of probes by what they read.

    Args:
        data: the folder that holds `MNIST/`.
        without: names of parts that are left out.
        epochs: of each layer. A second layer without epochs is not probed.
        probe_epochs: of each probe.
    """
    torch.manual_seed(1234)
    parts = load_mnist(data, 28)
    images = [part.x.float() / 255 for part in parts]
    y, y_test = [part.y for part in parts]
    net = TwoLayers(without)
    for index, count in enumerate(epochs):
        train(net, images[0], index, count)
    outputs = []
    for part in images:
        of_first, of_second = [], []
        for x in part.split(2000):
            features = net.first_features(standardized(x.flatten(1)))
            # Half as large as floats, since probes read 4,000 features of 60,000 images.
            of_first.append(features.bfloat16())
            of_second.append(net.second_features(features).bfloat16())
        outputs.append((torch.cat(of_first), torch.cat(of_second)))
    (first, second), (first_test, second_test) = outputs
    found = {"first layer": probe(first, y, first_test, y_test, probe_epochs)}
    if epochs[1]:
        both = torch.cat([first, second], 1)
        both_test = torch.cat([first_test, second_test], 1)
        found["second layer"] = probe(second, y, second_test, y_test, probe_epochs)
        found["both layers"] = probe(both, y, both_test, y_test, probe_epochs)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.reproduce.scff",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=Path("data"))
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in PARTS.items())
    parser.add_argument(
        "--without", nargs="*", choices=PARTS, default=[], help=f"parts to leave out ({meanings})"
    )
    parser.add_argument(
        "--epochs", type=at_least(0), nargs=2, default=(20, 9), help="of each layer"
    )
    parser.add_argument("--probe-epochs", type=at_least(1), default=LONG_PROBE.epochs)
    args = parser.parse_args(arguments)
    found = run(args.data, args.without, args.epochs, args.probe_epochs)
    for name, accuracy in found.items():
        print(f"probe of {name}: {accuracy:.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
