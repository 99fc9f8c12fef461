from __future__ import annotations

import pytest
import torch

from tests.compiler.trace.oracle import (
    Applies,
    assert_same_logits,
    cut_without_norms,
    leaf_names,
)
from tests.toys import around


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: x.view(len(x), -1),
        lambda m, x: x / float(x.shape[0]),
        lambda m, x: torch.stack([x[i] for i in range(x.shape[0])]),
        lambda m, x: torch.stack([m.inner(row) for row in x]),
        lambda m, x: x * 2 if x.shape[0] == 1 else x,
        lambda m, x: x * 2 if x.size(0) in (1, 2) else x,
        lambda m, x: x * 2 if x.size(0) % 2 else x,
        lambda m, x: x * 2 if x.size(0) // 2 > 1 else x,
        lambda m, x: x * 2 if x.numel() < 40 else x,
        lambda m, x: x * min(x.shape[0], 3),
        lambda m, x: x * int(x.shape[0] + 1),
        lambda m, x: x.view(int(x.numel()) // 6, 6),
    ],
)
def test_a_branch_on_the_batch_size_or_a_number_made_from_it_makes_a_leaf(code):
    model = around(Applies(code))
    net = cut_without_norms(model).train()
    assert leaf_names(net) == ["2"]
    assert "batch size" in net.plan.leaves[0].reason
    assert_same_logits(net, model)


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: x * 2 if x.shape[0] > 0 else x,
        lambda m, x: x * 2 if x.shape == (x.shape[0], 6) else x,
        lambda m, x: x * 2 if x.numel() == x.shape[0] * 6 else x,
    ],
)
def test_a_comparison_with_one_outcome_at_every_batch_size_is_traced(code):
    model = around(Applies(code))
    net = cut_without_norms(model).train()
    assert not net.plan.leaves
    assert_same_logits(net, model)
