"""Two processes that hold half of each parameter (FSDP2) and get half a batch each.

They do what one process does on the whole batch.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import sffx
from tests.processes import leave, spawn
from tests.runtime.test_distributed import PROCESSES, batch, cut_model

RATE = 0.05


def optimizer_of(net: fx.GraphModule) -> torch.optim.Optimizer:
    return torch.optim.SGD(sffx.parameter_groups(net, lr=RATE), momentum=0.9)


def sharded(seed: int = 0) -> fx.GraphModule:
    net = cut_model(seed)
    sffx.shard(net, mesh=mesh())
    return net


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def whole(values: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: value.full_tensor().detach().clone() for name, value in values.items()}


def gathered(net: fx.GraphModule) -> set[str]:
    """Return the parts of a model that have a whole parameter."""
    return {
        name
        for name, part in net.named_children()
        if any(not isinstance(p, DTensor) for p in part.parameters())
    }


def run(rank: int, folder: str) -> None:
    """Run by each process; what it has then is left in a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES
    )
    x, y = (part.chunk(PROCESSES)[rank] for part in batch())
    found: dict[str, Any] = {}

    net = sharded()
    (sffx.local_loss(net, x, y) * 0.5).backward()
    net(x)  # a forward pass of one's own leaves the parameters gathered
    for part in (net.block_1, net.head_2):
        part.set_requires_gradient_sync(False)  # as if further calls were to follow
    sffx.local_loss(net, x, y).backward()  # adds to what is there
    found["gradients"] = whole({name: p.grad for name, p in net.named_parameters()})

    net = sharded()
    calls: list[str] = []
    for name, p in net.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name))
    sffx.local_loss(net, x, y).backward()
    found["calls"] = calls, [name for name, _ in net.named_parameters()]

    net = sharded()
    together: list[set[str]] = []
    for _, part in net.named_children():
        part.register_forward_hook(lambda *_: together.append(gathered(net)))
    optimizer = optimizer_of(net)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "local_step does not average")
        found["losses"] = [sffx.local_step(net, x, y, optimizer) for _ in range(3)]
    found["together in a step"] = together.copy()
    together.clear()
    found["evaluation"] = sffx.evaluate(net, [batch()])
    found["together in scores"] = together.copy()
    found["losses"].append(sffx.local_step(net, x, y, optimizer))
    net(x)
    found["losses"].append(sffx.local_step(net, x, y, optimizer))
    found["parameters"] = whole(dict(net.named_parameters()))

    found["state"] = get_model_state_dict(
        net, options=StateDictOptions(full_state_dict=True, cpu_offload=False)
    )

    counted: list[str] = []
    hook = net.block_0.register_forward_pre_hook(lambda *_: counted.append("block_0 runs"))
    with counting(counted):
        sffx.local_step(net, x, y, optimizer)
    hook.remove()
    found["collectives"] = counted
    found["blocks alone"] = train_last_block(sharded(), x, y)

    together.clear()
    for part in (net.block_0, net.block_1, net.head_1):
        part.requires_grad_(False)
    sffx.local_step(net, x, y, optimizer)
    with torch.no_grad():
        sffx.local_loss(net, x, y)
    found["together where frozen"] = together.copy()

    found["errors"] = errors(net, x, y)
    found["told"] = told(rank, x, y)
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


@contextmanager
def counting(calls: list[str]) -> Iterator[None]:
    """Note the collectives that FSDP calls."""
    with ExitStack() as patches:
        for name, older in (
            ("all_gather_single", "all_gather_into_tensor"),
            ("reduce_scatter_single", "reduce_scatter_tensor"),
        ):
            name = name if hasattr(dist, name) else older
            real = getattr(dist, name)

            def counted(*args: Any, real: Any = real, name: str = name, **options: Any) -> Any:
                calls.append(name)
                return real(*args, **options)

            patches.enter_context(mock.patch.object(dist, name, counted))
        yield


