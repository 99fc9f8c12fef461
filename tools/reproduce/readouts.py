"""Ways to read a class off the scores of all blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
from sffx.learning.readouts import READOUTS, every_mode
from sffx.runtime.weigh import mixture_weights
from tools.reproduce.data import Images, Split, in_order

FEATURES_BATCH = 500


@dataclass(frozen=True)
class ProbeRecipe:
    """How a linear probe learns, by Adam at a rate of 0.001.

    Attributes:
        epochs: how many.
        batch: batch size.
        dropout: of the features.
        halvings: of the rate, as shares of the epochs.
    """

    epochs: int = 20
    batch: int = 500
    dropout: float = 0.0
    halvings: tuple[float, ...] = ()


SHORT_PROBE = ProbeRecipe()
# The probe of SCFF's authors, but for their batches of 64.
LONG_PROBE = ProbeRecipe(
    epochs=50, batch=256, dropout=0.2, halvings=(0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9)
)


def accuracy(scores: Tensor, y: Tensor) -> float:
    """Return the share of samples whose highest score, (N, J), is that of their label, (N,)."""
    return float((scores.argmax(1) == y).float().mean())


def readouts(scores: Tensor, validation: Tensor, y: Tensor, skips: int = 0) -> dict[str, Tensor]:
    """Return each readout's scores, (N, J), by its name.

    Args:
        scores: of each block, the classifier's last, (K, N, J).
        validation: the same for the validation images, (K, V, J). They give the weights of
            "weighted".
        y: class indices of the validation images, (V,).
        skips: how many of the first blocks the ensemble leaves out.
    """
    if len(scores) == 1:
        return {"classifier": scores[0]}
    blocks = scores[:-1]
    log_shares = validation[:-1].log_softmax(2)
    weights = mixture_weights(log_shares[:, torch.arange(len(y)), y]).tolist()
    return {
        **every_mode(scores, weights, skips=skips),
        "mean of softmax": blocks.softmax(2).mean(0),
        "all and classifier": scores.softmax(2).mean(0),
    }


def judged(scores: Tensor, readout: str, skips: int = 0) -> Tensor:
    """Return the scores, (N, J), by which a method is judged.

    Args:
        scores: of all blocks, (K, N, J).
        readout: "ensemble", "last" or "classifier".
        skips: as for `readouts`.
    """
    return READOUTS[readout](scores, skips=skips)


def probed(
    net: nn.Module, data: Split, seed: int, recipe: ProbeRecipe, *, last: bool = False
) -> Callable[[Images], Tensor]:
    """Train a linear probe on trained blocks, and return what gives its logits, (N, J).

    Args:
        net: the trained net.
        data: the probe learns from the training images.
        seed: of the probe.
        recipe: how it learns.
        last: whether it reads the last block only, and not all that predict.
    """
    torch.manual_seed(seed)
    probe = sffx.LinearProbe(net)
    if last:
        probe = sffx.LinearProbe(net, probe.blocks[-1:])

    def features(images: Images) -> Tensor:
        parts = [probe.features(data.scaled(x)) for x, _ in in_order(images, FEATURES_BATCH)]
        return torch.cat(parts)

    fit_probe(probe.linear, features(data.train), data.train.y, recipe)

    @torch.no_grad()
    def logits(images: Images) -> Tensor:
        return probe.linear(features(images))

    return logits


def fit_probe(linear: nn.Linear, features: Tensor, y: Tensor, recipe: ProbeRecipe) -> None:
    """Train the linear layer of a probe.

    Args:
        linear: is trained.
        features: of the training images, (N, units).
        y: their classes, (N,).
        recipe: how it learns.
    """
    optimizer = torch.optim.Adam(linear.parameters(), 1e-3)
    milestones = [int(recipe.epochs * share) for share in recipe.halvings]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.5)
    for _ in range(recipe.epochs):
        for index in torch.randperm(len(y)).split(recipe.batch):
            x = features[index].float()
            if recipe.dropout:
                x = F.dropout(x, recipe.dropout)
            optimizer.zero_grad()
            F.cross_entropy(linear(x), y[index]).backward()
            optimizer.step()
        scheduler.step()


def block_losses(scores: Tensor, y: Tensor) -> list[float]:
    """Return the mean cross-entropy of each block's scores, (K, N, J)."""
    return [float(F.cross_entropy(s, y)) for s in scores]
