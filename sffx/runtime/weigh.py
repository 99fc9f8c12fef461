"""Weigh the blocks of a trained model by samples that it was not trained on: early blocks often know less than late ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sffx.errors import InputError
from sffx.learning.readouts import WEIGHTED, readout_of
from sffx.net import plan_of
from sffx.runtime.evaluate import evaluating, scored

ROUNDS = 2000
STEADY = 1e-6  # a change of every weight by less ends the search
LEAST = 1e-3  # of a weight that is kept


@torch.no_grad()
def weigh(net: fx.GraphModule, loader: Iterable[Any]) -> dict[str, float]:
    """Weigh the blocks by held-out samples, and let eval mode return the weighted mixture of what they say.

    The mixture is the mean of the blocks' softmax by weights that give the labels the highest likelihood. It is not the paper's readout,
    which is the mean of all blocks' goodness ("ensemble"). A block that adds next to nothing gets no weight, and is left out of what is
    exported, where later blocks do not need it.

    Afterwards `net.readout.mode` is "weighted", and the weights are in the state dict; who loads it has that mode as well. Weigh again
    after further training. `EarlyExit` and the readout "cumulative" do not use the weights.

    Args:
        net: what `transform` returned, trained.
        loader: yields (x, y), x as `net` takes it and y class indices (B,): validation samples, which the net was not trained on.

    Returns:
        The weight of each block, by its name ("block_0", ...); they sum to 1.

    Raises:
        InputError: `net` is no cut model, the loader is empty or yields something else, labels are out of range, or no block gives the
            labels a probability. The net is as it was.
    """
    plan = plan_of(net)
    with evaluating(net):
        told = [
            F.cross_entropy(scores[:-1].movedim(2, 1), y.expand(len(plan), -1), reduction="none")
            for scores, y in scored(net, loader)
        ]
    weights = mixture_weights(-torch.cat(told, dim=1)).tolist()
    readout = readout_of(net)
    readout.weights = tuple(weights)
    readout.mode = WEIGHTED
    return {block.target: weight for block, weight in zip(plan, weights, strict=True)}


def mixture_weights(log_shares: Tensor) -> Tensor:
    """Return the weights of a mixture, (K,), that give N labels the highest likelihood, by expectation-maximisation.

    Args:
        log_shares: the logarithm of the probability that each of K components gives each label, (K, N). One that is not a number, as that
            of a block that has diverged, counts as a probability of 0.

    Raises:
        InputError: no component gives any label a probability.
    """
    told = log_shares.double().nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
    told = told[:, told.max(0).values > -torch.inf]
    if not told.numel():
        raise InputError(
            "no block gives any of the labels a probability. Hint: a goodness that is nan tells of a diverged training"
        )
    shares = (told - told.max(0).values).exp()  # a factor for each sample makes no difference
    weights = shares.new_full((len(shares),), 1 / len(shares))
    for _ in range(ROUNDS):
        parts = weights[:, None] * shares
        before, weights = weights, (parts / parts.sum(0)).mean(1)
        if (weights - before).abs().max() < STEADY:
            break
    weights[weights < min(LEAST, float(weights.max()))] = 0
    return weights / weights.sum()
