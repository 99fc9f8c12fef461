from __future__ import annotations

import pytest
import torch

import sffx
from sffx.errors import InputError
from tests.toys import Chain, Residual


@pytest.fixture
def net():
    return sffx.transform(Residual())


def test_a_group_for_each_block_holds_each_parameter_once(net):
    groups = sffx.parameter_groups(net, lr=0.1, classifier_lr=0.01)
    assert [(group["name"], group["lr"]) for group in groups] == [
        ("block_0", 0.1),
        ("block_1", 0.1),
        ("block_2", 0.1),
        ("classifier", 0.01),
    ]
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in net.parameters())
    assert {id(p) for p in net.head_1.parameters()} <= {id(p) for p in groups[1]["params"]}


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_any_optimizer_takes_the_groups(net, kind):
    optimizer = kind(sffx.parameter_groups(net, lr=0.1))
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}


def test_frozen_blocks_have_no_group(net):
    net.block_1.requires_grad_(False)
    net.head_1.requires_grad_(False)
    assert [group["name"] for group in sffx.parameter_groups(net, lr=0.1)] == [
        "block_0",
        "block_2",
        "classifier",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lr": -1}, "lr is -1"), ({"lr": 1, "classifier_lr": -2}, "classifier_lr is -2")],
)
def test_rates_that_cannot_be(net, options, message):
    with pytest.raises(InputError, match=message):
        sffx.parameter_groups(net, **options)


def losses(**changed: float) -> dict[str, float]:
    return {
        "block_0": 1.0,
        "block_1": 1.0,
        "block_2": 1.0,
        "classifier": 1.0,
        "ensemble": 1.0,
        **changed,
    }


def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def test_each_block_is_lowered_by_its_own_loss(net):
    optimizer = torch.optim.SGD(sffx.parameter_groups(net, lr=1.0))
    plateau = sffx.BlockPlateau(optimizer, factor=0.5, patience=1)
    for loss in (1.0, 0.9, 0.8, 0.7):
        plateau.step(losses(block_1=loss))
    assert rates(optimizer) == {"block_0": 0.5, "block_1": 1.0, "block_2": 0.5, "classifier": 0.5}


def test_the_plateau_resumes_where_it_was(net):
    def make() -> tuple[torch.optim.Optimizer, sffx.BlockPlateau]:
        optimizer = torch.optim.SGD(sffx.parameter_groups(net, lr=1.0))
        return optimizer, sffx.BlockPlateau(optimizer, factor=0.5, patience=1)

    whole, first = make(), make()
    for _ in range(2):
        whole[1].step(losses())
        first[1].step(losses())
    second = make()
    for part, state in zip(second, [part.state_dict() for part in first], strict=True):
        part.load_state_dict(state)
    for optimizer, plateau in (whole, second):
        plateau.step(losses(block_2=0.1))
        assert rates(optimizer) == {
            "block_0": 0.5,
            "block_1": 0.5,
            "block_2": 1.0,
            "classifier": 0.5,
        }


def test_misuse_is_said(net):
    with pytest.raises(
        InputError,
        match=(
            r"parameter group 0 of the optimizer has no name\. "
            r"Hint: make the groups by sffx\.parameter_groups"
        ),
    ):
        sffx.BlockPlateau(torch.optim.SGD(net.parameters(), lr=1.0))
    plateau = sffx.BlockPlateau(torch.optim.SGD(sffx.parameter_groups(net, lr=1.0)))
    with pytest.raises(InputError, match="losses lack 'block_0'"):
        plateau.step({"block_1": 1.0, "block_2": 1.0, "classifier": 1.0})
    with pytest.raises(
        InputError,
        match=(
            r"losses is of type Evaluation, not a mapping of names\. "
            r"Hint: pass evaluate\(\.\.\.\)\.loss"
        ),
    ):
        plateau.step(
            sffx.evaluate(net, [(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))])
        )
    with pytest.raises(InputError, match="the state is of block_9"):
        plateau.load_state_dict({"block_9": {}})
    with pytest.raises(InputError, match="not a cut model"):
        sffx.parameter_groups(Chain(), lr=1.0)


def test_groups_of_one_name_follow_one_loss(net):
    weights, biases = (
        [p for p in net.block_0.parameters() if (p.ndim > 1) is wide] for wide in (True, False)
    )
    optimizer = torch.optim.SGD(
        [
            {"params": weights, "name": "block_0"},
            {"params": biases, "name": "block_0", "weight_decay": 0.0},
        ],
        lr=1.0,
    )
    plateau = sffx.BlockPlateau(optimizer, factor=0.5, patience=0)
    for loss in (1.0, 0.8, 0.6, 0.6):
        plateau.step(losses(block_0=loss))
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_only_the_losses_of_the_blocks_that_learnt_are_needed(net):
    optimizer = torch.optim.SGD(sffx.parameter_groups(net, lr=1.0))
    plateau = sffx.BlockPlateau(optimizer, factor=0.5, patience=0)
    for loss in (1.0, 1.0):
        plateau.step({"block_1": loss}, ["block_1"])
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"block_0": 1.0, "block_1": 0.5, "block_2": 1.0, "classifier": 1.0}
    with pytest.raises(InputError, match="losses lack 'block_2'"):
        plateau.step({"block_1": 1.0}, ["block_1", "block_2"])
