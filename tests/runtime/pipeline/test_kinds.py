"""Models of other kinds in a pipeline: several values across a cut, pixels, nested inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, IterableDataset

import sffx
from sffx.runtime.pipeline.epoch import crossing
from sffx.runtime.randomness import mixed
from tests.runtime.pipeline.processes import run


class Streams(nn.Module):
    """Two streams that run side by side and meet at the end only."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.ModuleList([nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 12)])
        self.coarse = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)])
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        fine = coarse = x
        for one, other in zip(self.fine, self.coarse, strict=True):
            fine = torch.relu(one(fine))
            coarse = torch.tanh(other(coarse))
        return self.head(torch.cat([fine, coarse], 1))


class Pixels(nn.Module):
    """Classes of pixels, at a half of the resolution inside."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.middle = nn.Conv2d(6, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(6, 3, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.down(x)))
        return self.up(torch.relu(self.middle(x)))


class Nested(nn.Module):
    """Inputs in a list inside a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 8)
        self.b = nn.Linear(5, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, extras: dict[str, list[Tensor]]) -> Tensor:
        x = torch.relu(self.a(x) + self.b(extras["more"][0]))
        return self.head(torch.relu(self.hidden(x)))


def summed(scores: Tensor, y: Tensor) -> Tensor:
    """A loss that is a number without samples as well."""
    return F.cross_entropy(scores, y, reduction="sum")


class Stream(IterableDataset):
    """Samples without a known number."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(numbers(9, 6), torch.arange(9) % 3, strict=True)


class Untested(sffx.objective.SFF):
    """Leaves the classifier as it is."""

    name = "untested"

    @property
    def trains_classifier(self) -> bool:
        return False


class InOneMemory:
    """Yields batches that lie in the same memory."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = map(torch.empty_like, self.batches[0])
        for own_x, own_y in self.batches:
            yield x.copy_(own_x), y.copy_(own_y)


def dropping(block: sffx.Block) -> nn.Module:
    """Make a norm that draws random numbers, and counts how often."""
    return nn.Sequential(nn.Dropout(0.3), nn.BatchNorm1d(block.channels, affine=False))


def numbers(*shape: int) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.linspace(-1, 1, count, dtype=torch.float64).sin().reshape(shape)


def cut(kind: str) -> tuple[fx.GraphModule, Any]:
    """Return a cut model, and batches for it."""
    torch.manual_seed(0)
    labels = torch.arange(6) % 3
    if kind == "streams":
        net = sffx.transform(Streams().double(), "layer", numbers(2, 6))
        # Both streams cross the boundary before each block.
        assert len(crossing(net, 3)) == 2
        return net, [(numbers(6, 6) * scale, labels) for scale in (1, 2, 3)]
    if kind == "drawing norms":
        hidden = [nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)]
        model = nn.Sequential(*hidden).double()
        net = sffx.transform(model, "layer", numbers(2, 6), norm=dropping)
        return net, DataLoader(Stream(), 5)
    if kind in OBJECTIVES:
        layers = [nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)]
        model = nn.Sequential(*layers).double()
        net = sffx.transform(model, "layer", numbers(2, 6), objective=OBJECTIVES[kind])
        return net, InOneMemory([(numbers(6, 6) * scale, labels) for scale in (1, 2, 3)])
    if kind == "sparse":
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        net = sffx.transform(model, "layer", numbers(2, 6))
        return net, [(numbers(6, 6).mul(scale).to_sparse(), labels) for scale in (1, 2, 3)]
    if kind == "an empty batch":
        net = sffx.transform(Streams().double(), "layer", numbers(2, 6))
        return net, [(numbers(size, 6), labels[:size]) for size in (6, 0, 4)]
    if kind == "pixels":
        task = sffx.tasks.Segmentation()
        net = sffx.transform(Pixels().double(), "layer", numbers(2, 3, 8, 8), task=task)
        targets = torch.arange(6 * 64).reshape(6, 8, 8) % 3
        return net, [(numbers(6, 3, 8, 8) * scale, targets) for scale in (1, 2, 3)]
    example = (numbers(2, 4), {"more": [numbers(2, 5)]})
    net = sffx.transform(Nested().double(), "layer", example)
    batches = []
    for scale in (1, 2, 3):
        x = (numbers(6, 4) * scale, {"more": [numbers(6, 5)]})
        batches.append((x, labels))
    return net, batches


OBJECTIVES = {
    "a loss of the objective": sffx.objectives.CwC(loss_form="pvn"),
    "superclasses": sffx.objectives.CwC(superclasses=[[0, 0, 1]]),
    "no classifier": Untested(),
}
LOSSES = {"an empty batch": summed}
KINDS = ("streams", "pixels", "nested", "drawing norms", "an empty batch", "sparse", *OBJECTIVES)


def train_all(rank: int) -> dict[str, Any]:
    found = {}
    for kind in KINDS:
        net, data = cut(kind)
        pipe = sffx.Pipeline(net, loss_fn=LOSSES.get(kind))
        groups = pipe.parameter_groups(lr=0.01)
        optimizer = torch.optim.AdamW(groups) if groups else None
        torch.manual_seed(1)
        losses = pipe.train(data if pipe.first else None, optimizer)
        evaluation = pipe.evaluate(data if pipe.first else None)
        found[kind] = losses, evaluation, pipe.state_dict()
    return found


def test_models_of_other_kinds_train_as_in_one_process(tmp_path):
    found = run(train_all, 2, tmp_path)
    assert all(isinstance(result, dict) for result in found), found
    for kind in KINDS:
        net, data = cut(kind)
        optimizer = torch.optim.AdamW(sffx.parameter_groups(net, lr=0.01))
        torch.manual_seed(1)
        seed = int(torch.randint(2**62, ()))
        for step, (x, y) in enumerate(data):
            with sffx.block_seeds(mixed(seed, step)):
                sffx.local_step(net, x, y, optimizer, LOSSES.get(kind))
        expected = net.state_dict()
        together = {**found[0][kind][2], **found[1][kind][2]}
        assert set(together) == set(expected), kind
        for name, value in expected.items():
            assert torch.equal(together[name], value), (kind, name)
        for result in found:
            assert result[kind][1] == sffx.evaluate(net, data), kind
            assert all(map(math.isfinite, result[kind][0].values())), kind
