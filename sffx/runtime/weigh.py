"""Weigh the blocks of a trained model by held-out samples: early blocks often know less."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sffx.errors import InputError
from sffx.learning.readouts import WEIGHTED
from sffx.net import cut_model
from sffx.runtime.evaluate import scored
from sffx.runtime.modes import evaluating

MOST_ROUNDS = 2000
CONVERGED = 1e-6  # The search ends when no weight changes by more.
SMALLEST_WEIGHT = 1e-3  # A smaller weight becomes zero.


@torch.no_grad()
def weigh(net: nn.Module, loader: Iterable[Any]) -> dict[str, float]:
    """Weigh the blocks by held-out samples, and let eval mode return their weighted mixture.

    The mixture is the weighted mean of the blocks' softmax. The weights are those that give the
    labels the highest likelihood. This is not the paper's readout, which is the mean of all blocks'
    goodness ("ensemble"). A block that adds next to nothing gets the weight zero. Exports leave it
    out where later blocks do not need it.

    Afterwards `net.readout.mode` is "weighted" and the weights are in the state dict. A net that
    loads this state dict has that mode as well. Weigh again after further training. `EarlyExit` and
    the readout "cumulative" do not use the weights.

    Args:
        net: what `transform` returned, trained.
        loader: yields (x, y), x as `net` takes it and y class indices, (B,): validation samples,
            which the net was not trained on.

    Returns:
        The weight of each block, by its name ("block_0", ...). They sum to 1.

    Raises:
        InputError: `net` is no cut model, the loader is empty or yields something else, labels are
            out of range, no block gives the labels a probability, or scores of the net's task are
            no probabilities. The net is as it was.
    """
    cut = cut_model(net)
    plan = cut.plan
    log_shares = []
    with evaluating(cut):
        for scores, y in scored(cut, loader):
            goodness = plan.task.aligned(scores)[:-1]
            of_blocks = [plan.task.log_likelihoods(own, y) for own in goodness]
            log_shares.append(torch.stack(of_blocks))
    weights = mixture_weights(torch.cat(log_shares, dim=1)).tolist()
    readout = cut.readout
    readout.weights = tuple(weights)
    readout.mode = WEIGHTED
    return {block.target: weight for block, weight in zip(plan, weights, strict=True)}


def mixture_weights(log_shares: Tensor) -> Tensor:
    """Return the mixture weights that give N labels the highest likelihood, (K,).

    They are found by expectation-maximisation.

    Args:
        log_shares: the logarithm of the probability that each of K components gives each label,
            (K, N). A value that is not a number, from a block that has diverged, counts as a
            probability of 0.

    Raises:
        InputError: no component gives any label a probability.
    """
    never = -torch.inf
    logs = log_shares.double().nan_to_num(nan=never, posinf=never, neginf=never)
    # A label to which no component gives a probability does not tell the components apart.
    is_possible = logs.max(0).values > never
    logs = logs[:, is_possible]
    if not logs.numel():
        raise InputError(
            "no block gives any of the labels a probability. "
            "Hint: a goodness that is nan tells of a diverged training"
        )
    # A common factor of a sample's shares changes nothing, so the largest becomes 1.
    shares = (logs - logs.max(0).values).exp()
    weights = shares.new_full((len(shares),), 1 / len(shares))
    for _ in range(MOST_ROUNDS):
        responsibilities = weights[:, None] * shares
        responsibilities /= responsibilities.sum(0)
        updated = responsibilities.mean(1)
        change = (updated - weights).abs().max()
        weights = updated
        if change < CONVERGED:
            break
    # The largest weight stays, whatever its size.
    smallest = min(SMALLEST_WEIGHT, float(weights.max()))
    weights[weights < smallest] = 0
    return weights / weights.sum()
