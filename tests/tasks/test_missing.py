"""Targets that are missing: nan, which a task leaves out if it is asked to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sffx
from sffx import tasks
from sffx.tasks.missing import MayLackTargets
from tests.tasks.cases import images


def flat() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def maps() -> nn.Module:
    return images(nn.Upsample(scale_factor=2), nn.Conv2d(6, 3, 1))


@dataclass
class Case:
    """A task with a model, the shapes of a batch, and the loss of one value."""

    task: type[MayLackTargets]
    model: Callable[[], nn.Module]
    policy: str
    input: tuple[int, ...]
    output: tuple[int, ...]
    loss: Callable[..., Tensor]

    def __repr__(self) -> str:
        return self.task.__name__

    def net(self, **options: bool) -> torch.fx.GraphModule:
        torch.manual_seed(0)
        task = self.task(**options)
        return sffx.transform(
            self.model(), self.policy, torch.zeros(2, *self.input), task=task, check=False
        )

    def batch(self, count: int = 6) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, *self.input)
        y = (torch.randn(count, *self.output) > 0).float()
        return x, y


binary = F.binary_cross_entropy_with_logits
CASES = [
    Case(tasks.Regression, flat, "layer", (4,), (3,), F.mse_loss),
    Case(tasks.MultiLabel, flat, "layer", (4,), (3,), binary),
    Case(tasks.DenseRegression, maps, "batchnorm", (3, 8, 8), (3, 8, 8), F.mse_loss),
    Case(tasks.MultiLabelSegmentation, maps, "batchnorm", (3, 8, 8), (3, 8, 8), binary),
]
every_case = pytest.mark.parametrize("case", CASES, ids=repr)


def with_gaps(y: Tensor, share: float = 0.4) -> Tensor:
    return y.masked_fill(torch.rand(y.shape) < share, torch.nan)


@every_case
def test_the_loss_and_its_gradients_are_those_of_the_values_that_are_there(case):
    net = case.net(skip_nan=True).train()
    x, y = case.batch()
    y = with_gaps(y)
    is_there = ~y.isnan()
    # The classifier has the resolution of y, so its loss is that of the values one by one.
    scores = net(x)[-1]
    expected = case.loss(scores[is_there], y[is_there])
    wanted = torch.autograd.grad(expected, list(net.classifier.parameters()))
    losses = sffx.block_losses(net, x, y)
    torch.testing.assert_close(losses["classifier"], expected.detach())
    sffx.local_loss(net, x, y).backward()
    for parameter, gradient in zip(net.classifier.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert all(p.grad.isfinite().all() for p in net.parameters())


@every_case
def test_a_batch_without_gaps_has_the_same_loss_and_metrics(case):
    x, y = case.batch()
    results = []
    for options in ({}, {"skip_nan": True}):
        net = case.net(**options)
        results.append((sffx.block_losses(net.train(), x, y), sffx.evaluate(net, [(x, y)])))
    torch.testing.assert_close(results[0][0], results[1][0])
    found, expected = results[1][1].metrics, results[0][1].metrics
    assert found == {name: pytest.approx(of) for name, of in expected.items()}


@every_case
def test_a_batch_of_nothing_else_has_a_loss_of_0_and_no_gradient(case):
    net = case.net(skip_nan=True).train()
    x, y = case.batch()
    loss = sffx.local_loss(net, x, torch.full_like(y, torch.nan))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())


@every_case
def test_missing_values_do_not_count_in_metrics_and_batches_may_be_cut_anywhere(case):
    net = case.net(skip_nan=True)
    x, y = case.batch(8)
    y = with_gaps(y)
    whole = sffx.evaluate(net, [(x, y)])
    parts = sffx.evaluate(net, [(x[:3], y[:3]), (x[3:], y[3:])])
    assert whole.metrics == {name: pytest.approx(of) for name, of in parts.metrics.items()}
    # Other values in the place of those that are missing would change them.
    assert sffx.evaluate(net, [(x, y.nan_to_num(nan=1.0))]).loss != whole.loss


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(2, 9), st.integers(0, 1000))
def test_metrics_of_numbers_are_those_of_each_output_s_own_samples(outputs, samples, seed):
    torch.manual_seed(seed)
    scores, y = torch.randn(2, samples, outputs)
    y = with_gaps(y)
    y[:2] = torch.randn(2, outputs)  # R2 needs two
    task, plain = tasks.Regression(skip_nan=True), tasks.Regression()
    r2 = []
    for found, wanted in zip(scores.T, y.T, strict=True):
        is_there = ~wanted.isnan()
        r2 += plain.by_class(plain.sums(found[is_there], wanted[is_there]))
    sums = task.sums(scores, y)
    assert task.by_class(sums) == pytest.approx(r2)
    is_there = ~y.isnan()
    expected = F.mse_loss(scores[is_there], y[is_there]).item()
    assert task.metrics(sums)["mse"] == pytest.approx(expected, rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 1000))
def test_metrics_of_labels_are_those_of_each_label_s_own_samples(labels, samples, seed):
    torch.manual_seed(seed)
    scores = torch.randn(samples, labels)
    y = with_gaps((torch.randn(samples, labels) > 0).float())
    task, plain = tasks.MultiLabel(skip_nan=True), tasks.MultiLabel()
    f1 = []
    for found, wanted in zip(scores.T, y.T, strict=True):
        is_there = ~wanted.isnan()
        f1 += plain.by_class(plain.sums(found[is_there, None], wanted[is_there, None]))
    sums = task.sums(scores, y)
    assert task.by_class(sums) == pytest.approx(f1)
    is_there = ~y.isnan()
    if is_there.any():
        right = (scores[is_there] > 0) == (y[is_there] > 0.5)
        assert task.metrics(sums)["accuracy"] == pytest.approx(right.float().mean().item())
    assert len(task.log_likelihoods(scores, y)) == int(is_there.sum())


def test_a_coarse_block_learns_the_mean_of_the_pixels_that_count():
    case = CASES[2]
    net = case.net(skip_nan=True).train()
    x, y = case.batch()
    y[0, 0, 0, 0] = torch.nan  # one of the four pixels of a position
    y[1, :, 2:4, 2:4] = torch.nan  # all of them
    coarse = net(x)[0]
    assert coarse.shape[2:] == (4, 4)
    wanted = torch.nanmean(y.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4), dim=4)
    is_there = ~wanted.isnan()
    assert (~is_there).sum() == 3
    expected = F.mse_loss(coarse[is_there], wanted[is_there]).detach()
    torch.testing.assert_close(sffx.block_losses(net, x, y)["block_0"], expected)


@every_case
def test_nan_is_refused_without_the_option_and_the_error_names_it(case):
    net = case.net().train()
    x, y = case.batch()
    message = rf"values that are nan.*Hint.*{case.task.__name__}\(skip_nan=True\)"
    for call in (sffx.local_loss, lambda net, x, y: sffx.evaluate(net, [(x, y)])):
        with pytest.raises(sffx.InputError, match=message):
            call(net, x, with_gaps(y))


@every_case
def test_other_wrong_values_are_still_refused(case):
    net = case.net(skip_nan=True).train()
    x, y = case.batch()
    with pytest.raises(sffx.InputError, match=r"not finite|runs from"):
        sffx.local_loss(net, x, with_gaps(y).index_fill(0, torch.tensor([1]), torch.inf))


@every_case
def test_a_checkpoint_keeps_the_option(case, tmp_path):
    net = case.net(skip_nan=True)
    sffx.save_checkpoint(tmp_path / "net.pt", net)
    loaded = sffx.load_checkpoint(tmp_path / "net.pt").net(case.model())
    assert loaded.plan.task.skip_nan
    assert loaded.plan.task == net.plan.task


@every_case
def test_an_option_that_is_no_flag_is_refused(case):
    with pytest.raises(sffx.InputError, match="skip_nan is 'no'"):
        case.task(skip_nan="no")
