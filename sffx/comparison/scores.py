"""The scores of each block, on a batch and on the same samples in another order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from sffx.comparison.pair import copied_model
from sffx.comparison.runs import Run, copied, relative_error, run_model, seed, tolerance
from sffx.compiler.verify import twin
from sffx.net import plan_of
from sffx.runtime.walk import walk
from sffx.tensors import computed_tensors

# How often the weights are changed by about as much as rounding does. One time in two, this changes
# the sign of a sum of rounding errors.
_TRIALS = 8


def scores_of_blocks(
    net: fx.GraphModule, values: dict[str, Any], shaken: int | None = None
) -> list[Tensor]:
    """Return the scores of each block of a net in eval mode; the net is left as it is.

    Args:
        net: the net.
        values: of its inputs, by name.
        shaken: None, or the seed of changes to its weights, in the size of rounding.
    """
    probe = twin(net, computed_tensors(net)).eval()
    if shaken is not None:
        _shake(probe, shaken)
    # A model may draw random numbers in eval mode, too: the same ones each time.
    seed()
    # With gradients, since a forward may compute some.
    with torch.enable_grad():
        return [scores.detach() for _, scores in walk(probe, copied(values))]


def _shake(net: torch.nn.Module, number: int) -> None:
    """Change the weights of a net in the size of rounding."""
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.is_floating_point():
                size = 64 * torch.finfo(parameter.dtype).eps
                change = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.mul_(1 + size * change)


def rounding_decides(net: fx.GraphModule, values: dict[str, Any], index: int, error: float) -> bool:
    """Return whether rounding alone changes the scores of a block as much as an error.

    This is so where a forward branches on a sum that is zero but for rounding, as the sum of a
    layer-normed value is. Samples in another order are rounded otherwise.

    Args:
        net: the net.
        values: of its inputs, by name.
        index: of the block.
        error: relative to the largest score.
    """
    for ordered in (values, in_another_order(values)):
        scores = scores_of_blocks(net, ordered)[index]
        for number in range(_TRIALS):
            shaken = scores_of_blocks(net, ordered, number)[index]
            if relative_error(shaken, scores) > error / 10:
                return True
    return False


def in_another_order(values: Any) -> Any:
    """Return batches with the first sample last.

    A reversed order would not show that a forward reverses it.
    """
    return tree_map_only(Tensor, lambda tensor: tensor.roll(-1, 0), values)


def mixes_samples(model: torch.nn.Module, net: fx.GraphModule, run: Run) -> bool:
    """Return whether a model's logits of a sample depend on the order of the samples.

    Where the model gives no logits this cannot be told, and counts as such.
    """
    of_others = Run(run.name, run.training, in_another_order(run.values), run.grad)
    logits = []
    for each in (run, of_others):
        outcome = run_model(copied_model(model), each, plan_of(net))
        if not isinstance(outcome.logits, Tensor):
            return True
        logits.append(outcome.logits)
    error = relative_error(logits[1], in_another_order(logits[0]))
    return error > tolerance(logits[0].dtype)
