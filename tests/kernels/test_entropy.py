"""Cross-entropy that the blocks of a step share, against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sffx.kernels.entropy import SharedCrossEntropy
from tools.operations import counted_operations


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_has_the_value_and_the_gradient_of_autograd_to_the_bit(dtype):
    torch.manual_seed(0)
    y = torch.tensor([0, 3, 1, 1, 2])
    shared = SharedCrossEntropy(y)
    for size in (1.0, 30.0):
        scores = (size * torch.randn(5, 4, dtype=dtype)).requires_grad_()
        expected = F.cross_entropy(scores, y)
        (wanted,) = torch.autograd.grad(expected, scores)
        loss, gradient = shared(scores)
        assert torch.equal(loss, expected)
        assert torch.equal(gradient, wanted)
        assert not loss.requires_grad


def test_scores_of_several_dtypes_share_one_object():
    y = torch.tensor([0, 1])
    shared = SharedCrossEntropy(y)
    for dtype in (torch.float32, torch.float64, torch.float32):
        scores = torch.randn(2, 3, dtype=dtype)
        loss, gradient = shared(scores)
        assert (loss.dtype, gradient.dtype) == (dtype, dtype)
        assert torch.equal(loss, F.cross_entropy(scores, y))


def test_each_block_takes_three_operations_and_the_labels_two():
    shared = SharedCrossEntropy(torch.tensor([0, 1]))
    scores = torch.randn(2, 3)
    counts = []
    for _ in range(2):
        with counted_operations() as found:
            shared(scores)
        counts.append(found.total)
    assert counts == [3 + 2, 3]
