"""Replicas, accumulation, clipping, autocast, losses: against plain loops in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import init_device_mesh

import sffx
from tests.runtime.pipeline import models
from tests.runtime.pipeline.processes import run


def smooth(goodness: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(goodness, y, label_smoothing=0.1)


def clip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Clip the gradients of one block: in a block-local step the optimizer sees no others."""
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], 0.05)


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=0.9)


def train_with_options(rank: int) -> dict[str, Any]:
    """Return the weights after training in several ways."""
    states: dict[str, Any] = {}
    data = models.images()

    pipe = sffx.Pipeline(models.cut_images(), loss_fn={"block_0": smooth, "classifier": smooth})
    optimizers = {group["name"]: sgd([group]) for group in pipe.parameter_groups(lr=0.1)}
    pipe.train(data if pipe.first else None, optimizers)
    states["an optimizer and a loss for each block"] = pipe.state_dict()

    pipe = sffx.Pipeline(models.cut_images())
    optimizer = sgd(pipe.parameter_groups(lr=0.1))
    scores: list[str] = []
    pipe.train(
        data if pipe.first else None,
        optimizer,
        accumulate=3,
        on_block=lambda name, own, loss: scores.append(name),
    )
    assert scores == pipe.blocks * len(data)
    states["accumulate"] = pipe.state_dict()

    pipe = sffx.Pipeline(models.cut_images())
    optimizer = sgd(pipe.parameter_groups(lr=0.1))
    optimizer.register_step_pre_hook(clip)
    pipe.train(data if pipe.first else None, optimizer)
    states["clip"] = pipe.state_dict()

    pipe = sffx.Pipeline(models.cut_images().float(), depth=1)
    optimizer = sgd(pipe.parameter_groups(lr=0.1))
    singles = [(x.float(), y) for x, y in data]
    with torch.autocast("cpu", torch.bfloat16):
        pipe.train(singles if pipe.first else None, optimizer)
    states["autocast"] = pipe.state_dict()

    net = models.cut_images()
    net.get_submodule("block_0").requires_grad_(False)
    net.get_submodule("head_0").requires_grad_(False)
    pipe = sffx.Pipeline(net, cuts=["block_1"])
    groups = pipe.parameter_groups(lr=0.1)
    optimizer = sgd(groups) if groups else None
    with torch.device("meta"):
        # What processes tell each other lies on the CPU, whatever the default device is.
        pipe.train(data if pipe.first else None, optimizer)
        pipe.evaluate(data if pipe.first else None)
    states["a frozen stage"] = pipe.state_dict()
    for layer in net.modules():
        layer.train(not isinstance(layer, nn.BatchNorm2d))
    whole = pipe.gather()
    if whole is not None:
        assert not any(each._forward_pre_hooks for each in whole.modules())
        assert [each.training for each in whole.modules()] == [m.training for m in net.modules()]
    return states


def in_one_process() -> dict[str, fx.GraphModule]:
    """Do the same by `local_step`, and return the nets."""
    nets: dict[str, fx.GraphModule] = {}
    data = models.images()

    net = models.cut_images()
    functions = {"block_0": smooth, "classifier": smooth}
    optimizers = {group["name"]: sgd([group]) for group in sffx.parameter_groups(net, lr=0.1)}
    for x, y in data:
        sffx.local_step(net, x, y, optimizers, functions)
    nets["an optimizer and a loss for each block"] = net

    net = models.cut_images()
    optimizer = sgd(sffx.parameter_groups(net, lr=0.1))
    for batches in (data[:3], data[3:]):
        optimizer.zero_grad()
        for x, y in batches:
            (sffx.local_loss(net, x, y) / len(batches)).backward()
        optimizer.step()
    nets["accumulate"] = net

    net = models.cut_images()
    optimizer = sgd(sffx.parameter_groups(net, lr=0.1))
    optimizer.register_step_pre_hook(clip)
    for x, y in data:
        sffx.local_step(net, x, y, optimizer)
    nets["clip"] = net

    net = models.cut_images().float()
    optimizer = sgd(sffx.parameter_groups(net, lr=0.1))
    for x, y in data:
        with torch.autocast("cpu", torch.bfloat16):
            sffx.local_step(net, x.float(), y, optimizer)
    nets["autocast"] = net

    net = models.cut_images()
    net.get_submodule("block_0").requires_grad_(False)
    net.get_submodule("head_0").requires_grad_(False)
    optimizer = sgd(sffx.parameter_groups(net, lr=0.1))
    for x, y in data:
        sffx.local_step(net, x, y, optimizer)
    nets["a frozen stage"] = net
    return nets


