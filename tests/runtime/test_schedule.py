"""A schedule trains exactly the block-epochs that it names; the oracles look at what changed."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import sffx
import sffx.parts
from sffx import BlockSchedule, InputError
from sffx.learning.objectives.records import OBJECTIVES
from tests.runtime.three_blocks import CLASSES, cut


def batch(samples: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(samples, 1, 8, 8, generator=generator), torch.arange(samples) % CLASSES


def learners(net: fx.GraphModule) -> list[str]:
    names = [block.target for block in net.plan]
    return [*names, "classifier"] if net.plan.objective.trains_classifier else names


def optimizer_of(net: fx.GraphModule) -> torch.optim.Optimizer:
    # Weight decay and momentum would move a frozen weight whose gradient is zero.
    return torch.optim.AdamW(sffx.parameter_groups(net, 1e-2), weight_decay=0.5)


def changed(before: dict[str, Tensor], net: fx.GraphModule) -> set[str]:
    """Return the blocks of which any tensor changed, running statistics among them."""
    names = set()
    for key, value in net.state_dict().items():
        if not torch.equal(value, before[key]):
            names.add(sffx.parts.owner_of(key))
    return names


def random_spans(names: list[str], seed: int) -> dict[str, range]:
    """Return random epochs in which somebody learns all the time."""
    numbers = random.Random(seed)
    spans = {}
    end = 0
    for name in numbers.sample(names, len(names)):
        first = numbers.randint(0, end)
        spans[name] = range(first, max(first, end) + numbers.randint(1, 2))
        end = max(end, spans[name].stop)
    return spans


@pytest.mark.parametrize(("seed", "objective"), [*enumerate(OBJECTIVES)])
def test_exactly_the_blocks_of_an_epoch_change(seed, objective):
    net = cut(objective)
    optimizer = optimizer_of(net)
    spans = random_spans(learners(net), seed)
    schedule = BlockSchedule(net, spans)
    assert schedule.spans == spans
    for epoch in range(schedule.epochs):
        expected = [name for name in learners(net) if epoch in spans[name]]
        assert schedule.learning(epoch) == expected
        before = copy.deepcopy(net.state_dict())
        sffx.local_step(net, *batch(), optimizer, blocks=schedule.learning(epoch))
        assert changed(before, net) == set(expected)
        optimizer.zero_grad()
        sffx.local_loss(net, *batch(), blocks=schedule.learning(epoch)).backward()
        graded = {sffx.parts.owner_of(n) for n, p in net.named_parameters() if p.grad is not None}
        assert graded == set(expected)
        optimizer.zero_grad()


def test_greedy_is_training_one_block_after_the_other():
    net = cut()
    twin = copy.deepcopy(net)
    schedule = BlockSchedule.greedy(net, [2, 1, 3, 2])
    optimizer = optimizer_of(net)
    torch.manual_seed(2)
    for epoch in range(schedule.epochs):
        sffx.local_step(net, *batch(), optimizer, blocks=schedule.learning(epoch))
    optimizer = optimizer_of(twin)
    torch.manual_seed(2)
    for name, count in (("block_0", 2), ("block_1", 1), ("block_2", 3), ("classifier", 2)):
        for _ in range(count):
            sffx.local_step(twin, *batch(), optimizer, blocks=[name])
    for one, two in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_the_constructors():
    net = cut()
    names = learners(net)
    assert BlockSchedule.greedy(net, 2).spans == {
        "block_0": range(2),
        "block_1": range(2, 4),
        "block_2": range(4, 6),
        "classifier": range(6, 8),
    }
    assert BlockSchedule.greedy(net, {"block_2": 2, "block_0": 1}).spans == {
        "block_0": range(1),
        "block_2": range(1, 3),
    }
    whole = BlockSchedule.all_at_once(net, 3)
    assert whole.epochs == 3
    assert all(whole.learning(epoch) == names for epoch in range(3))
    assert whole == BlockSchedule(net, [(0, 3)] * 4)
    assert repr(BlockSchedule(net, {"block_1": [0, 2]})) == "BlockSchedule(block_1: 0 to 2)"


def test_an_objective_that_does_not_train_the_classifier_has_no_epochs_for_it():
    net = cut("ff")
    assert BlockSchedule(net, [(0, 1)] * 3).learning(0) == ["block_0", "block_1", "block_2"]
    with pytest.raises(InputError, match=r"names 'classifier'. Hint: the blocks"):
        BlockSchedule(net, {"classifier": (0, 1)})


def test_blocks_that_are_frozen_for_good():
    net = cut()
    schedule = BlockSchedule(
        net, {"block_0": (0, 1), "block_1": (2, 3), "block_2": (0, 2), "classifier": (0, 5)}
    )
    first = ["block_0"]
    three = ["block_0", "block_1", "block_2"]
    assert [schedule.frozen(epoch) for epoch in range(5)] == [[], first, first, three, three]
    assert BlockSchedule(net, {"classifier": (0, 1)}).frozen(0) == three


def falling(*losses: float) -> list[dict[str, float]]:
    """Return the losses of all blocks, where block_1 has these."""
    rows = []
    for epoch, loss in enumerate(losses):
        other = 10.0 - epoch
        rows.append({"block_0": 1.0, "block_1": loss, "block_2": 2.0, "classifier": other, "x": 0})
    return rows


@pytest.mark.parametrize(
    ("losses", "end"),
    [
        ((5, 4, 3, 3, 3, 3, 3), 3),
        ((5, 4, 3, 3, 3), 5),
        ((5, 4, 4.5, 4.5, 2, 2, 2, 2, 1), 5),
        ((5, 4.9999, 4.9998, 4.9997), 1),
        ((-1, -2, -2, -2, -2), 2),
        ((float("inf"), 3, 3, 3, 3), 2),
        ((5, 4, 3, 2, 1), 5),
    ],
)
def test_a_block_stops_where_its_loss_stopped_falling(losses, end):
    schedule = BlockSchedule.from_losses(cut(), falling(*losses))
    assert schedule.spans == {
        "block_0": range(1 if len(losses) > 3 else len(losses)),
        "block_1": range(end),
        # Its own plateau is the first epoch, but its input changes until block_1 stops.
        "block_2": range(end),
        "classifier": range(len(losses)),
    }


def test_a_plateau_of_real_losses():
    net = cut()
    optimizer = optimizer_of(net)
    history = []
    for _ in range(3):
        sffx.local_step(net, *batch(), optimizer)
        history.append(sffx.evaluate(net, [batch()]).loss)
    schedule = BlockSchedule.from_losses(net, history, patience=1, threshold=1.0)
    assert schedule == BlockSchedule.all_at_once(net, 1)


@pytest.mark.parametrize(
    ("epochs", "message"),
    [
        ({"block_7": (0, 1)}, "the schedule names 'block_7'. Hint: the blocks that learn are"),
        ({}, "the schedule names no block"),
        ([(0, 1)], "the schedule has 1 entries for 4 blocks"),
        (3, "the epochs of a schedule are 3, not one entry a block"),
        ("0123", "the epochs of a schedule are '0123'"),
        ({"block_0": (5, 3)}, "block_0 learns from epoch 5 to before epoch 3, which is no epoch"),
        ({"block_0": (2, 2)}, "block_0 learns from epoch 2 to before epoch 2, which is no epoch"),
        ({"block_0": (-1, 2)}, "block_0 learns from epoch -1"),
        ({"block_0": 4}, "the epochs of block_0 are 4. Hint: pass its first epoch"),
        ({"block_0": (0, 1.5)}, "the epochs of block_0 are"),
        ({"block_0": (False, 2)}, "the epochs of block_0 are"),
        ({"block_0": range(0, 4, 2)}, "the epochs of block_0 are range"),
        ({"block_0": (0, 2), "block_1": (3, 4)}, "no block learns in epoch 2. Hint: "),
        ({"block_0": (1, 2)}, "no block learns in epoch 0"),
    ],
)
def test_what_is_no_schedule(epochs, message):
    with pytest.raises(InputError, match=message):
        BlockSchedule(cut(), epochs)


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "2"])
def test_numbers_of_no_epochs(count):
    net = cut()
    with pytest.raises(InputError, match=r"Hint: "):
        BlockSchedule.all_at_once(net, count)
    with pytest.raises(InputError, match=r"Hint: "):
        BlockSchedule.greedy(net, count)


@pytest.mark.parametrize("losses", [[], None, [{}], [{"block_0": float("nan")}], [3]])
def test_losses_of_no_blocks(losses):
    with pytest.raises(InputError, match=r"Hint: pass .*sffx.evaluate\(net, loader\).loss"):
        BlockSchedule.from_losses(cut(), losses)


@pytest.mark.parametrize("epoch", [-1, 2, 1.0, None])
def test_epochs_that_a_schedule_does_not_have(epoch):
    schedule = BlockSchedule.all_at_once(cut(), 2)
    for ask in (schedule.learning, schedule.frozen):
        with pytest.raises(InputError, match=r"no epoch .*, but those from 0 to 1"):
            ask(epoch)


def test_a_plain_model_has_no_schedule():
    with pytest.raises(InputError, match="not a cut model"):
        BlockSchedule(nn.Linear(2, 2), [(0, 1)])


def run(folder: Path, epochs: int) -> dict[str, Tensor]:
    """Train up to an epoch, from the checkpoint in the folder if there is one."""
    path = folder / "net.pt"
    net = cut()
    schedule = BlockSchedule.greedy(net, 2)
    optimizer = optimizer_of(net)
    start = 0
    if path.exists():
        checkpoint = sffx.load_checkpoint(path)
        net.load_state_dict(checkpoint.state)
        optimizer.load_state_dict(checkpoint.optimizer)
        schedule = BlockSchedule.all_at_once(net, 1)
        schedule.load_state_dict(checkpoint.more["schedule"])
        start = checkpoint.more["epoch"]
    for epoch in range(start, epochs):
        torch.manual_seed(epoch)
        sffx.local_step(net, *batch(), optimizer, blocks=schedule.learning(epoch))
    state = schedule.state_dict()
    sffx.save_checkpoint(path, net, optimizer, schedule=state, epoch=epochs)
    return net.state_dict()


def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path):
    (tmp_path / "parts").mkdir()
    run(tmp_path / "parts", 3)
    resumed = run(tmp_path / "parts", 8)
    for key, value in run(tmp_path, 8).items():
        assert torch.equal(resumed[key], value), key


@pytest.mark.parametrize("state", [{"block_9": [0, 1]}, [1], None, {"block_0": [1]}])
def test_states_of_no_schedule(state):
    schedule = BlockSchedule.all_at_once(cut(), 2)
    with pytest.raises(InputError, match="Hint: "):
        schedule.load_state_dict(state)
    assert schedule == BlockSchedule.all_at_once(cut(), 2)


def test_the_learning_rate_of_a_frozen_block_stays():
    net = cut()
    optimizer = optimizer_of(net)
    plateau = sffx.BlockPlateau(optimizer, patience=0, factor=0.5)
    schedule = BlockSchedule.greedy(net, 2)
    losses = dict.fromkeys(learners(net), 1.0)
    for epoch in range(4):
        plateau.step(losses, schedule.learning(epoch))
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"block_0": 5e-3, "block_1": 5e-3, "block_2": 1e-2, "classifier": 1e-2}
