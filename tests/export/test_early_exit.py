"""The oracles are the ensemble of the cut model, and the goodness that its readout is given."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import sffx
from sffx.export.early_exit import NEVER
from sffx.runtime.evaluate import block_scores
from tests import toys


def means(net: fx.GraphModule, x: Any) -> Tensor:
    """Return the cumulative ensembles by hand, (K, B, J)."""
    goodness = block_scores(copy.deepcopy(net).eval(), x)[:-1]
    return torch.stack([goodness[: i + 1].mean(0) for i in range(len(goodness))]).detach()


def middle_threshold(net: fx.GraphModule, x: Tensor) -> float:
    return float(means(net, x)[0].softmax(1).amax(1).median())


def counted(runner: sffx.EarlyExit) -> list[int]:
    """Let each stage note the number of samples that it is given."""
    seen: list[int] = []

    def watch(stage: Any) -> Any:
        def run(*values: Any) -> Any:
            seen.append(len(values[0]))
            return stage.run(*values)

        return dataclasses.replace(stage, run=run)

    runner.stages = tuple(map(watch, runner.stages))
    return seen


def test_without_a_reachable_threshold_the_scores_are_the_ensemble_bit_by_bit(
    net: fx.GraphModule, x: Tensor
) -> None:
    assert net.training
    result = sffx.EarlyExit(net, threshold=NEVER)(x)
    assert net.training
    with torch.no_grad():  # with gradients some layers take another way, equal up to rounding
        assert torch.equal(result.scores, copy.deepcopy(net).eval()(x))
    assert result.blocks.tolist() == [len(net.plan)] * len(x)


def test_a_sample_that_left_is_not_computed_further_and_keeps_its_scores(
    net: fx.GraphModule, x: Tensor
) -> None:
    threshold = middle_threshold(net, x)
    runner = sffx.EarlyExit(net, threshold)
    seen = counted(runner)
    result = runner(x)

    expected = means(net, x)
    sure = expected.softmax(2).amax(2) >= threshold
    sure[-1] = True
    blocks = sure.int().argmax(0) + 1
    assert result.blocks.tolist() == blocks.tolist()
    assert len(set(blocks.tolist())) > 1
    torch.testing.assert_close(result.scores, expected[blocks - 1, torch.arange(len(x))])
    assert seen == [
        n for n in (int((blocks >= depth).sum()) for depth in range(1, len(net.plan) + 1)) if n
    ]


def test_blocks_that_no_sample_needs_are_not_run(net: fx.GraphModule, x: Tensor) -> None:
    runner = sffx.EarlyExit(net, threshold=1e-6)
    seen = counted(runner)
    result = runner(x)
    assert seen == [len(x)]
    assert result.macs == runner.stages[0].macs


def test_multiply_adds_are_those_of_blocks_and_heads() -> None:
    net = sffx.transform(toys.Chain(4), "layer", torch.zeros(1, 3, 8, 8), kernel_size=3)
    first, second = sffx.EarlyExit(net).stages
    assert first.macs == 3 * 9 * 6 * 64 + 6 * 9 * 4 * 64
    assert second.macs == 6 * 9 * 8 * 16 + 8 * 9 * 4 * 16


def test_values_that_cross_a_cut_are_thinned_out_with_the_batch() -> None:
    torch.manual_seed(0)
    x = {
        "input_ids": torch.randint(0, 20, (12, 5)),
        "attention_mask": torch.ones(12, 5, dtype=torch.int64),
    }
    x["attention_mask"][::2, 3:] = 0
    net = sffx.transform(toys.Tokens(), example_input=x).eval()
    runner = sffx.EarlyExit(net, threshold=float(means(net, x)[0].softmax(1).amax(1).median()))
    result = runner(x)
    assert set(result.blocks.tolist()) > {1}
    torch.testing.assert_close(result.scores, means(net, x)[result.blocks - 1, torch.arange(12)])


class SharedRows(nn.Module):
    """Two rows of a parameter, which cross the cut: as many as a batch of two has samples."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, 6))
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.tanh(self.table)
        x = torch.relu(self.first(x) + rows[0])
        x = torch.relu(self.second(x) + rows[1])
        return self.head(x)


def test_a_value_without_a_batch_axis_is_not_thinned_out() -> None:
    torch.manual_seed(0)
    net = sffx.transform(SharedRows(), "layer", torch.zeros(1, 6)).eval()
    x = torch.randn(12, 6)
    runner = sffx.EarlyExit(net, middle_threshold(net, x))
    shared = set(runner.stages[1].inputs) - runner.batched.keys()
    assert len(shared) == 1
    result = runner(x)
    assert set(result.blocks.tolist()) == {1, 2}
    torch.testing.assert_close(result.scores, means(net, x)[result.blocks - 1, torch.arange(12)])


