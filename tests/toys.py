"""Toy networks with one trait each, and pieces that several tests ask for."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sffx.blocks import Block

P = ParamSpec("P")
R = TypeVar("R")


def kept(make: Callable[P, R]) -> Callable[P, R]:
    """Keep what a function returns for its arguments, and return a copy of it at each call.

    To cut a toy takes longer than most tests of the result.
    """
    keeping = functools.cache(make)

    @functools.wraps(make)
    def copied(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return copy.deepcopy(keeping(*args, **kwargs))
        except TypeError:  # an argument without a hash
            return make(*args, **kwargs)

    return copied


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Draw the random numbers of a seed inside the context; those of the test go on behind it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class Chain(nn.Sequential):
    """conv, BN, ReLU, pool; conv, ReLU; flatten, linear: on (B, 3, 8, 8)."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__(
            *(
                nn.Conv2d(3, 6, 3, padding=1),
                nn.BatchNorm2d(6),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
            ),
            *(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(inplace=True)),
            *(nn.Flatten(), nn.Linear(8 * 16, classes)),
        )


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = (
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.conv2, self.bn2 = (
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x
        return self.relu(y)


class Residual(nn.Module):
    """A stem, two residual blocks, a classifier: on (B, 3, 8, 8)."""

    def __init__(self, width: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.block1, self.block2 = ResidualBlock(width), ResidualBlock(width)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.block2(self.block1(self.stem(x))).mean((2, 3))))


class TwoBranches(nn.Module):
    """Two convolutions of different size side by side, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(torch.cat([self.left(x), self.right(x)], 1).mean((2, 3)))


class SharedWeight(nn.Module):
    """One layer used twice, between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(self.shared(x))
        x = F.relu(self.shared(x))
        return self.last(x)


class TwoInputs(nn.Module):
    """An encoder for each of two inputs, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(6, 8), nn.Linear(5, 8)
        self.joint, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        x = F.relu(self.image(image) + self.text(text))
        return self.head(F.relu(self.joint(x)))


class TokenBlock(nn.Module):
    """Mixes each token with the mean of the real ones."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.own, self.shared = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + F.gelu(self.own(x) + self.shared(real_mean(x, mask))[:, None])


class Tokens(nn.Module):
    """An embedding, two blocks that respect an attention mask, a classifier: on (B, T) twice.

    The classifier reads the mean of the real tokens.
    """

    def __init__(self, width: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, width), nn.Linear(width, classes)
        self.blocks = nn.ModuleList(TokenBlock(width) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x, attention_mask)
        return self.head(real_mean(x, attention_mask))


def real_mean(x: Tensor, mask: Tensor) -> Tensor:
    real = mask[:, :, None].to(x.dtype)
    return (x * real).sum(1) / real.sum(1)


class Rounding(nn.Module):
    """A rounding, which has no gradient, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.round(F.relu(self.before(x)) * 4)
        return self.head(F.relu(self.after(x)))


class SharedBias(nn.Module):
    """A bias computed from a parameter and read by two layers, as relative positions are."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6))
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.table.tanh()
        x = F.relu(self.first(x) + bias)
        x = F.relu(self.second(x) + bias)
        return self.head(x)


class ModeDropout(nn.Module):
    """Dropout as a function of its own `training`, in a module that is traced through."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(F.relu(self.inner(x)), 0.5, self.training))


class DataBranch(nn.Module):
    """A branch on the values of the input, which no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.inner(x)
        return self.inner(-x)


class LayerDrop(nn.Module):
    """Skips its layer at random in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(()) < 0.5:
            return x
        return self.inner(x)


def around(middle: nn.Module) -> nn.Sequential:
    """Put a module on (B, 6) between two layers."""
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), middle, nn.ReLU(), nn.Linear(6, 4))


def block_of(*shape: int, axis: int = 1, mask: str = "") -> Block:
    """Return a block whose output has this shape, without the batch axis."""
    return Block(
        name="layer",
        target="block_0",
        nodes=("layer",),
        output="layer",
        shape=shape,
        channel_axis=axis,
        inputs=("x",),
        sides=(),
        detached=(),
        modules=("layer",),
        parameters=("layer.weight",),
        num_parameters=1,
        macs=1,
        activation_bytes=1,
        mask=mask,
    )


def step_scores(net: fx.GraphModule, *x: Tensor) -> list[Tensor]:
    """Return each block's goodness and the logits with their graphs, as the readout gets them."""
    seen: list[Tensor] = []
    handle = net.get_submodule("readout").register_forward_pre_hook(
        lambda _, args: seen.extend(args[0])
    )
    net(*x)
    handle.remove()
    return seen
