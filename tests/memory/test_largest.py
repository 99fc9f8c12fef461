"""Backpropagation's peak beside sffx's own, and the largest batch within a budget."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sffx
from sffx.errors import InputError
from sffx.memory.count import count_memory
from sffx.memory.largest import largest_within
from tests.toys import Chain, Residual, SharedBias, TwoInputs


def image() -> torch.Tensor:
    return torch.zeros(1, 3, 8, 8)


class InARecord(Chain):
    """Returns its logits in a mapping, behind something else."""

    def forward(self, x):
        return OrderedDict(mean=x.mean(), logits=super().forward(x))


MODELS = {
    "chain": (Chain, image()),
    "residual": (Residual, image()),
    "side value": (SharedBias, torch.zeros(1, 6)),
    "two inputs": (TwoInputs, (torch.zeros(1, 6), torch.zeros(1, 5))),
}


def counted_backpropagation(model: nn.Module, example, batch_size: int) -> int:
    """Count the second step of a plain model with AdamW on real tensors."""
    examples = example if isinstance(example, tuple) else (example,)
    x = [torch.ones(batch_size, *each.shape[1:]) for each in examples]
    y = torch.zeros(batch_size, dtype=torch.int64)
    optimizer = torch.optim.AdamW(model.train().parameters())

    def step() -> None:
        F.cross_entropy(model(*x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return count_memory(step, model=model, optimizer=optimizer).peak


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [3, 64])
def test_backpropagation_is_counted_as_a_real_step_of_the_plain_model(name, batch_size):
    make, example = MODELS[name]
    model = make()
    net = sffx.transform(model, "layer", example)
    found = sffx.footprint(net, batch_size)
    expected = counted_backpropagation(model, example, batch_size)
    assert found.backpropagation == pytest.approx(expected, rel=0.001)
    assert f"peak by backpropagation: {expected / 2**20:.2f} " in str(found)


def test_logits_in_a_record_are_found():
    plain = sffx.footprint(sffx.transform(Chain(), "layer", image()), 8)
    record = sffx.footprint(sffx.transform(InARecord(), "layer", image()), 8)
    # The mean is held beside the logits.
    assert record.backpropagation == pytest.approx(plain.backpropagation, abs=64)


def test_a_plain_model_that_needs_values_has_no_peak():
    class Looks(Chain):
        def forward(self, x):
            if self.training and isinstance(x, torch._subclasses.FakeTensor):
                x.sum().item()
            return super().forward(x)

    net = sffx.transform(Chain(), "layer", image())
    net.origin.model.__class__ = Looks
    found = sffx.footprint(net, 8)
    assert found.backpropagation is None
    assert str(found).endswith("peak by backpropagation: unknown")
    assert sffx.largest_batch(net, "1 MiB").backpropagation is None


@pytest.mark.sampled(1)
@pytest.mark.parametrize("offloaded", [False, True])
def test_the_largest_batch_fits_and_the_next_one_does_not(offloaded):
    net = sffx.transform(Residual(), "residual", image())
    budget = 2**20
    found = sffx.largest_batch(net, "1 MiB", offloaded=offloaded)
    for size, fits in ((found.block_local, True), (found.block_local + 1, False)):
        assert (sffx.footprint(net, size, offloaded=offloaded).peak <= budget) is fits
    for size, fits in ((found.backpropagation, True), (found.backpropagation + 1, False)):
        assert (sffx.footprint(net, size).backpropagation <= budget) is fits
    assert str(found) == (
        f"largest batch within 1.00 MiB: {found.block_local:,} by block-local steps, "
        f"{found.backpropagation:,} by backpropagation"
    )


def test_a_budget_below_the_parameters_fits_no_sample():
    found = sffx.largest_batch(sffx.transform(Residual(), "residual", image()), 100)
    assert (found.block_local, found.backpropagation) == (0, 0)


def test_a_single_sample_that_batch_norm_refuses_is_no_batch():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    net = sffx.transform(model, "layer", torch.zeros(2, 4))
    with pytest.raises(InputError, match=r"cannot be trained with batch size 1: .* Hint: pass a"):
        sffx.footprint(net, 1)
    two = sffx.footprint(net, 2)
    below = min(two.peak, two.backpropagation) - 1
    found = sffx.largest_batch(net, below)
    assert (found.block_local, found.backpropagation) == (0, 0)
    net = sffx.transform(Residual(), "residual", image())
    one = sffx.footprint(net, 1)
    found = sffx.largest_batch(net, max(one.peak, one.backpropagation))
    assert 1 in (found.block_local, found.backpropagation)


@pytest.mark.parametrize("budget", ["much", 0, -5, None, "1.2.3 GiB", True])
def test_a_budget_that_is_none_is_refused(budget):
    net = sffx.transform(Residual(), "residual", image())
    with pytest.raises(InputError, match=r"the budget .* cannot be read. Hint: '2 GiB'"):
        sffx.largest_batch(net, budget)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(1, 1000), st.integers(1, 10**4)), min_size=1, max_size=4),
    st.integers(1, 10**8),
)
def test_the_search_is_right_for_any_rising_peak_and_short(held, pieces, budget):
    tried = []

    def peak(batch_size):
        tried.append(batch_size)
        # The slopes change at some batches, as where another block becomes the largest.
        return (
            held + max(slope * max(batch_size - start, 0) for slope, start in pieces) + batch_size
        )

    found = largest_within(peak, budget)
    probes = len(set(tried))
    assert len(tried) == probes
    assert found == 0 or peak(found) <= budget
    assert peak(found + 1) > budget
    assert probes < 64


@pytest.mark.parametrize("fitting", [2, 3, 15, 16, 17, 100, 1000])
def test_a_peak_along_a_line_takes_few_tries(fitting):
    tried = set()

    def peak(batch_size):
        tried.add(batch_size)
        return 5000 + 7 * batch_size

    assert largest_within(peak, 5000 + 7 * fitting + 3) == fitting
    assert len(tried) <= 5
