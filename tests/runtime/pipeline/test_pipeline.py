"""A pipeline over two and three processes, against `local_step` in one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, fx

import sffx
from sffx.runtime.randomness import mixed
from tests.runtime.pipeline import models
from tests.runtime.pipeline.processes import run

EPOCHS = 2


def optimizer_of(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, weight_decay=0.1)


class Sent:
    """Counts what a process sends, by watching torch."""

    def __init__(self) -> None:
        self.peers: set[int] = set()
        self.bytes = 0
        self._isend = dist.isend

    def __enter__(self) -> Sent:
        dist.isend = self._send
        return self

    def __exit__(self, *error: object) -> None:
        dist.isend = self._isend

    def _send(self, tensor: Tensor, dst: int, *args: Any, **kwargs: Any) -> Any:
        self.peers.add(dst)
        self.bytes += tensor.numel() * tensor.element_size()
        return self._isend(tensor, dst, *args, **kwargs)


def train_in_pipeline(rank: int, kind: str, folder: str) -> dict[str, Any]:
    """Train and evaluate two epochs, and return all that can be compared."""
    make, batches = models.MODELS[kind]
    net = make()
    pipe = sffx.Pipeline(net)
    optimizer = optimizer_of(pipe.parameter_groups(lr=0.01, classifier_lr=0.02))
    plateau = sffx.BlockPlateau(optimizer, patience=0, threshold=10.0)
    torch.manual_seed(1)
    losses, evaluations = [], []
    with Sent() as sent:
        for epoch in range(EPOCHS):
            data = batches(epoch)
            losses.append(pipe.train(data if pipe.first else None, optimizer))
        trained_bytes = sent.bytes
    for epoch in range(EPOCHS):
        data = batches(epoch)
        evaluations.append(pipe.evaluate(data if pipe.first else None))
    plateau.step(evaluations[0].loss)
    dcp.save(
        {"net": pipe.state_dict(), "optimizer": pipe.optimizer_state_dict(optimizer)},
        checkpoint_id=f"{folder}/checkpoint",
    )
    held = [tensor for tensor in (*net.parameters(), *net.buffers()) if not tensor.is_meta]
    origin = net.origin.model
    held_by_origin = [t for t in (*origin.parameters(), *origin.buffers()) if not t.is_meta]
    whole = pipe.gather(dst=dist.get_world_size() - 1)
    return {
        "blocks": pipe.blocks,
        "losses": losses,
        "evaluations": evaluations,
        "state": pipe.state_dict(),
        "optimizer": pipe.optimizer_state_dict(optimizer),
        "rates": {group["name"]: group["lr"] for group in optimizer.param_groups},
        "peers": sent.peers,
        "bytes": trained_bytes,
        "held": sum(tensor.numel() for tensor in held),
        "held_by_origin": sum(tensor.numel() for tensor in held_by_origin),
        "whole": None if whole is None else whole.state_dict(),
        "plain": None if whole is None else sffx.extract(whole).state_dict(),
    }


def add_loss(sums: dict[str, float], samples: int, name: str, scores: Tensor, loss: Tensor) -> None:
    sums[name] = sums.get(name, 0.0) + loss.item() * samples


def train_in_one_process(kind: str) -> dict[str, Any]:
    """Do the same by `local_step` and `evaluate`."""
    make, batches = models.MODELS[kind]
    net = make()
    optimizer = optimizer_of(sffx.parameter_groups(net, lr=0.01, classifier_lr=0.02))
    torch.manual_seed(1)
    losses = []
    for epoch in range(EPOCHS):
        seed = int(torch.randint(2**62, ()))
        sums: dict[str, float] = {}
        samples = 0
        for step, (x, y) in enumerate(batches(epoch)):
            add = partial(add_loss, sums, len(y))
            with sffx.block_seeds(mixed(seed, step)):
                sffx.local_step(net, x, y, optimizer, on_block=add)
            samples += len(y)
        losses.append({name: value / samples for name, value in sums.items()})
    evaluations = [sffx.evaluate(net, batches(epoch)) for epoch in range(EPOCHS)]
    return {"net": net, "optimizer": optimizer, "losses": losses, "evaluations": evaluations}


@pytest.fixture(scope="module", params=[("images", 2), ("tokens", 3)])
def trained(request, tmp_path_factory) -> tuple[str, list[dict[str, Any]], dict[str, Any], Path]:
    """The results of each process, those of one process, and the folder of the checkpoint."""
    kind, processes = request.param
    folder = tmp_path_factory.mktemp(f"{kind}{processes}")
    found = run(train_in_pipeline, processes, folder, kind, str(folder))
    for result in found:
        assert isinstance(result, dict), result
    return kind, found, train_in_one_process(kind), folder / "checkpoint"


def test_weights_and_buffers_are_those_of_one_process_to_the_bit(trained):
    _, found, alone, _ = trained
    expected = alone["net"].state_dict()
    together: dict[str, Tensor] = {}
    for result in found:
        assert not set(together) & set(result["state"])
        together.update(result["state"])
    assert set(together) == set(expected)
    for name, value in expected.items():
        assert torch.equal(together[name], value), name


def test_losses_and_evaluations_are_those_of_one_process_on_every_rank(trained):
    _, found, alone, _ = trained
    for result in found:
        assert result["losses"] == alone["losses"]
        assert result["evaluations"] == alone["evaluations"]


def test_the_optimizer_state_is_that_of_one_process_to_the_bit(trained):
    _, found, alone, _ = trained
    names = {parameter: name for name, parameter in alone["net"].named_parameters()}
    states = alone["optimizer"].state
    together: dict[str, Any] = {}
    for result in found:
        together.update(result["optimizer"])
    for parameter, state in states.items():
        for key, value in state.items():
            assert torch.equal(together[f"state.{names[parameter]}.{key}"], value)


def test_a_plateau_lowers_the_rates_of_the_own_blocks(trained):
    _, found, alone, _ = trained
    rates: dict[str, float] = {}
    for result in found:
        rates.update(result["rates"])
    # No loss meets the threshold of 10, so the first step lowers each rate to a tenth.
    expected = {block.target: 0.01 * 0.1 for block in alone["net"].plan}
    assert rates == {**expected, "classifier": 0.02 * 0.1}


def test_nothing_is_sent_upstream_and_little_downstream(trained):
    kind, found, alone, _ = trained
    net = alone["net"]
    blocks = {block.target: block for block in net.plan.all_blocks}
    assert found[-1]["peers"] == set()
    for rank, result in enumerate(found[:-1]):
        assert result["peers"] == {rank + 1}
        block = blocks[result["blocks"][-1]]
        _, batches = models.MODELS[kind]
        crossing = 0
        for epoch in range(EPOCHS):
            for x, y in batches(epoch):
                values = len(y) * 8
                if kind == "images":
                    values += len(y) * 8 * torch.Size(block.shape).numel()
                else:
                    length = x["ids"].shape[1]
                    # The tokens, and the mask in two types at most.
                    values += len(y) * 8 * length * (block.shape[-1] + 2)
                crossing += values
        # Words, and a few layouts, come on top.
        assert crossing * 0.8 <= result["bytes"] <= crossing + 16_000


def test_a_process_holds_its_own_parameters_only(trained):
    _, found, alone, _ = trained
    net = alone["net"]
    total = sum(tensor.numel() for tensor in (*net.parameters(), *net.buffers()))
    assert sum(result["held"] for result in found) == total
    for result in found:
        own = sum(tensor.numel() for tensor in result["state"].values())
        assert result["held"] == own
        assert result["held_by_origin"] <= own


def test_the_gathered_model_is_whole_on_one_process(trained):
    _, found, alone, _ = trained
    *others, last = found
    assert all(result["whole"] is None for result in others)
    expected = alone["net"].state_dict()
    plain = sffx.extract(alone["net"]).state_dict()
    assert list(last["whole"]) == list(expected)
    assert list(last["plain"]) == list(plain)
    assert all(torch.equal(last["whole"][name], expected[name]) for name in expected)
    assert all(torch.equal(last["plain"][name], plain[name]) for name in plain)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_loads_into_one_process(trained):
    kind, _, alone, checkpoint = trained
    net: fx.GraphModule = models.MODELS[kind][0]()
    state = {"net": {name: torch.zeros_like(t) for name, t in net.state_dict().items()}}
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    expected = alone["net"].state_dict()
    assert all(torch.equal(state["net"][name], expected[name]) for name in expected)


def resume(rank: int, checkpoint: str, device: str) -> dict[str, Any]:
    """Load a checkpoint of another number of stages, train one more epoch, and return the state."""
    torch.manual_seed(5)
    net = models.cut_images()
    if device == "meta":
        net = net.to("meta")
    pipe = sffx.Pipeline(net, device="cpu")
    optimizer = optimizer_of(pipe.parameter_groups(lr=0.01, classifier_lr=0.02))
    state = {"net": pipe.state_dict(), "optimizer": pipe.optimizer_state_dict(optimizer)}
    dcp.load(state, checkpoint_id=checkpoint)
    pipe.load_state_dict(state["net"])
    pipe.load_optimizer_state_dict(optimizer, state["optimizer"])
    pipe.train(models.images(7) if pipe.first else None, optimizer)
    return pipe.state_dict()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_checkpoint_of_three_stages_goes_on_in_two(tmp_path, device):
    found = run(train_in_pipeline, 3, tmp_path / "three", "images", str(tmp_path))
    assert all(isinstance(result, dict) for result in found), found
    resumed = run(resume, 2, tmp_path / "two", str(tmp_path / "checkpoint"), device)
    alone = train_in_one_process("images")
    # The checkpoint was written after the plateau had lowered all rates to a tenth.
    for group in alone["optimizer"].param_groups:
        group["lr"] *= 0.1
    for x, y in models.images(7):
        sffx.local_step(alone["net"], x, y, alone["optimizer"])
    together = {**resumed[0], **resumed[1]}
    for name, value in alone["net"].state_dict().items():
        assert torch.equal(together[name], value), name
