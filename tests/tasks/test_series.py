"""Numbers of tokens: what counts, and the metrics over it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.tasks import Regression, TokenRegression

NAN = float("nan")


class Steps(nn.Module):
    """An LSTM with a number for each step, which sees no later step."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(3, 6, batch_first=True)
        self.second = nn.LSTM(6, 6, batch_first=True)
        self.last = nn.Linear(6, 1)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.last(self.second(self.first(x)[0])[0])


def cut(**options: object) -> sffx.net.CutModel:
    torch.manual_seed(0)
    x = torch.zeros(2, 5, 3)
    return sffx.transform(Steps(), "layer", x, task=TokenRegression(), **options).train()


def test_y_may_lack_the_axis_of_one_number():
    net, x, y = cut(), torch.randn(4, 5, 3), torch.randn(4, 5, 1)
    for loss_fn in (None, nn.functional.l1_loss):
        losses = sffx.block_losses(net, x, y, loss_fn)
        torch.testing.assert_close(sffx.block_losses(net, x, y[..., 0], loss_fn), losses)
    evaluation = sffx.evaluate(net, [(x, y)])
    assert sffx.evaluate(net, [(x, y[..., 0])]).metrics == evaluation.metrics


def test_tokens_that_are_nan_do_not_count():
    net, x = cut(), torch.randn(4, 7, 3)
    y = torch.randn(4, 7, 1)
    y[0], y[1, 3:] = NAN, NAN
    is_counted = ~y[..., 0].isnan()
    losses = sffx.block_losses(net, x, y)
    for own, loss in zip(net(x), losses.values(), strict=True):
        expected = nn.functional.mse_loss(own[is_counted], y[is_counted])
        torch.testing.assert_close(loss, expected.detach())
    sffx.local_loss(net, x, y).backward()
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters())
    plain, scores = Regression(), sffx.block_scores(net.eval(), x)[-1].detach()
    expected = plain.metrics(plain.sums(scores[is_counted], y[is_counted]))
    metrics = sffx.evaluate(net, [(x, y)]).metrics
    assert metrics["mse"]["classifier"] == pytest.approx(expected["mse"])
    assert metrics["r2"]["classifier"] == pytest.approx(expected["r2"])


def test_padding_does_not_count():
    torch.manual_seed(0)
    mask = torch.ones(4, 5, dtype=torch.int64)
    mask[1, 2:] = 0
    x, y = torch.randn(4, 5, 3), torch.randn(4, 5, 1)
    net = sffx.transform(
        Steps(), "layer", {"x": x, "attention_mask": mask}, task=TokenRegression(), check=False
    ).train()
    inputs = {"x": x, "attention_mask": mask}
    losses = sffx.block_losses(net, inputs, y)
    left_out = torch.where(mask[..., None] == 1, y, NAN)
    torch.testing.assert_close(sffx.block_losses(net, inputs, left_out), losses)


def test_no_score_depends_on_a_later_step():
    net, x = cut().eval(), torch.randn(4, 5, 3)
    later = x.clone()
    later[:, 3:] += 1
    for one, other in zip(sffx.block_scores(net, x), sffx.block_scores(net, later), strict=True):
        torch.testing.assert_close(one[:, :3], other[:, :3])


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.zeros(2, 5, 2), r"shape \(2, 5, 2\), not \(2, T, 1\).*Hint: the numbers of each"),
        (torch.zeros(2, 4, 1), r"shape \(2, 4, 1\), but the scores are of \(B, T\) = \(2, 5\)"),
        (torch.full((2, 5, 1), NAN), "is nan at each token.*Hint: leave this batch out"),
        (torch.full((2, 5, 1), float("inf")), "infinite.*Hint: nan leaves a token out"),
        (torch.zeros(2, 5, 1, dtype=torch.int64), r"no floats.*Hint: y\.float\(\)"),
    ],
)
def test_wrong_targets_are_refused(y, message):
    with pytest.raises(sffx.InputError, match=message):
        sffx.local_loss(cut(), torch.randn(2, 5, 3), y)


def test_the_hints_name_the_task():
    x = torch.zeros(2, 5, 3)
    for task in (None, Regression()):
        with pytest.raises(sffx.TraceError, match=r"\(B, T, N\), (pass )?task=.*TokenRegression"):
            sffx.plan(Steps(), "layer", x, task=task)
    flat = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(sffx.TraceError, match=r"return output\.unsqueeze\(2\)"):
        sffx.plan(flat, "layer", torch.zeros(2, 4), task=TokenRegression())
