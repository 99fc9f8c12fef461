"""The model on paper of training in parallel, against closed forms and real counts."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sffx
from tools.parallel_model import __main__ as command
from tools.parallel_model import page as page_of_model
from tools.parallel_model import sleeping
from tools.parallel_model.counts import BlockCost, Counted, Line, count_blocks
from tools.parallel_model.machines import Cluster, Link
from tools.parallel_model.models import MODELS
from tools.parallel_model.schedules import (
    Layers,
    LocalBlock,
    by_microbatches,
    data_parallel,
    fully_sharded,
    local_data_parallel,
    local_pipeline,
)
from tools.parallel_model.timeline import Timeline
from tools.parallel_model.validate import LOOPBACK, predictions
from tools.parallel_model.ways import all_ways

SECONDS = st.floats(0.1, 10.0)


def test_a_task_waits_for_its_place_and_for_others() -> None:
    timeline = Timeline()
    timeline.add("link", "send", 2.0, ["work"])
    timeline.add("device", "work", 1.0)
    timeline.add("device", "more work", 5.0)
    timeline.add("other device", "receive", 1.0, ["send"])
    times = timeline.run()
    assert times.ends == {"work": 1.0, "more work": 6.0, "send": 3.0, "receive": 4.0}
    assert times.busy == {"link": 2.0, "device": 6.0, "other device": 1.0}


def test_tasks_that_wait_for_each_other_are_refused() -> None:
    timeline = Timeline()
    timeline.add("a", "first", 1.0, ["second"])
    timeline.add("b", "second", 1.0, ["first"])
    with pytest.raises(ValueError, match="wait for others that never end"):
        timeline.run()


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=6), st.integers(1, 3))
def test_an_ideal_pipeline_is_as_fast_as_its_slowest_stage(
    seconds: list[tuple[float, float]], depth: int
) -> None:
    stages = [[LocalBlock(score, learn)] for score, learn in seconds]
    step = local_pipeline(stages, [0.0] * (len(stages) - 1), depth)
    slowest = max(score + learn for score, learn in seconds)
    assert step.seconds == pytest.approx(slowest)
    mean = sum(score + learn for score, learn in seconds) / len(seconds)
    assert step.busy == pytest.approx(mean / slowest)


@settings(max_examples=10, deadline=None)
@given(SECONDS, SECONDS, SECONDS)
def test_a_slow_link_bounds_a_pipeline(score: float, learn: float, transfer: float) -> None:
    step = local_pipeline([[LocalBlock(score, learn)]] * 2, [transfer], depth=2)
    assert step.seconds == pytest.approx(max(score + learn, transfer))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.sampled_from(["GPipe", "1F1B"]))
def test_the_bubble_of_microbatches(stages: int, microbatches: int, schedule: str) -> None:
    layers = [[Layers(forward=1.0, backward=2.0)]] * stages
    step = by_microbatches(layers, [0.0] * (stages - 1), microbatches, schedule)
    assert 1 - step.busy == pytest.approx((stages - 1) / (microbatches + stages - 1))
    assert step.seconds == pytest.approx(3.0 * (microbatches + stages - 1))


def test_ddp_hides_all_sums_but_the_last_or_none() -> None:
    hidden = [Layers(forward=1.0, backward=2.0, update=0.5, reduce=0.1)] * 4
    assert data_parallel(hidden).seconds == pytest.approx(4 * 3.5 + 0.1)
    slow = [Layers(forward=1.0, backward=2.0, update=0.5, reduce=100.0)] * 4
    # The first sum begins when the last layers are through.
    assert data_parallel(slow).seconds == pytest.approx(4 * 1.0 + 2.0 + 4 * 100 + 4 * 0.5)


@settings(max_examples=10, deadline=None)
@given(SECONDS, SECONDS, SECONDS, st.floats(0.01, 30.0), st.integers(1, 5))
def test_local_sums_are_exposed_by_ddp_and_hidden_by_replicate(
    score: float, learn: float, update: float, reduce: float, count: int
) -> None:
    blocks = [LocalBlock(score, learn, update, reduce)] * count
    computing = count * (score + learn + update)
    assert local_data_parallel(blocks).seconds == pytest.approx(computing + count * reduce)
    replicated = local_pipeline([blocks]).seconds
    # A sum has all of a step but its own block's work, and the ring does one after the other.
    waits = max(computing, count * reduce, score + learn + update + reduce)
    # Where two of these are nearly equal, the batches at the start do not wait yet.
    assert replicated == pytest.approx(waits, rel=0.02)


def test_fsdp_waits_for_its_first_gather_and_its_last_scatter() -> None:
    hidden = [Layers(forward=1.0, backward=2.0, gather=0.1)] * 4
    assert fully_sharded(hidden).seconds == pytest.approx(4 * 3.0 + 0.2)
    slow = [Layers(forward=0.001, backward=0.001, gather=100.0)] * 4
    # Gathers: 4 forward and 3 backward. Scatters: 4.
    assert fully_sharded(slow).seconds == pytest.approx(11 * 100.0, rel=1e-3)


def test_a_line_goes_through_both_counts() -> None:
    line = Line.through({2: 7.0, 4: 11.0})
    assert (line.at(2), line.at(4), line.at(8)) == (7.0, 11.0, 19.0)


def _chain() -> nn.Module:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(8 * 4 * 4, 5))


def test_backpropagation_through_blocks_costs_what_the_model_costs() -> None:
    net = sffx.transform(_chain(), policy="layer", example_input=torch.zeros(1, 3, 8, 8))
    costs = count_blocks(net, (2, 4))
    x = torch.zeros(6, 3, 8, 8)
    with FlopCounterMode(display=False) as counter:
        _chain()(x).sum().backward()
    counted = sum(each.forward.flops.at(6) + each.backward.flops.at(6) for each in costs)
    assert counted == counter.get_total_flops()
    # Heads and their backward passes come on top, and the gradients between blocks are gone.
    assert sum(each.scoring.flops.at(6) for each in costs) > sum(
        each.forward.flops.at(6) for each in costs
    )
    parameters = sum(each.parameters + each.head for each in costs)
    assert parameters == 4 * sum(p.numel() for p in net.parameters())
    # What crosses the cut behind the first block: (B, 4, 6, 6), normed, in float32.
    assert costs[0].given.at(6) == 6 * 4 * 6 * 6 * 4
    assert [BlockCost.from_json(each.to_json()) for each in costs] == costs


def _block(parameters: float, seconds: float) -> BlockCost:
    """Return a block that takes so many seconds for a sample, and as many in each pass."""
    work = Counted(flops=Line(0.0, seconds))
    return BlockCost(
        parameters=parameters,
        head=0.0,
        copies=0.0,
        given=Line(0.0, 10.0),
        scoring=work,
        learning=work,
        forward=work,
        backward=work,
        saved=Line(0.0, 100.0),
        running=Line(parameters, 100.0),
    )


def test_bytes_and_memory_of_equal_blocks() -> None:
    free = Link(float("inf"), 0.0)
    cluster = Cluster("", 1, 4, 1.0, float("inf"), 0.0, inside=free, between=free)
    found = all_ways([_block(1000.0, 1.0)] * 8, [_block(1000.0, 1.0)] * 8, cluster, 16)
    local = found["pipeline, few heads"]
    # Two blocks a device, 16 samples: 1 s forward and 1 s backward each.
    assert local.step.seconds == pytest.approx(2 * 16 * 2)
    assert local.sent == 16 * 10
    # Weights and moments of two blocks, one block's run, two batches sent and two received.
    assert local.memory == 3 * 2000 + (1000 + 1600) + 4 * 160
    assert found["DDP"].step.seconds == pytest.approx(8 * 4 * 2)
    assert found["DDP"].sent == 2 * 3 / 4 * 8000
    assert found["DDP"].memory == 4 * 8000 + 8 * 100 * 4
    assert found["FSDP2"].sent == 3 * 3 / 4 * 8000
    assert found["replicate"].memory == 3 * 8000 + 7000 + (1000 + 400)
    # With one sample in a microbatch, the first device holds four of them.
    assert found["1F1B"].microbatches == 16
    assert found["1F1B"].memory == 4 * 2000 + 4 * 2 * 100
    assert found["1F1B"].step.busy == pytest.approx(16 / (16 + 3))
    assert found["GPipe"].memory == 4 * 2000 + 16 * 2 * 100


def _measured() -> dict[str, object]:
    """Return a record of `tools.pipeline`, of two equal processes."""
    ways = ("one process, BP", "pipeline", "GPipe", "DDP, BP")
    of_rank = {way: {"seconds": [2.0], "cpu": [1.0], "sent": 0} for way in ways}
    found = [of_rank, of_rank]
    return {"samples": 10, "batches": 4, "found": found, "seconds_of_blocks": {"a": 1, "b": 1}}


def test_predictions_from_a_record() -> None:
    found = {each.way: each for each in predictions(_measured())}
    assert found["one process, BP"].predicted == pytest.approx(10.0)
    assert found["one process, BP"].error == pytest.approx(1.0)
    # The second process begins after the first forward and a message.
    filling = 1 / 3 + LOOPBACK.latency
    assert found["pipeline"].predicted == pytest.approx(10 * 4 / (4 + filling))
    assert found["GPipe"].predicted == pytest.approx(10 / (5 / 4), rel=1e-3)
    assert found["DDP, BP"].predicted == pytest.approx(10.0, rel=1e-3)


def test_a_layer_sleeps_twice_as_long_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(sleeping.time, "sleep", slept.append)
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(partial(sleeping._sleep_around, 0.5))
    output = layer(torch.ones(1, 2))
    assert slept == [0.5]
    output.sum().backward()
    assert slept == [0.5, 1.0]


def test_predictions_of_stages_that_sleep() -> None:
    first, second, *_ = sleeping.FORWARD
    # The first stage is the slowest, and the second one ends its last batch meanwhile.
    assert sleeping.predicted("pipeline", 2) == pytest.approx(3 * first)
    # Each pass waits for the slower stage, but once for the faster one.
    waits = 3 * (first * sleeping.MICROBATCHES + second) / sleeping.MICROBATCHES
    assert sleeping.predicted("GPipe", 2) == pytest.approx(waits)


def test_the_command_writes_its_tables_again_from_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = {(model.name, model.cut): [_block(1e6, 1e9)] * 8 for model in MODELS}
    monkeypatch.setattr(command, "_counted", lambda: costs)
    few = {"images": (8,), "sequences": (8,)}
    monkeypatch.setattr(command, "BATCHES", few)
    monkeypatch.setattr(page_of_model, "BATCHES", few)
    monkeypatch.setattr(page_of_model, "SHOWN", {"images": 8, "sequences": 8})
    slept = [{"stages": 2, "way": "pipeline", "predicted": 0.3, "measured": 0.4}]
    for folder in ("first", "again"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "sleeping.json").write_text(json.dumps(slept))
    measured = tmp_path / "measured.json"
    measured.write_text(json.dumps({"resnet18": _measured()}))
    command.main(["--out", str(tmp_path / "first"), "--measured", str(measured)])
    counted = str(tmp_path / "first" / "record.json")
    again = ["--out", str(tmp_path / "again"), "--costs", counted, "--measured", str(measured)]
    command.main(again)
    table = (tmp_path / "first" / "table.md").read_text()
    assert "| resnet18 | one process, BP | 10 | 5 | +100% |" in table
    assert "| 2 | pipeline | 300 | 400 | -25% |" in table
    for name in ("table.md", "record.json"):
        first = (tmp_path / "first" / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == first
