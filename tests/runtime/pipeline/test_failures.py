"""A rank that fails, ends, is killed or hangs ends all other ranks, with an error that names it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import sffx
from tests.runtime.pipeline import models
from tests.runtime.pipeline.processes import run


class Failure(nn.Module):
    """Does something bad in its third forward."""

    def __init__(self, kind: str, layer: nn.Module) -> None:
        super().__init__()
        self.kind = kind
        self.layer = layer
        self.count = 0

    def forward(self, *args: Any) -> Any:
        self.count += 1
        if self.count == 3:
            self.fail()
        return self.layer(*args)

    def fail(self) -> None:
        """Fail in one of four ways."""
        if self.kind == "exception":
            raise ValueError("a bad layer")
        if self.kind == "exit":
            os._exit(3)
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(10_000)


def train_with_failure(
    rank: int, kind: str, bad: int, cuts: Sequence[str] = ("block_1", "block_3")
) -> Any:
    pipe = sffx.Pipeline(models.cut_images(), cuts=cuts, timeout=4)
    if rank == bad:
        block = pipe.blocks[0]
        setattr(pipe.net, block, Failure(kind, pipe.net.get_submodule(block)))
    optimizer = torch.optim.SGD(pipe.parameter_groups(lr=0.01))
    batches = models.images(sizes=(4,) * 12)
    return pipe.train(batches if pipe.first else None, optimizer)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("kind", "bad"), [("exception", 0), ("hang", 0), ("exit", 2), ("kill", 1), ("exception", 1)]
)
def test_all_ranks_end_and_name_the_bad_one(tmp_path, kind, bad):
    found = run(train_with_failure, 3, tmp_path, kind, bad, grace=5)
    for rank, result in enumerate(found):
        if rank != bad:
            assert isinstance(result, sffx.SffxError), result
            assert "ProcessError" in str(result)
            assert f"rank {bad} (stage {bad}" in str(result)
    if kind == "exception":
        assert "ValueError: a bad layer" in str(found[bad])
        for rank, result in enumerate(found):
            assert rank == bad or "a bad layer" in str(result)


def train_with_bad_loader(rank: int, kind: str) -> Any:
    pipe = sffx.Pipeline(models.cut_images())
    optimizer = torch.optim.SGD(pipe.parameter_groups(lr=0.01))
    loaders = {
        "empty": [] if pipe.first else None,
        "missing": None,
        "everywhere": models.images(),
        "broken": broken() if pipe.first else None,
        "no samples": models.images(sizes=(0, 0)) if pipe.first else None,
        "labels": [(models.images()[0][0], torch.full((6,), 7))] if pipe.first else None,
    }
    return pipe.train(loaders[kind], optimizer)


def broken() -> Any:
    yield from models.images()[:2]
    raise OSError("no such file")


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "the loader yielded no batches"),
        ("no samples", "the batch has 0 samples"),
        ("missing", "its loader is None"),
        ("everywhere", "only the first stage takes a loader"),
        ("broken", "no such file"),
        ("labels", "labels run from 7 to 7"),
    ],
)
def test_a_bad_loader_ends_all_ranks_with_its_error(tmp_path, kind, message):
    for result in run(train_with_bad_loader, 2, tmp_path, kind):
        assert isinstance(result, sffx.SffxError), result
        assert message in str(result)


def train_few(rank: int, count: int) -> Any:
    pipe = sffx.Pipeline(models.cut_images(), cuts=["block_1", "block_2"])
    optimizer = torch.optim.SGD(pipe.parameter_groups(lr=0.01))
    batches = models.images(sizes=(4,) * count)
    losses = pipe.train(batches if pipe.first else None, optimizer)
    return losses, pipe.evaluate(batches if pipe.first else None).samples


@pytest.mark.parametrize("count", [1])
def test_fewer_batches_than_stages_are_enough(tmp_path, count):
    net = models.cut_images()
    optimizer = torch.optim.SGD(sffx.parameter_groups(net, lr=0.01))
    batches = models.images(sizes=(4,) * count)
    total = sum(sffx.local_step(net, x, y, optimizer).item() for x, y in batches)
    for losses, samples in run(train_few, 3, tmp_path, count):
        assert sum(losses.values()) == pytest.approx(total / count, rel=1e-14)
        assert samples == 4 * count


def train_alone_and_together(rank: int) -> Any:
    """Fail in a pipeline of one process, and then, in the other process, in one over both."""
    group = dist.new_group([rank], use_local_synchronization=True)
    if rank == 0:
        alone = sffx.Pipeline(models.cut_images(), group=group)
        with pytest.raises(sffx.InputError, match="no batches"):
            alone.train([], torch.optim.SGD(alone.parameters(), lr=0.01))
    # Rank 0 has made a pipeline more than rank 1.
    return train_with_failure(rank, "exception", 1, ["block_2"])


def test_a_failure_is_known_in_its_own_pipeline_and_in_no_other(tmp_path):
    for rank, result in enumerate(run(train_alone_and_together, 2, tmp_path, grace=6)):
        assert ("ProcessError" in str(result)) == (rank == 0)
        assert "ValueError: a bad layer" in str(result)


def begin_apart(rank: int, bad: str) -> Any:
    """Make a pipeline in which one rank does something else than the other."""
    net = models.cut_images()
    if bad == "missing" and rank == 1:
        return None
    depth = rank if bad == "refused" else 2
    pipe = sffx.Pipeline(net, cuts=["block_2"], timeout=1.5, depth=depth)
    data = models.images() if pipe.first else None
    optimizer = torch.optim.SGD(pipe.parameter_groups(lr=0.01))
    if bad == "accumulation":
        return pipe.train(data, optimizer, accumulate=rank + 1)
    if rank == 1:
        return pipe.gather() if bad == "gather" else pipe.evaluate(data)
    return pipe.train(data, optimizer)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("missing", "rank 1 hangs"),
        ("refused", "depth is 0"),
        ("evaluate", "trains with accumulate=1; rank 1 (stage 1: block_2 to classifier) evaluates"),
        ("gather", "rank 1 (stage 1: block_2 to classifier) gathers the model in rank 0"),
        ("accumulation", "trains with accumulate=2"),
    ],
)
def test_ranks_that_do_different_things_end_at_once(tmp_path, bad, message):
    for rank, result in enumerate(run(begin_apart, 2, tmp_path, bad, grace=6)):
        if bad == "missing" and rank == 1:
            continue
        assert isinstance(result, sffx.SffxError), result
        assert message in str(result)
