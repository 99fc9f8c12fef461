"""Weigh the blocks of a trained model by samples that it was not trained on: early blocks often know less than late ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sffx.compiler.plan import plan_of
from sffx.learning.readout import WEIGHTED, readout_of
from sffx.training.evaluate import evaluating, scored

ROUNDS = 200
LEAST = 1e-3  # of a weight that is kept


@torch.no_grad()
def weigh(net: fx.GraphModule, loader: Iterable[Any]) -> dict[str, float]:
    """Weigh the blocks by held-out samples, and let eval mode return the weighted mixture of what they say.

    The mixture is the mean of the blocks' softmax by weights that give the labels the highest likelihood. It is not the paper's readout,
    which is the mean of all blocks' goodness ("ensemble"). A block that adds nothing gets no weight, and is left out of what is exported.

    Afterwards `net.readout.mode` is "weighted", and the weights are in the state dict.

    Args:
        net: what `transform` returned, trained.
        loader: yields (x, y), x as `net` takes it and y class indices (B,): validation samples, which the net was not trained on.

    Returns:
        The weight of each block, by its name ("block_0", ...); they sum to 1.

    Raises:
        InputError: `net` is no cut model, the loader is empty or yields something else, or labels are out of range.
    """
    plan = plan_of(net)
    with evaluating(net):
        told = [F.cross_entropy(scores[:-1].movedim(2, 1), y.expand(len(plan), -1), reduction="none") for scores, y in scored(net, loader)]
    weights = mixture_weights(-torch.cat(told, dim=1)).tolist()
    readout = readout_of(net)
    readout.weights = tuple(weights)
    readout.mode = WEIGHTED
    return {block.target: weight for block, weight in zip(plan, weights, strict=True)}


def mixture_weights(log_shares: Tensor) -> Tensor:
    """Return the weights of a mixture, (K,), that give N labels the highest likelihood, by expectation-maximisation.

    Args:
        log_shares: the logarithm of the probability that each of K components gives each label, (K, N).
    """
    shares = (log_shares - log_shares.max(0).values).double().exp()  # a factor for each sample makes no difference
    weights = shares.new_full((len(shares),), 1 / len(shares))
    for _ in range(ROUNDS):
        parts = weights[:, None] * shares
        weights = (parts / parts.sum(0)).mean(1)
    weights[weights < min(LEAST, float(weights.max()))] = 0
    return weights / weights.sum()