def test_curve_ends_in_the_ensemble_and_each_point_is_what_the_runner_does(
    net: fx.GraphModule, x: Tensor
) -> None:
    y = torch.randint(0, 4, (len(x),), generator=torch.Generator().manual_seed(2))
    loader = [(x[:25], y[:25]), (x[25:], y[25:])]
    runner = sffx.EarlyExit(net)
    curve = runner.curve(loader)
    assert curve.samples == len(x)
    assert curve.points[-1].accuracy == pytest.approx(
        sffx.evaluate(net, loader).accuracy["ensemble"]
    )
    assert [point.macs for point in curve.points] == sorted(point.macs for point in curve.points)
    assert str(curve).splitlines()[-1].split()[0] == "none"
    point = curve.points[len(curve.points) // 2]
    runner.threshold = point.threshold + 1e-7
    (point,) = runner.curve(loader, [runner.threshold]).points[:1]
    result = runner(x)
    assert result.macs == pytest.approx(point.macs)
    assert float((result.scores.argmax(1) == y).float().mean()) == pytest.approx(point.accuracy)


def test_calibration_takes_the_cheapest_threshold_that_is_accurate_enough(
    net: fx.GraphModule, x: Tensor
) -> None:
    y = means(net, x)[-1].argmax(1)
    runner = sffx.EarlyExit(net)
    assert runner.calibrate([(x, y)], accuracy=0.0).blocks == 1
    chosen = runner.calibrate([(x, y)])
    assert chosen.accuracy == 1
    assert runner.threshold == chosen.threshold
    assert chosen.macs == min(
        point.macs for point in runner.curve([(x, y)]).points if point.accuracy == 1
    )
    with pytest.raises(
        sffx.InputError,
        match=r"no threshold reaches an accuracy of 1\.0\. "
        r"Hint: the best on these 40 samples is 0\.\d+",
    ):
        runner.calibrate([(x, (y + 1) % 4)], accuracy=1.0)


@pytest.mark.parametrize("threshold", [-1.0, float("nan"), "0.9", True])
def test_threshold_that_is_no_confidence_is_refused(net: fx.GraphModule, threshold: float) -> None:
    with pytest.raises(sffx.InputError, match=r"the threshold is .*Hint: pass a number from 0 on"):
        sffx.EarlyExit(net, threshold)


@pytest.mark.parametrize("threshold", [-1.0, float("nan")])
def test_a_curve_drops_no_threshold_in_silence(net: fx.GraphModule, threshold: float) -> None:
    x, y = torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
    with pytest.raises(sffx.InputError, match=r"thresholds holds .*Hint: pass numbers from 0 on"):
        sffx.EarlyExit(net).curve([(x, y)], [0.5, threshold])


def test_at_a_threshold_of_zero_all_samples_stop_first(net: fx.GraphModule) -> None:
    x, y = torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
    runner = sffx.EarlyExit(net, 0)
    assert runner(x).blocks.tolist() == [1, 1, 1, 1]
    assert runner.curve([(x, y)], torch.linspace(0, 1, 3).tolist()).points[0].blocks == 1


class Wider(nn.Module):
    """Computes its second half in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6).double()
        self.last = nn.Linear(6, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).relu().double()).relu())


def test_blocks_may_answer_in_wider_floats() -> None:
    torch.manual_seed(0)
    net = sffx.transform(Wider(), "layer", torch.zeros(1, 6)).eval()
    x = torch.randn(32, 6)
    whole = sffx.EarlyExit(net).cumulative(x)
    middle = float(whole[0].softmax(1).amax(1).median())
    result = sffx.EarlyExit(net, middle)(x)
    assert set(result.blocks.tolist()) == {1, 2}
    expected = whole[result.blocks - 1, torch.arange(32)]
    torch.testing.assert_close(result.scores, expected, check_dtype=False, rtol=1e-6, atol=1e-6)


def test_wrong_inputs_and_loaders_are_refused(net: fx.GraphModule, x: Tensor) -> None:
    runner = sffx.EarlyExit(net)
    with pytest.raises(sffx.InputError, match=r"x holds 2 inputs, but the model takes 1: x"):
        runner((x, x))
    with pytest.raises(sffx.InputError, match="no samples"):
        runner.curve([])
    with pytest.raises(sffx.InputError, match=r"a Tensor, not a pair"):
        runner.curve([x])


def test_the_default_device_is_not_asked(net: fx.GraphModule, x: Tensor) -> None:
    y = torch.zeros(len(x), dtype=torch.int64)
    runner = sffx.EarlyExit(net, threshold=middle_threshold(net, x))
    expected = runner(x)
    curve = runner.curve([(x, y)])
    with torch.device("meta"):
        found = runner(x)
        assert runner.curve([(x, y)]) == curve
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.blocks, expected.blocks)
    assert found.macs == expected.macs