def test_options_do_what_they_do_in_one_process(tmp_path):
    found = run(train_with_options, 2, tmp_path)
    assert all(isinstance(states, dict) for states in found), found
    for name, net in in_one_process().items():
        together = {**found[0][name], **found[1][name]}
        expected = net.state_dict()
        assert set(together) == set(expected)
        # Sums of gradients are divided after the sum here, and before it there.
        tolerance = 1e-12 if name == "accumulate" else 0
        torch.testing.assert_close(together, expected, rtol=tolerance, atol=tolerance)


class Plain(nn.Module):
    """A network without batch norm, whose statistics depend on how a batch is divided."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(6, 6) for _ in range(4)])
        self.head = nn.Linear(6, models.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def cut_plain() -> fx.GraphModule:
    torch.manual_seed(0)
    return sffx.transform(Plain().double(), "layer", torch.zeros(2, 6, dtype=torch.float64))


def vectors() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(5):
        x = torch.randn(8, 6, dtype=torch.float64, generator=generator)
        batches.append((x, torch.randint(0, models.CLASSES, (8,), generator=generator)))
    return batches


def train_replicas(rank: int, accumulate: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "replica"))
    pipe = sffx.Pipeline(cut_plain(), group=mesh)
    optimizer = torch.optim.AdamW(pipe.parameter_groups(lr=0.01))
    half = slice(4 * pipe.place.replica, 4 * pipe.place.replica + 4)
    data = [(x[half], y[half]) for x, y in vectors()]
    losses = pipe.train(data if pipe.first else None, optimizer, accumulate=accumulate)
    evaluation = pipe.evaluate(data if pipe.first else None)
    # Nobody waits for another replica in an evaluation, so one may have all batches.
    alone = vectors() if pipe.place.replica else []
    by_one = pipe.evaluate(alone if pipe.first else None)
    assert by_one.accuracy == evaluation.accuracy
    assert by_one.samples == evaluation.samples
    uneven = sffx.Pipeline(cut_plain(), replicas=2)
    optimizer = torch.optim.SGD(uneven.parameter_groups(lr=0.01))
    error = ""
    try:
        own = data[: 4 + uneven.place.replica]
        uneven.train(own if uneven.first else None, optimizer)
    except sffx.SffxError as raised:
        error = str(raised)
    return {
        "losses": losses,
        "evaluation": evaluation,
        "state": pipe.state_dict(),
        "stage": pipe.place.stage,
        "error": error,
    }


@pytest.mark.sampled(1)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_stages_with_two_replicas_are_one_process_on_the_whole_batch(tmp_path, accumulate):
    found = run(train_replicas, 4, tmp_path, accumulate)
    assert all(isinstance(result, dict) for result in found), found
    net = cut_plain()
    optimizer = torch.optim.AdamW(sffx.parameter_groups(net, lr=0.01))
    data = vectors()
    total = 0.0
    for start in range(0, len(data), accumulate):
        batches = data[start : start + accumulate]
        optimizer.zero_grad()
        for x, y in batches:
            loss = sffx.local_loss(net, x, y)
            (loss / len(batches)).backward()
            total += loss.item()
        optimizer.step()
    together: dict[str, Tensor] = {}
    for result in found:
        together.update(result["state"])
        assert sum(result["losses"].values()) == pytest.approx(total / len(data), rel=1e-12)
    torch.testing.assert_close(together, net.state_dict(), rtol=1e-12, atol=1e-12)
    expected = sffx.evaluate(net, data)
    for result in found:
        assert result["evaluation"].samples == expected.samples == 40
        assert result["evaluation"].accuracy == expected.accuracy
        assert result["evaluation"].loss == pytest.approx(expected.loss, rel=1e-12)
    # Replicas of one stage are alike to the bit.
    for one, other in ((0, 1), (2, 3)):
        for name, value in found[one]["state"].items():
            assert torch.equal(found[other]["state"][name], value)


def test_loaders_of_replicas_that_differ_in_length_are_an_error_on_every_rank(tmp_path):
    for result in run(train_replicas, 4, tmp_path, 1):
        assert isinstance(result, dict), result
        assert "1 of 2 replicas have a further batch" in result["error"]


def from_the_meta_device(rank: int) -> dict[str, Any]:
    torch.manual_seed(rank)
    with torch.device("meta"):
        model = models.Images()
    net = sffx.transform(model, example_input=torch.zeros(2, 3, 6, 6))
    pipe = sffx.Pipeline(net)
    optimizer = torch.optim.AdamW(pipe.parameter_groups(lr=0.01))
    data = [(x.float(), y) for x, y in models.images()]
    losses = [pipe.train(data if pipe.first else None, optimizer) for _ in range(8)]
    return {"losses": losses, "meta": [name for name, p in pipe.named_parameters() if p.is_meta]}


def test_a_model_from_the_meta_device_draws_weights_and_learns(tmp_path):
    for result in run(from_the_meta_device, 2, tmp_path):
        assert isinstance(result, dict), result
        assert not result["meta"]
        first = sum(result["losses"][0].values())
        last = sum(result["losses"][-1].values())
        assert last < first


# Blocks of the first process alone, of the second alone, and of both.
LESSONS = (["block_0"], ["block_2"], ["block_1", "block_3", "classifier"], ["block_0", "block_3"])


def train_some_blocks(rank: int) -> dict[str, Any]:
    pipe = sffx.Pipeline(cut_deep(), cuts=["block_2"])
    optimizer = sgd(pipe.parameter_groups(lr=0.1))
    data = deep_images()
    losses = []
    for blocks in LESSONS:
        loader = data if pipe.first else None
        losses.append(pipe.train(loader, optimizer, accumulate=2, blocks=blocks))
    return {"losses": losses, "state": pipe.state_dict(), "bytes": pipe.bytes_sent}


class Deep(nn.Sequential):
    """Four convolutions with batch norm, which computes other values in eval mode."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for channels in (3, 4, 4, 4):
            layers += [nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def cut_deep() -> fx.GraphModule:
    torch.manual_seed(0)
    return sffx.transform(Deep().double(), "batchnorm", torch.zeros(2, 3, 6, 6).double())


def deep_images() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(4):
        x = torch.randn(5, 3, 6, 6, dtype=torch.float64, generator=generator)
        batches.append((x, torch.randint(0, 3, (5,), generator=generator)))
    return batches


def test_some_blocks_learn_as_in_one_process(tmp_path):
    found = run(train_some_blocks, 2, tmp_path)
    assert all(isinstance(each, dict) for each in found), found
    net = cut_deep()
    optimizer = sgd(sffx.parameter_groups(net, lr=0.1))
    data = deep_images()
    for blocks, (own, other) in zip(
        LESSONS, zip(*[each["losses"] for each in found], strict=True), strict=True
    ):
        assert own == other
        assert list(own) == blocks
        for pair in (data[:2], data[2:]):
            optimizer.zero_grad()
            for x, y in pair:
                (sffx.local_loss(net, x, y, blocks=blocks) / 2).backward()
            optimizer.step()
    together = {**found[0]["state"], **found[1]["state"]}
    torch.testing.assert_close(together, dict(net.state_dict()), rtol=1e-12, atol=1e-12)
    # Where the second process has nothing to learn, nothing is sent to it.
    assert found[0]["bytes"] > 0 == found[1]["bytes"]


def train_other_blocks(rank: int) -> Any:
    pipe = sffx.Pipeline(cut_deep(), cuts=["block_2"])
    optimizer = sgd(pipe.parameter_groups(lr=0.1))
    blocks = ["block_0"] if rank == 0 else ["block_1"]
    return pipe.train(deep_images() if pipe.first else None, optimizer, blocks=blocks)


def test_all_processes_must_train_the_same_blocks(tmp_path):
    for error in run(train_other_blocks, 2, tmp_path):
        assert "and blocks=['block_0']; rank 1" in str(error)


def train_an_unknown_block(rank: int) -> Any:
    pipe = sffx.Pipeline(cut_deep(), cuts=["block_2"])
    optimizer = sgd(pipe.parameter_groups(lr=0.1))
    return pipe.train(deep_images() if pipe.first else None, optimizer, blocks=["block_9"])


def test_an_unknown_block_is_named(tmp_path):
    for error in run(train_an_unknown_block, 2, tmp_path):
        assert "blocks names 'block_9'. Hint: the blocks are block_0" in str(error)
