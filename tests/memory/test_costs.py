"""The bytes that blocks take, which the search for a budget reads."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

import sffx
from sffx.blocks import Options
from sffx.compiler.analyse import analyse
from sffx.compiler.spans import group_ends
from sffx.compiler.trace.trace import trace
from sffx.memory.costs import START, BlockCosts
from tests.toys import Chain, Residual, SharedWeight

BATCH = 32
IMAGE = torch.zeros(1, 3, 8, 8)


def costs_of(model: nn.Module, example: torch.Tensor, **options: object) -> BlockCosts:
    return BlockCosts(analyse(trace(model, example)), BATCH, Options(**options))


MODELS = [(Chain(), IMAGE), (Residual(), IMAGE), (SharedWeight(), torch.zeros(1, 6))]


def frozen_norm(block: sffx.Block) -> nn.Module:
    """Return a norm with tensors that are not trained."""
    return nn.LayerNorm(block.shape[-1:]).requires_grad_(False)


@pytest.mark.parametrize(("model", "example"), MODELS)
@pytest.mark.parametrize("recompute", [True, False])
def test_no_block_takes_less_than_its_bound_and_the_count_is_the_footprint(
    model, example, recompute
):
    costs = costs_of(model, example, recompute=recompute)
    ends = [*group_ends(costs.analysis), costs.places[-1]]
    spans = list(pairwise([START, *ends]))
    bounds = [costs.running(span) for span in spans]
    assert not any(costs.is_counted(span) for span in spans)
    costs.count(spans)
    counts = [costs.running(span) for span in spans]
    for bound, count in zip(bounds, counts, strict=True):
        assert bound <= count
    assert any(bounds)
    cuts = [costs.analysis.steps[end].node for end in ends[:-1]]
    net = sffx.transform(model, cuts, example, recompute=recompute)
    assert tuple(counts) == sffx.footprint(net, BATCH).running


@pytest.mark.parametrize(("model", "example"), MODELS)
@pytest.mark.parametrize("options", [{}, {"goodness": "mlp"}, {"norm": frozen_norm}])
def test_what_the_parts_own_is_what_the_cut_model_owns(model, example, options):
    costs = costs_of(model, example, **options)
    cuts = [costs.analysis.steps[place].node for place in costs.places[:-1]]
    net = sffx.transform(model, cuts, example, **options)
    starts = [START, *costs.places[:-1]]
    for i, block in enumerate(net.plan.all_blocks):
        parameters = list(net.get_submodule(block.target).parameters())
        span = (starts[i], costs.places[i])
        assert costs.trainable(span) == sum(p.nbytes for p in parameters)
    for i, place in enumerate(costs.places[:-1]):
        head = net.get_submodule(f"head_{i}")
        owned = costs.heads[place]
        tensors = [*head.parameters(), *head.buffers()]
        if "norm" in options:
            tensors += net.get_submodule(f"norm_{i}").parameters()
        assert owned.everything == sum(t.nbytes for t in tensors)
        assert owned.largest == max((p.nbytes for p in head.parameters()), default=0)
