from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import sffx
from sffx.errors import InputError


def test_the_loss_is_the_sum_over_blocks_of_the_papers_formula():
    g = torch.randn(3, 5, 4, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 0])
    expected = (
        sum(
            -(g[k, n, y[n]] - torch.log(torch.exp(g[k, n]).sum()))
            for k in range(3)
            for n in range(5)
        )
        / 5
    )
    torch.testing.assert_close(sffx.sff_loss(g, y), expected)


def test_half_precision_goodness_is_added_up_in_float32():
    goodness, y = torch.randn(2, 3, 4).bfloat16(), torch.tensor([0, 1, 2])
    loss = sffx.sff_loss(goodness, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, sffx.sff_loss(goodness.float(), y))


@pytest.mark.parametrize(
    ("goodness", "y", "message"),
    [
        (
            torch.zeros(5, 4),
            torch.zeros(5).long(),
            r"goodness has shape \(5, 4\), not \(K, B, J\)\. Hint: in eval mode",
        ),
        (
            torch.zeros(2, 5, 4),
            torch.tensor([0, 1, 2, 3, 4]),
            r"labels run from 0 to 4, but there are 4 classes, 0 to 3",
        ),
        (torch.zeros(2, 5, 4), torch.tensor([0, 1, 2, 3, -1]), r"labels run from -1 to 3"),
        (torch.zeros(2, 5, 4), torch.zeros(4).long(), r"y has shape \(4,\), not \(5,\)"),
        (torch.zeros(2, 5, 4), torch.zeros(5, 4).long(), r"y has shape \(5, 4\), not \(5,\)"),
        (torch.zeros(2, 5, 4), torch.zeros(5), r"y has dtype torch\.float32, not torch\.int64"),
    ],
)
def test_labels_and_goodness_that_do_not_fit(goodness, y, message):
    with pytest.raises(InputError, match=message):
        sffx.sff_loss(goodness, y)


def test_probabilities_are_targets_as_in_torch():
    goodness, y = torch.randn(3, 5, 4, dtype=torch.float64), torch.rand(5, 4).softmax(1)
    expected = sum(F.cross_entropy(g, y.double()) for g in goodness)
    torch.testing.assert_close(sffx.sff_loss(goodness, y), expected)


def test_a_loss_of_ones_own():
    goodness, y = torch.randn(3, 5, 4), torch.tensor([0, 3, -100, 1, 2])
    smooth = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    torch.testing.assert_close(
        sffx.sff_loss(goodness, y, smooth), sum(smooth(g, y) for g in goodness)
    )
    with pytest.raises(
        InputError,
        match=r"labels run from -100 to 3.*Hint: loss_fn=torch\.nn\.CrossEntropyLoss\(\) leaves",
    ):
        sffx.sff_loss(goodness, y)
    with pytest.raises(
        InputError,
        match=r"loss_fn returned a tensor of shape \(5,\), not a scalar\. Hint: the mean",
    ):
        sffx.sff_loss(goodness, y, torch.nn.CrossEntropyLoss(reduction="none"))
