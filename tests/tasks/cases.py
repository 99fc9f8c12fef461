"""A tiny model for each task, with a batch, valid targets, and the task's loss written by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
from sffx import tasks

IGNORED = 7


class Tokens(nn.Module):
    """An embedding, two layers of convolution over tokens, a linear layer for each token."""

    def __init__(self, vocabulary: int, num_outputs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 8)
        self.first = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.output = nn.Linear(8, num_outputs)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = self.first(x).cumsum(1)
        return self.output(self.second(x))


class Patches(nn.Module):
    """Maps, then tokens of the pixels behind one of a class, then maps again."""

    def __init__(self, tokens: int = 17) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1, stride=2)
        self.start = nn.Parameter(torch.zeros(1, 1, 6))
        self.pool = nn.AdaptiveAvgPool1d(tokens) if tokens != 17 else nn.Identity()
        self.tokens = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.last = nn.Sequential(nn.Conv2d(6, 6, 1), nn.Tanh(), nn.Conv2d(6, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        start = self.start.expand(x.shape[0], 1, 6)
        tokens = torch.cat([start, x.flatten(2).transpose(1, 2)], 1)
        tokens = self.tokens(self.pool(tokens.mT).mT)
        tokens = F.interpolate(tokens.mT, x.shape[2] * x.shape[3]).unflatten(2, x.shape[2:])
        return self.last(F.interpolate(tokens, scale_factor=2.0))


def images(*tail: nn.Module) -> nn.Module:
    """Two convolutions with BN, the first of which halves the resolution."""
    return _convolutions(nn.Conv2d, nn.BatchNorm2d, *tail)


def signals() -> nn.Module:
    """Two convolutions with BN along the time, the first of which halves the resolution."""
    tail = (nn.Upsample(scale_factor=2), nn.Conv1d(6, 3, 1))
    return _convolutions(nn.Conv1d, nn.BatchNorm1d, *tail)


def _convolutions(conv: Any, norm: Any, *tail: nn.Module) -> nn.Module:
    return nn.Sequential(
        conv(3, 6, 3, stride=2, padding=1),
        norm(6),
        nn.ReLU(),
        conv(6, 6, 3, padding=1),
        norm(6),
        nn.ReLU(),
        *tail,
    )


def squared_error(scores: Tensor, y: Tensor) -> Tensor:
    return ((scores.reshape(len(y), -1) - y.reshape(len(y), -1)) ** 2).mean()


def squared_error_of_means(scores: Tensor, y: Tensor) -> Tensor:
    """Return the squared error to the means of the targets that fall into a place of the scores."""
    return ((scores - means_like(scores, y)) ** 2).mean()


def binary_entropy_of_means(scores: Tensor, y: Tensor) -> Tensor:
    """Return the entropy where a label is there with the share of the pixels that have it."""
    return binary_entropy(scores, means_like(scores, y))


def means_like(scores: Tensor, y: Tensor) -> Tensor:
    """Return the means of the targets that fall into a place of the scores."""
    side = y.shape[2] // scores.shape[2]
    for axis in range(2, y.ndim):
        y = y.unflatten(axis, (-1, side)).mean(axis + 1)
    return y


def squared_error_of_one_number(scores: Tensor, y: Tensor) -> Tensor:
    """Return the squared error of maps (B, H, W), or of blocks (B, 1, h, w)."""
    scores = scores if scores.ndim == 4 else scores[:, None]
    return squared_error_of_means(scores, y[:, None])


def binary_entropy(scores: Tensor, y: Tensor) -> Tensor:
    p = scores.sigmoid()
    return -(y * p.log() + (1 - y) * (1 - p).log()).mean()


def entropy_of_pixels(scores: Tensor, y: Tensor) -> Tensor:
    rows = scores.permute(0, 2, 3, 1).flatten(0, 2)
    return entropy_of_rows(rows, most_frequent(y, y.shape[1] // scores.shape[2]).flatten())


def entropy_of_signals(scores: Tensor, y: Tensor) -> Tensor:
    """Return the entropy where labels come in equal pairs, for scores of samples or of pairs."""
    labels = y[:, :: y.shape[1] // scores.shape[2]]
    return entropy_of_rows(scores.transpose(1, 2).flatten(0, 1), labels.flatten())


def most_frequent(y: Tensor, side: int) -> Tensor:
    """Return the most frequent label of each square of labels, what is left out or else the first.

    This is for labels (B, H, W) that a side divides.
    """
    squares = y.unfold(1, side, side).unfold(2, side, side).flatten(3)
    found = torch.empty(squares.shape[:3], dtype=torch.int64)
    order = [IGNORED, *range(IGNORED)]
    for place in torch.cartesian_prod(*map(torch.arange, found.shape)).tolist():
        labels = squares[tuple(place)].tolist()
        found[tuple(place)] = max(order, key=labels.count)
    return found


def entropy_of_tokens(scores: Tensor, y: Tensor) -> Tensor:
    return entropy_of_rows(scores.flatten(0, 1), y.flatten())


def entropy_of_next_tokens(scores: Tensor, y: Tensor) -> Tensor:
    return entropy_of_tokens(scores[:, :-1], y[:, 1:])


def entropy_of_rows(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of -log p over the labels that are not left out, one by one."""
    logs = scores.log_softmax(1)
    terms = []
    for row, label in zip(logs, labels.tolist(), strict=True):
        if label != IGNORED:
            terms.append(-row[label])
    return torch.stack(terms).mean()


