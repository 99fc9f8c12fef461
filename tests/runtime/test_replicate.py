"""Processes on a share of each batch each, which do what one process does on the whole batch."""

from __future__ import annotations

import copy
import os
import pickle
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel

import sffx
from sffx.runtime.replicate import replication_of
from tests.processes import leave, spawn
from tests.runtime.test_distributed import cut_model
from tests.runtime.test_shard import normalised, require_statistics
from tests.toys import kept

STEPS, BATCH, CLASSES = 4, 12, 4


def batches(seed: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(STEPS):
        x = torch.randn(BATCH, 3, 8, 8, dtype=torch.float64, generator=generator)
        found.append((x, torch.randint(0, CLASSES, (BATCH,), generator=generator)))
    return found


fresh = kept(cut_model)


def share(rank: int, processes: int) -> list[tuple[Tensor, Tensor]]:
    return [(x.chunk(processes)[rank], y.chunk(processes)[rank]) for x, y in batches()]


def adamw(net: fx.GraphModule) -> torch.optim.Optimizer:
    return torch.optim.AdamW(sffx.parameter_groups(net, lr=0.05))


def sgd_and_adamw(net: fx.GraphModule) -> dict[str, torch.optim.Optimizer]:
    """Return an optimizer for each block, of two kinds."""
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for i, group in enumerate(sffx.parameter_groups(net, lr=0.05)):
        if i % 2:
            optimizers[group["name"]] = torch.optim.SGD([group], momentum=0.9)
        else:
            optimizers[group["name"]] = torch.optim.AdamW([group])
    return optimizers


def clip_each_block(net: fx.GraphModule) -> torch.optim.Optimizer:
    """Return an optimizer whose steps clip the gradients that they are about to use."""
    optimizer = torch.optim.SGD(sffx.parameter_groups(net, lr=0.05))

    def clip(stepping: torch.optim.Optimizer, *_: object) -> None:
        for group in stepping.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 0.01)

    optimizer.register_step_pre_hook(clip)
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(0.5))
    return optimizer


def train(net: fx.GraphModule, optimizer: Any, data: Any, **options: Any) -> dict[str, Tensor]:
    """Train for as many steps as there are batches, and return the weights."""
    for x, y in data:
        sffx.local_step(net, x, y, optimizer, **options)
    return weights(net)


