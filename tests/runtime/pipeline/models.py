"""Small models of many kinds, cut, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import sffx

CLASSES = 3
# The last batch of an epoch is smaller.
SIZES = (6, 6, 6, 4)


class Residual(nn.Module):
    """Convolution, batch norm and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(x)))


class Images(nn.Module):
    """A residual network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, bias=False)
        self.layers = nn.Sequential(*[Residual(5) for _ in range(4)])
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


class MaskedLayer(nn.Module):
    """Mixes the tokens that a mask names, and drops some values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        weights = mask / mask.sum(1, keepdim=True)
        mean = (x * weights[..., None]).sum(1, keepdim=True)
        return x + self.drop(torch.tanh(self.mix(x + mean)))


class Tokens(nn.Module):
    """An encoder of tokens. Each layer reads a value that was made from the mask at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([MaskedLayer(8) for _ in range(4)])
        self.head = nn.Linear(8, CLASSES)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask.double()
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head((x * mask[..., None]).sum(1))


def cut_images() -> fx.GraphModule:
    torch.manual_seed(0)
    model = Images().double()
    return sffx.transform(model, example_input=torch.zeros(2, 3, 6, 6, dtype=torch.float64))


def cut_tokens() -> fx.GraphModule:
    torch.manual_seed(0)
    ids = torch.zeros(2, 5, dtype=torch.int64)
    example = {"ids": ids, "attention_mask": torch.ones_like(ids)}
    return sffx.transform(Tokens().double(), example_input=example)


def images(seed: int = 0, sizes: tuple[int, ...] = SIZES) -> list[tuple[Any, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for size in sizes:
        x = torch.randn(size, 3, 6, 6, dtype=torch.float64, generator=generator)
        batches.append((x, torch.randint(0, CLASSES, (size,), generator=generator)))
    return batches


def tokens(seed: int = 0) -> list[tuple[Any, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for i, size in enumerate(SIZES):
        # Sequences of other lengths in each batch.
        ids = torch.randint(0, 11, (size, 4 + i), generator=generator)
        mask = torch.ones_like(ids)
        mask[: size // 2, -1] = 0
        x = {"ids": ids, "attention_mask": mask}
        batches.append((x, torch.randint(0, CLASSES, (size,), generator=generator)))
    return batches


MODELS = {"images": (cut_images, images), "tokens": (cut_tokens, tokens)}
