"""Ways to read a class off the scores of all blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sffx.learning.readouts import mixture
from sffx.runtime.weigh import mixture_weights


def accuracy(scores: Tensor, y: Tensor) -> float:
    """Return the share of samples, scores (N, J) and class indices (N,), whose highest score is their label's."""
    return float((scores.argmax(1) == y).float().mean())


def readouts(scores: Tensor, validation: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return each readout's scores, (N, J), by its name.

    Args:
        scores: what each block says, the classifier last, (K, N, J).
        validation: the same for the validation images, (K, V, J).
        y: class indices of the validation images, (V,); the weights of the weighted mean come from them.
    """
    if len(scores) == 1:
        return {"classifier": scores[0]}
    weights = mixture_weights(validation[:-1].log_softmax(2)[:, torch.arange(len(y)), y]).tolist()
    return {
        "ensemble": scores[:-1].mean(0),
        "mean of softmax": scores[:-1].softmax(2).mean(0),
        "weighted": mixture(scores[:-1], weights),
        "last": scores[-2],
        "classifier": scores[-1],
        "all and classifier": scores.softmax(2).mean(0),
    }


def judged(scores: Tensor, readout: str) -> Tensor:
    """Return from the scores of all blocks, (K, N, J), those of the readout by which a method is judged: "ensemble" or "classifier"."""
    return scores[:-1].mean(0) if readout == "ensemble" else scores[-1]


def block_losses(scores: Tensor, y: Tensor) -> list[float]:
    """Return the mean cross-entropy of each block's scores, (K, N, J)."""
    return [float(F.cross_entropy(s, y)) for s in scores]