def train_last_block(net: fx.GraphModule, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Train the last block alone, then all, and return the weights."""
    optimizer = optimizer_of(net)
    sffx.local_step(net, x, y, optimizer, blocks=[list(net.plan)[-1].target])
    sffx.local_step(net, x, y, optimizer)
    return whole(dict(net.named_parameters()))


def told(rank: int, x: Tensor, y: Tensor) -> dict[str, str]:
    """Return what a process is told where the processes differ."""
    found = {
        "weights": refusal(lambda: sharded(seed=rank)),
        "after a finish": refusal(lambda: sffx.finish(cut_model(0))),
    }
    net = sharded()
    optimizer = optimizer_of(net)

    def epoch() -> None:
        for _ in range(3 - rank):
            sffx.local_step(net, x, y, optimizer)
        sffx.evaluate(net, [(x, y)])

    found["loaders"] = refusal(epoch, sffx.ProcessError)
    net = sharded()
    found["loaders of an evaluation"] = refusal(
        lambda: (sffx.evaluate(net, [(x, y)] * (3 - rank)), sffx.finish(net)), sffx.ProcessError
    )
    return found


def errors(net: fx.GraphModule, x: Tensor, y: Tensor) -> dict[str, str]:
    """Return what is said to what cannot be done, by a part of it that is expected."""
    whole, partly, model = (
        cut_model(0),
        cut_model(0),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)),
    )
    for part in whole.children():
        fully_shard(part, mesh=mesh())
    fully_shard(whole, mesh=mesh())
    fully_shard(partly.block_1, mesh=mesh())
    fully_shard(model[0], mesh=mesh())
    calls = {
        "fully_shard was called on net itself": lambda: sffx.local_loss(whole, x, y),
        "block_0.0.weight is not sharded": lambda: sffx.local_step(
            partly, x, y, optimizer_of(partly)
        ),
        "model is sharded": lambda: sffx.transform(model, "layer", x.flatten(1)[:, :4]),
        "net is sharded already": lambda: sffx.shard(net),
        "net is sharded, and shards cannot be copied": lambda: sffx.extract(net),
        "shards cannot be copied. Hint: torch.distributed.checkpoint": lambda: sffx.export_onnx(
            net, "net.onnx"
        ),
        "get_model_state_dict": lambda: sffx.EarlyExit(net),
        "loaded into a model that is cut": lambda: sffx.footprint(net, 4),
    }
    return {expected: refusal(call) for expected, call in calls.items()}


def refusal(call: Callable[[], object], kind: type[Exception] = sffx.InputError) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def test_two_processes_with_half_of_each_parameter_train_as_one_process(tmp_path: Path) -> None:
    spawn(run, PROCESSES, str(tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]

    net = cut_model(seed=0)
    sffx.local_loss(net, *batch()).backward()
    gradients = {name: 1.5 * p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(net.parameters()))

    net = cut_model(seed=0)
    optimizer = optimizer_of(net)
    sffx.local_step(net, *batch(), optimizer, blocks=[list(net.plan)[-1].target])
    sffx.local_step(net, *batch(), optimizer)
    alone = {name: p.detach() for name, p in net.named_parameters()}

    net = cut_model(seed=0)
    optimizer = optimizer_of(net)
    losses = [sffx.local_step(net, *batch(), optimizer) for _ in range(3)]
    evaluation = sffx.evaluate(net, [batch()])
    losses += [sffx.local_step(net, *batch(), optimizer) for _ in range(2)]

    for one in found:
        # One gather and one sum for each block with its head, and for the classifier.
        assert len(one["collectives"]) - 1 == 2 * (len(net.plan) + 1)
        # The second block is being gathered before the first one runs.
        assert one["collectives"].index("block_0 runs") == 2
        torch.testing.assert_close(one["blocks alone"], alone, rtol=1e-10, atol=1e-13)
        assert re.match(
            r"rank 1: block_0.0.weight is .*, and in the first process", one["told"]["weights"]
        )
        expected = "rank 0 trains step 3 by local_step; rank 1 computes scores after step 2."
        assert expected in one["told"]["loaders"]
        expected = "rank 0 computes scores after step 0; rank 1 finishes after step 0."
        assert expected in one["told"]["loaders of an evaluation"]
        torch.testing.assert_close(one["gradients"], gradients, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(
            one["parameters"],
            {name: p.detach() for name, p in net.named_parameters()},
            rtol=1e-10,
            atol=1e-13,
        )
        assert one["evaluation"].accuracy == evaluation.accuracy
        assert one["evaluation"].loss == pytest.approx(evaluation.loss)
        assert sorted(one["calls"][0]) == sorted(one["calls"][1])  # each hook once
        assert set().union(*one["together in a step"]) == {
            name for name, _ in net.named_children() if "norm" not in name
        } - {"readout"}
        assert max(map(len, one["together in a step"])) == 2  # a block and its head
        assert max(map(len, one["together in scores"])) == 2  # as documented: a block and its head
        again = cut_model(seed=1)
        again.load_state_dict(one["state"])
        torch.testing.assert_close(
            dict(sffx.extract(again).state_dict()), dict(sffx.extract(net).state_dict())
        )
        assert max(map(len, one["together where frozen"])) == 2
        assert all(expected in said for expected, said in one["errors"].items()), one["errors"]
    torch.testing.assert_close(
        torch.stack([torch.stack(one["losses"]) for one in found]).mean(0), torch.stack(losses)
    )


class Counted(nn.Module):
    """Keeps a number that depends on the samples, as no running statistics of torch do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.add_(x.detach().sum())
        return self.linear(x)


class CountingNorm(nn.Module):
    """A norm with running statistics, and with buffers that not every backend sends as they are."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm1d(channels, affine=False)
        self.register_buffer("positive", torch.zeros(channels, dtype=torch.int16))
        self.register_buffer("products", torch.zeros(channels, 2).t())

    def forward(self, y: Tensor) -> Tensor:
        normed = self.statistics(y)
        if self.training:
            self.positive += (y > 0).sum(0).to(torch.int16)
            self.products += torch.stack([y.sum(0), y.square().sum(0)])
        return normed


def normalised() -> fx.GraphModule:
    """Return a net whose blocks, heads or norms have buffers of each kind."""
    torch.manual_seed(0)
    layers = (nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), Counted(), nn.ReLU())
    model = nn.Sequential(*layers, nn.Linear(8, 3))
    example = torch.zeros(2, 4)
    return sffx.transform(model, "layer", example, norm=lambda block: CountingNorm(block.channels))


def train_with_statistics(rank: int, folder: str) -> None:
    """Run by each process; its buffers are left in a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES
    )
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(3, 8, 4, generator=generator)
    y = torch.randint(0, 3, (3, 8), generator=generator)
    net = normalised().train()
    alone = normalised().train()  # the statistics of this process's own samples
    sffx.local_loss(alone, x[0], y[0])
    sffx.shard(net, mesh=mesh())
    sffx.local_loss(net, x[0], y[0])
    once = {name: buffer.clone() for name, buffer in net.named_buffers()}
    optimizer = optimizer_of(net)
    sffx.local_step(net, x[1], y[1], optimizer)
    sffx.local_step(net, x[2], y[2], optimizer, blocks=["block_0", "classifier"])
    own = dict(alone.named_buffers())
    torch.save((own, once, dict(net.named_buffers())), f"{folder}/{rank}.pt")
    leave()


def test_all_processes_have_the_same_statistics(tmp_path: Path) -> None:
    spawn(train_with_statistics, PROCESSES, str(tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES)]
    require_statistics(*found)


def require_statistics(
    first: tuple[dict[str, Tensor], ...], second: tuple[dict[str, Tensor], ...]
) -> None:
    """Require equal buffers: mean running statistics, and otherwise those of the first process.

    Args:
        first: the first process's buffers: by its own samples alone, after one step, after more.
        second: those of the second process.
    """
    own, other = first[0], second[0]
    for name, buffer in first[1].items():
        expected = own[name]
        if "tracked" not in name:
            assert not torch.equal(own[name], other[name]), name
        if "running" in name:
            expected = (own[name] + other[name]) / 2
        torch.testing.assert_close(buffer, expected)
    for one, another in zip(first[1:], second[1:], strict=True):
        assert one.keys() == another.keys()
        for name, buffer in one.items():
            assert torch.equal(buffer, another[name]), name
    assert len(first[1]) == 14
