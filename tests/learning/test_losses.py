from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sffx
from sffx.errors import InputError
from sffx.learning.losses import MISMATCHES


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
        (
            torch.zeros(2, 5, 4),
            torch.tensor([1, 2, 3, 4, 1]),
            r"labels run from 1 to 4.*Hint: the first class is 0, pass y - 1",
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


def difference(scores, y):
    return (scores - y).abs().mean()


def of_pairs(scores, y):
    assert len(y) == 2 * len(scores), "no pairs"
    return F.cross_entropy(scores, y[::2])


@pytest.mark.parametrize(
    ("loss_fn", "y"),
    [
        (F.cross_entropy, torch.zeros(4)),
        (F.cross_entropy, torch.tensor([0, 1, 2, 3])),
        (nn.CrossEntropyLoss(), torch.zeros(5).long()),
        (nn.CrossEntropyLoss(weight=torch.ones(5)), torch.zeros(4).long()),
        (nn.CrossEntropyLoss(), [0, 1, 2, 0]),
        (nn.BCEWithLogitsLoss(), torch.zeros(4)),
        (nn.BCEWithLogitsLoss(), torch.zeros(4, 3).long()),
        (nn.MultiMarginLoss(), torch.tensor([0, 1, 2, 3])),
        (difference, torch.zeros(4)),
        (of_pairs, torch.zeros(4).long()),
        (lambda scores, y: F.cross_entropy(scores, y["label"]), {"labels": torch.zeros(4).long()}),
    ],
)
def test_what_fails_in_a_loss_is_told_with_its_block_its_scores_and_targets(loss_fn, y):
    x = torch.randn(4, 6)
    layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(MISMATCHES) as of_model:
        loss_fn(layers(x), y)
    net = sffx.transform(layers, "layer", x, check=False)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    only_last = {"block_0": lambda scores, y: scores.mean(), "classifier": loss_fn}
    described = f"{tuple(y.shape)} of {y.dtype}" if isinstance(y, torch.Tensor) else "of type "
    for function, block in ((loss_fn, "block_0"), (only_last, "classifier")):
        for train in (
            lambda own: sffx.local_loss(net, x, y, own),
            lambda own: sffx.local_step(net, x, y, optimizer, own),
            lambda own: sffx.sff_loss(net(x), y, own),
        ):
            with pytest.raises(InputError, match=r"Hint: ") as caught:
                train(function)
            message = str(caught.value)
            assert message.startswith(f"the loss of {block} failed on scores (4, 3) of torch.float")
            assert f"and y {described}" in message
            assert type(caught.value.__cause__) is of_model.type


class Stopped(RuntimeError):
    """An error that a user raises on purpose."""


@pytest.mark.parametrize("error", [Stopped(), torch.OutOfMemoryError(), InputError("mine")])
def test_an_error_that_a_loss_raises_on_purpose_stays_as_it_is(error):
    def stop(scores, y):
        raise error

    with pytest.raises(type(error)) as caught:
        sffx.sff_loss(torch.zeros(2, 5, 4), torch.zeros(5).long(), stop)
    assert caught.value is error