@dataclass(frozen=True)
class Case:
    """A model with a task."""

    task: tasks.Task
    model: Callable[[], nn.Module]
    policy: str
    x: Callable[[int], Tensor]
    y: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]

    def batch(self, size: int = 4) -> tuple[Tensor, Tensor]:
        torch.manual_seed(size)
        x = self.x(size)
        return x, self.y(x)

    def net(self, **options: Any) -> Any:
        torch.manual_seed(0)
        x, _ = self.batch(2)
        chosen = {"task": self.task, "check": False, **options}
        return sffx.transform(self.model(), self.policy, x, **chosen)


def random_image(size: int) -> Tensor:
    return torch.randn(size, 3, 8, 8)


def random_scene(size: int) -> Tensor:
    """Return images of squares of 2 x 2 equal pixels."""
    squares = torch.randn(size, 3, 4, 4)
    return squares.repeat_interleave(2, 2).repeat_interleave(2, 3)


def random_signal(size: int) -> Tensor:
    """Return signals of pairs of equal samples."""
    return torch.randn(size, 3, 4).repeat_interleave(2, 2)


def labels_of_pixels(x: Tensor) -> Tensor:
    y = x.argmax(1)
    y[:, :2] = IGNORED
    return y


def some_ids(size: int) -> Tensor:
    return torch.randint(0, 6, (size, 5))


def labels_of_tokens(x: Tensor) -> Tensor:
    y = x % 4
    y[:, 2] = IGNORED
    return y


def next_ids(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 3] = IGNORED
    return y


def number(x: Tensor) -> Tensor:
    return x.mean((1, 2, 3))


CASES = {
    "regression": Case(
        tasks.Regression(),
        lambda: images(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)),
        "batchnorm",
        random_image,
        lambda x: x[:, :2].mean((2, 3)),
        squared_error,
    ),
    "one number": Case(
        tasks.Regression(),
        lambda: images(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 1), nn.Flatten(0)),
        "batchnorm",
        random_image,
        number,
        squared_error,
    ),
    "field": Case(
        tasks.DenseRegression(),
        lambda: images(nn.Upsample(scale_factor=2), nn.Conv2d(6, 2, 1)),
        "batchnorm",
        random_image,
        lambda x: x[:, :2] * x[:, 2:],
        squared_error_of_means,
    ),
    "depth": Case(
        tasks.DenseRegression(),
        lambda: images(nn.Upsample(scale_factor=2), nn.Conv2d(6, 1, 1), nn.Flatten(1, 2)),
        "batchnorm",
        random_image,
        lambda x: x[:, 0],
        squared_error_of_one_number,
    ),
    "forecast": Case(
        tasks.DenseRegression(),
        signals,
        "batchnorm",
        random_signal,
        lambda x: x.cumsum(2),
        squared_error_of_means,
    ),
    "labels": Case(
        tasks.MultiLabel(),
        lambda: images(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
        "batchnorm",
        random_image,
        lambda x: (x.mean((2, 3)) > 0).float(),
        binary_entropy,
    ),
    "masks": Case(
        tasks.MultiLabelSegmentation(),
        lambda: images(nn.Upsample(scale_factor=2), nn.Conv2d(6, 2, 1)),
        "batchnorm",
        random_image,
        lambda x: (x[:, :2] > x[:, 2:]).float(),
        binary_entropy_of_means,
    ),
    "pixels": Case(
        tasks.Segmentation(ignore_index=IGNORED),
        lambda: images(nn.Upsample(scale_factor=2), nn.Conv2d(6, 3, 1)),
        "batchnorm",
        random_scene,
        labels_of_pixels,
        entropy_of_pixels,
    ),
    "signal": Case(
        tasks.Segmentation(ignore_index=IGNORED),
        signals,
        "batchnorm",
        random_signal,
        labels_of_pixels,
        entropy_of_signals,
    ),
    "tokens": Case(
        tasks.TokenClassification(ignore_index=IGNORED),
        lambda: Tokens(6, 4),
        "module",
        some_ids,
        labels_of_tokens,
        entropy_of_tokens,
    ),
    "series": Case(
        tasks.TokenRegression(),
        lambda: Tokens(6, 2),
        "module",
        some_ids,
        lambda x: torch.stack([x.cumsum(1) / 6, x % 2], 2).float(),
        squared_error,
    ),
    "next token": Case(
        tasks.LanguageModel(ignore_index=IGNORED),
        lambda: Tokens(6, 6),
        "module",
        some_ids,
        next_ids,
        entropy_of_next_tokens,
    ),
}
IGNORING = ("pixels", "signal", "tokens", "next token")
CLASSES = Case(
    tasks.Classification(),
    lambda: images(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    "batchnorm",
    random_image,
    lambda x: x.mean((2, 3)).argmax(1),
    nn.functional.cross_entropy,
)
ALL = {"classes": CLASSES, **CASES}