def train_with_schedules(net: fx.GraphModule, data: Any) -> dict[str, Tensor]:
    """Train with learning rates that change after each step, and a plateau of each block."""
    optimizer = adamw(net)
    plateau = sffx.BlockPlateau(optimizer, factor=0.3, patience=0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    names = [group["name"] for group in optimizer.param_groups]
    for i, (x, y) in enumerate(data):
        sffx.local_step(net, x, y, optimizer)
        scheduler.step()
        plateau.step({name: float(i) for name in names})
        optimizer.param_groups[0]["weight_decay"] = 0.1 * i
    return weights(net)


def train_some_blocks(net: fx.GraphModule, data: Any) -> dict[str, Tensor]:
    """Train other blocks in each step, with one frozen."""
    net.block_1.requires_grad_(False)
    optimizer = adamw(net)
    for i, (x, y) in enumerate(data):
        blocks = None if i % 2 else ["block_0", "classifier"]
        sffx.local_step(net, x, y, optimizer, blocks=blocks)
    return weights(net)


def train_by_loss(net: fx.GraphModule, data: Any) -> dict[str, Tensor]:
    """Accumulate over two calls of `local_loss`, with a `local_step` in between."""
    optimizer = adamw(net)
    sffx.local_step(net, *data[0], optimizer)
    (sffx.local_loss(net, *data[1]) / 2).backward()
    losses = sffx.block_losses(net, *data[2])
    sum(losses.values()).backward()
    optimizer.step()
    sffx.local_step(net, *data[3], optimizer)
    return weights(net)


def train_tied(net: fx.GraphModule, data: Any) -> dict[str, Tensor]:
    """Train two blocks that share a weight. The second one reads what the first one learnt."""
    net.block_2.get_submodule("3.conv").weight = net.block_1.get_submodule("2.conv").weight
    return train(net, torch.optim.SGD(net.parameters(), lr=0.05), data)


def watch_weights(net: fx.GraphModule, data: Any) -> dict[str, Tensor]:
    """Train, and read all weights in the middle of each step."""
    optimizer = adamw(net)
    sums: list[Tensor] = []

    def read(*_: object) -> None:
        sums.append(torch.stack([p.detach().sum() for p in net.parameters()]).sum())

    for x, y in data:
        sffx.local_step(net, x, y, optimizer, on_block=read)
    return {"sums": torch.stack(sums)}


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


WAYS: dict[str, Callable[[fx.GraphModule, Any], dict[str, Tensor]]] = {
    "adamw": lambda net, data: train(net, adamw(net), data),
    "an optimizer for each block": lambda net, data: train(net, sgd_and_adamw(net), data),
    "clipped": lambda net, data: train(net, clip_each_block(net), data),
    "schedules": train_with_schedules,
    "some blocks": train_some_blocks,
    "local_loss": train_by_loss,
    "tied": train_tied,
    "read in a step": watch_weights,
}


def ways(processes: int) -> dict[str, Callable[[fx.GraphModule, Any], dict[str, Tensor]]]:
    """Return the ways to train: all with two processes, fewer with three."""
    if processes == 2:
        return WAYS
    return {name: WAYS[name] for name in ("some blocks", "local_loss", "tied")}


def readings(net: fx.GraphModule, rank: int) -> dict[str, bool]:
    """Return, by the way of reading, whether an update that is pending is seen."""
    optimizer = adamw(net)
    x, y = share(rank, dist.get_world_size())[0]

    def vector(parameters: Any) -> Tensor:
        return torch.cat([p.detach().flatten() for p in parameters])

    def whole(model: nn.Module) -> Tensor:
        return vector(dict(sorted(model.state_dict().items())).values())

    ways: dict[str, Callable[[], Tensor]] = {
        "state_dict": lambda: whole(net),
        "parameters": lambda: vector(net.parameters()),
        "deepcopy": lambda: vector(copy.deepcopy(net).parameters()),
        "pickle": lambda: vector(pickle.loads(pickle.dumps(net)).parameters()),
        "extract": lambda: vector(sffx.extract(net).parameters()),
        "forward": lambda: net.eval()(x).detach(),
        "block_scores": lambda: sffx.block_scores(net.train(), x).flatten(),
        "evaluate": lambda: torch.tensor(list(sffx.evaluate(net, [(x, y)]).loss.values())),
        "optimizer": lambda: vector(
            state["exp_avg"] for state in optimizer.state_dict()["state"].values()
        ),
        "ema": lambda: vector(torch.optim.swa_utils.AveragedModel(net).parameters()),
    }
    seen = {}
    sffx.local_step(net, x, y, optimizer)
    for name, read in ways.items():
        net.train()
        with torch.no_grad():
            sffx.finish(net)
            before = read()
        net.train()
        sffx.local_step(net, x, y, optimizer)
        replication = replication_of(net)
        assert replication is not None
        assert replication._pending  # the step is not done yet
        with torch.no_grad():
            after = read()
            sffx.finish(net)
            again = read()
        seen[name] = bool(torch.equal(after, again) and not torch.equal(before, after))
    return seen


def refusal(call: Callable[[], object], kind: type[Exception] = sffx.InputError) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def refusals(net: fx.GraphModule, rank: int) -> dict[str, str]:
    """Return what is said to what cannot be done, by a part of it that is expected."""
    x, y = share(rank, dist.get_world_size())[0]
    embedding = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    sparse = sffx.transform(embedding, "layer", torch.zeros(2, 2, dtype=torch.long))
    other = sffx.transform(
        nn.Sequential(nn.Linear(2 + rank, 3), nn.ReLU(), nn.Linear(3, 3)),
        "layer",
        torch.zeros(1, 2 + rank),
    )
    dtypes = fresh(0).float() if rank else fresh(0)
    calls = {
        "net is replicated already": lambda: sffx.replicate(net),
        "net is replicated, and only local_step": lambda: sffx.sff_loss(net(x), y),
        "its blocks stay on the device": lambda: sffx.offload(net, adamw(net)),
        "group is a str, not a process group": lambda: sffx.replicate(fresh(0), "all"),
        "timeout is 0": lambda: sffx.replicate(fresh(0), timeout=0),
        "timeout is inf": lambda: sffx.replicate(fresh(0), timeout=float("inf")),
        "has sparse gradients": lambda: sffx.replicate(sparse),
        "rank 1: net has another plan": lambda: sffx.replicate(other),
        "rank 1: block_0.0.weight is parameter (6, 3, 3, 3) float32, and in the first process "
        "parameter (6, 3, 3, 3) float64": lambda: sffx.replicate(dtypes),
        "net is not trained by several processes together": lambda: sffx.finish(fresh(0)),
    }
    return {expected: refusal(call) for expected, call in calls.items()}


def attempt(call: Callable[[], object]) -> str:
    """Return what a call raises, after its kind; "" if nothing."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def failures(rank: int) -> dict[str, str]:
    """Return what each process is told where the processes do different things, by what."""
    x, y = share(rank, 2)[0]
    told: dict[str, str] = {}

    def replicas() -> tuple[fx.GraphModule, torch.optim.Optimizer]:
        net = fresh(0)
        sffx.replicate(net, timeout=60)
        return net, adamw(net)

    def epoch(net: fx.GraphModule, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(3 - rank):
            sffx.local_step(net, x, y, optimizer)

    net, optimizer = replicas()
    told["loaders, then evaluate"] = attempt(
        lambda: (epoch(net, optimizer), sffx.evaluate(net, [(x, y)], group=dist.group.WORLD))
    )
    told["weights after it"] = str(float(sum(p.sum() for p in net.state_dict().values())))
    told["a step after it"] = attempt(lambda: sffx.local_step(net, x, y, optimizer))
    net, optimizer = replicas()
    told["loaders, then finish"] = attempt(lambda: (epoch(net, optimizer), sffx.finish(net)))
    net, optimizer = replicas()
    told["blocks"] = attempt(
        lambda: sffx.local_step(net, x, y, optimizer, blocks=["block_0", "block_1"][: 2 - rank])
    )
    net = fresh(0)
    sffx.replicate(net, timeout=2)
    if rank:
        time.sleep(5)
    told["a process that hangs"] = attempt(
        lambda: (sffx.local_step(net, x, y, adamw(net)), sffx.finish(net))
    )
    net, optimizer = replicas()
    if rank:
        net.load_state_dict(net.state_dict())
    told["loads"] = attempt(lambda: sffx.local_step(net, x, y, optimizer))

    net, optimizer = replicas()
    labels = y + 100 * rank
    told["evaluation"] = attempt(lambda: sffx.evaluate(net, [(x, labels)], group=dist.group.WORLD))

    def fail(name: str, *_: object) -> None:
        if rank and name == "block_1":
            raise ValueError("a full disk")

    net = fresh(0)
    state = net.state_dict()
    sffx.replicate(net, timeout=60)
    optimizer = adamw(net)
    sffx.local_step(net, x, y, optimizer)
    started = time.monotonic()
    told["an error in a step"] = attempt(
        lambda: (sffx.local_step(net, x, y, optimizer, on_block=fail), sffx.finish(net))
    )
    assert time.monotonic() - started < 30  # far less than the timeout
    told["weights in the middle"] = attempt(net.state_dict)
    net.load_state_dict(state)
    sffx.replicate(net, timeout=60)
    told["replicated again"] = attempt(
        lambda: (sffx.local_step(net, x, y, optimizer), sffx.finish(net))
    )
    return told


def end_in_a_step(rank: int, folder: str) -> None:
    """Let one process end in the middle of a step. The other one leaves in a file what it sees."""
    x, y = share(rank, 2)[0]
    net = fresh(0)
    sffx.replicate(net, timeout=60)

    def end(name: str, *_: object) -> None:
        if rank and name == "block_1":
            os._exit(0)

    told = attempt(lambda: (sffx.local_step(net, x, y, adamw(net), on_block=end), sffx.finish(net)))
    Path(f"{folder}/told").write_text(told)
    os._exit(0)


def statistics(rank: int) -> tuple[dict[str, Tensor], ...]:
    """Return the buffers of own samples, those after one step, and those after more."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(3, 8, 4, generator=generator)
    y = torch.randint(0, 3, (3, 8), generator=generator)
    alone = normalised().train()
    sffx.local_loss(alone, x[0], y[0])
    net = normalised().train()
    sffx.replicate(net, timeout=60)
    sffx.local_step(net, x[0], y[0], adamw(net))
    once = {name: buffer.clone() for name, buffer in net.named_buffers()}
    sffx.local_step(net, x[1], y[1], adamw(net))
    sffx.local_step(net, x[1], y[1], adamw(net), blocks=["block_0", "classifier"])
    sffx.local_loss(net, x[2], y[2])
    return dict(alone.named_buffers()), once, dict(net.named_buffers())


def start(rank: int, folder: str, processes: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes
    )


def run(rank: int, folder: str, processes: int) -> None:
    """Run by each process; what it has then is left in a file."""
    warnings.filterwarnings("error", "Detected call of `lr_scheduler.step")
    warnings.filterwarnings("error", "local_step does not average")
    start(rank, folder, processes)
    data = share(rank, processes)
    found: dict[str, Any] = {}
    for name, way in ways(processes).items():
        net = fresh(seed=rank)  # the weights of rank 0 count
        sffx.replicate(net, timeout=60)
        found[name] = way(net, data)
    found["evaluation"] = sffx.evaluate(net, data[: 2 * rank], group=dist.group.WORLD)
    if processes == 2:
        model = DistributedDataParallel(sffx.LocalLoss(fresh(seed=0)))
        optimizer = adamw(model.module.net)
        for x, y in data:
            optimizer.zero_grad()
            model(x, y).backward()
            optimizer.step()
        found["DDP"] = weights(model.module.net)
        found["readings"] = readings(net, rank)
        found["refusals"] = refusals(net, rank)
        found["failures"] = failures(rank)
        found["buffers"] = statistics(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    if processes == 2:
        end_in_a_step(rank, folder)
    leave()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_with_a_share_each_train_as_one_with_the_whole(
    processes: int, tmp_path: Path
) -> None:
    spawn(run, processes, str(tmp_path), processes)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(processes)]
    for name, way in ways(processes).items():
        net = fresh(seed=0)
        before = weights(net)
        expected = way(net, batches())
        assert not torch.equal(before["block_0.0.weight"], weights(net)["block_0.0.weight"])
        for one in found:
            torch.testing.assert_close(one[name], expected, rtol=1e-11, atol=1e-12, msg=name)
            assert_equal(one[name], found[0][name])
    evaluated = []
    for rank in range(processes):
        evaluated += share(rank, processes)[: 2 * rank]
    evaluation = sffx.evaluate(net, evaluated)
    for one in found:
        assert one["evaluation"].samples == evaluation.samples
        assert one["evaluation"].accuracy == evaluation.accuracy
        assert one["evaluation"].loss == pytest.approx(evaluation.loss, rel=1e-10)
    if processes == 2:
        for one in found:
            assert_equal(one["adamw"], one["DDP"])
            assert all(one["readings"].values()), one["readings"]
            assert all(expected in said for expected, said in one["refusals"].items()), one
        require_failures(*(one["failures"] for one in found))
        require_statistics(*(one["buffers"] for one in found))
        assert re.match("ProcessError: another process has ended", (tmp_path / "told").read_text())


def require_failures(first: dict[str, str], second: dict[str, str]) -> None:
    both = {
        "loaders, then evaluate": "ProcessError: the processes do different things: rank 0 trains "
        "step 3 by local_step; rank 1 evaluates after step 2. Hint: give all loaders as many",
        "a step after it": "ProcessError: the replicas have come apart: ProcessError: the proc",
        "loaders, then finish": "rank 0 trains step 3 by local_step; rank 1 finishes after step 2",
        "blocks": "Hint: the same blocks=...",
        "loads": "rank 0 has loaded 0 state dicts; rank 1 has loaded 1 state dicts",
    }
    for name, expected in both.items():
        assert expected in first[name], (name, first[name])
        assert expected in second[name], (name, second[name])
    assert "or took longer than the timeout" in first["a process that hangs"]
    assert first["weights after it"] == second["weights after it"]
    assert second["evaluation"].startswith("InputError: labels run from")
    assert first["evaluation"].startswith("ProcessError: the evaluation failed on rank 1")
    assert second["an error in a step"] == "ValueError: a full disk"
    assert "another process failed, rank 1: ValueError: a full disk" in first["an error in a step"]
    # The process that failed may have sent nothing of this step, and then it has lost nothing.
    expected = "ProcessError: the weights are those in the middle of step 2: ProcessError"
    assert first["weights in the middle"].startswith(expected)
    assert first["replicated again"] == second["replicated again"] == ""


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
