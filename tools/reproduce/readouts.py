"""Ways to read a class off the scores of all blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
from sffx.learning.readouts import READOUTS, every_mode
from sffx.runtime.weigh import mixture_weights
from tools.reproduce.data import Images, Split, in_order

PROBE_BATCH = 500
PROBE_EPOCHS = 20
PROBE_RATE = 1e-3


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
    net: nn.Module, data: Split, seed: int, *, last: bool = False
) -> Callable[[Images], Tensor]:
    """Train a linear probe on trained blocks, and return what gives its logits, (N, J).

    Args:
        net: the trained net.
        data: the probe learns from the training images.
        seed: of the probe.
        last: whether it reads the last block only, and not all that predict.
    """
    torch.manual_seed(seed)
    probe = sffx.LinearProbe(net)
    if last:
        probe = sffx.LinearProbe(net, probe.blocks[-1:])

    def features(images: Images) -> Tensor:
        parts = [probe.features(data.scaled(x)) for x, _ in in_order(images, PROBE_BATCH)]
        return torch.cat(parts)

    x, y = features(data.train), data.train.y
    optimizer = torch.optim.Adam(probe.linear.parameters(), PROBE_RATE)
    for _ in range(PROBE_EPOCHS):
        for index in torch.randperm(len(y)).split(PROBE_BATCH):
            optimizer.zero_grad()
            F.cross_entropy(probe.linear(x[index]), y[index]).backward()
            optimizer.step()

    @torch.no_grad()
    def logits(images: Images) -> Tensor:
        return probe.linear(features(images))

    return logits


def block_losses(scores: Tensor, y: Tensor) -> list[float]:
    """Return the mean cross-entropy of each block's scores, (K, N, J)."""
    return [float(F.cross_entropy(s, y)) for s in scores]
