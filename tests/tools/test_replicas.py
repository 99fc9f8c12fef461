"""The simulated ring, and a step on it that does not wait for what it has sent."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import sffx
from sffx.runtime.replicate import replication_of
from tools import replicas
from tools.replicas import Ring, by_replicate, exposed_seconds


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """Be the only process of a group."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_sum_takes_as_long_as_a_ring_needs() -> None:
    ring = Ring(processes=4, bandwidth=1000.0, latency=0.1)
    ring.is_slow = True
    start = time.perf_counter()
    works = [ring.allreduce([torch.zeros(50)]) for _ in range(2)]  # 200 bytes each
    for work in works:
        work.wait()
    # Each process sends 2 * 3 / 4 of the bytes, and one sum waits for the other.
    assert ring.busy == pytest.approx(2 * (0.3 + 0.1))
    assert time.perf_counter() - start >= ring.busy


@pytest.mark.usefixtures("alone")
def test_a_step_ends_before_its_gradients_have_arrived_and_a_reader_waits_for_them() -> None:
    layers = (nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    net = sffx.transform(nn.Sequential(*layers), "layer", torch.zeros(2, 4))
    parameters = list(net.parameters())
    ring = Ring(processes=2, bandwidth=1e9, latency=1.0)
    step = by_replicate(net, torch.randn(8, 4), torch.randint(0, 3, (8,)), ring)
    step()
    before = net.state_dict()["block_0.0.weight"].clone()
    ring.is_slow = True
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    assert bytes_on_their_way(net) == 4 * sum(p.numel() + 1 for p in parameters)
    assert ring.busy == pytest.approx(3.0, rel=1e-3)  # two blocks and the classifier
    assert seconds < 1.0
    after = net.state_dict()["block_0.0.weight"]
    assert time.perf_counter() - start >= ring.busy
    assert not torch.equal(before, after)


def bytes_on_their_way(net: nn.Module) -> int:
    replication = replication_of(net)
    assert replication is not None
    return sum(tensor.nbytes for each in replication._pending for tensor in each.tensors)


def test_a_run_writes_a_table_and_its_record(tmp_path: Path) -> None:
    options = "--model squeezenet1_1 --size 32 --batch 2 --rounds 1 --steps 1 --bandwidth 100"
    replicas.main([*options.split(), "--out", str(tmp_path)])
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["bandwidth"] == 100
    lines = (tmp_path / "table.md").read_text().splitlines()
    for name in ("DDP, BP", "DDP, local", "replicate"):
        assert any(line.startswith(f"| {name} |") for line in lines)
        # All send the gradients of the model once, and the local ones those of the heads as well.
        assert record["seconds"][name]["busy"][0] > 2.9e6 * 1.75 / 100e6


def test_what_a_step_waits_for_is_the_median_of_the_differences() -> None:
    assert exposed_seconds({"slow": [3.0, 2.0, 9.0], "free": [1.0, 1.5, 1.0]}) == 2.0
