"""Gradients and buffers of one stage, averaged over two processes while other work goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sffx
from sffx.runtime.averaging import Averaging, averaged_buffers, copied_buffers
from sffx.runtime.groups import share
from tests.processes import leave, spawn

PROCESSES = 2
# Gloo sends none of the last three.
OTHER_DTYPES = (torch.int8, torch.int16, torch.uint16, torch.float8_e4m3fn)


class Stage(nn.Module):
    """Layers of several dtypes and layouts, and a buffer that is no running statistic."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.half = nn.Linear(3, 2, dtype=torch.bfloat16)
        self.wave = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.bool))
        for dtype in OTHER_DTYPES:
            # In memory it lies in another order.
            self.register_buffer(str(dtype)[6:], torch.zeros(2, 3, dtype=dtype).t())


def stage() -> Stage:
    torch.manual_seed(0)
    return Stage()


def gradients_of(rank: int, module: nn.Module) -> dict[nn.Parameter, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    gradients = {}
    for name, parameter in module.named_parameters():
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        used_here = name != "norm.weight" or rank == 1
        used_anywhere = name != "half.bias"
        if used_here and used_anywhere:
            gradients[parameter] = gradient
    return gradients


def set_buffers(rank: int, module: Stage) -> None:
    module.norm.running_mean.fill_(rank + 1.0)
    module.seen[rank] = True
    for dtype in OTHER_DTYPES:
        module.get_buffer(str(dtype)[6:]).copy_(torch.arange(6).reshape(3, 2) + rank)


def average(rank: int, folder: str) -> None:
    """Run by each process; what it has then is left in a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES
    )
    module = stage()
    set_buffers(rank, module)
    parameters = list(module.parameters())
    gradients = gradients_of(rank, module)
    averaging = Averaging(
        parameters, gradients, None, averaged_buffers([module]), copied_buffers([module])
    )
    gradients.clear()
    found = averaging.wait()
    by_name = {name: found.get(p) for name, p in module.named_parameters()}
    shared = torch.full((2,), rank + 1, dtype=torch.int16)
    share(shared, dist.group.WORLD, 1)
    assert shared.tolist() == [2, 2]
    strides = by_name["conv.weight"].stride() == module.conv.weight.stride()
    torch.save((by_name, dict(module.named_buffers()), strides), f"{folder}/{rank}.pt")
    leave()


def test_two_processes_get_the_mean_of_their_gradients_and_running_statistics(
    tmp_path: Path,
) -> None:
    spawn(average, PROCESSES, str(tmp_path))
    module = stage()
    first, second = (gradients_of(rank, module) for rank in range(PROCESSES))
    for rank in range(PROCESSES):
        gradients, buffers, has_same_strides = torch.load(tmp_path / f"{rank}.pt")
        assert has_same_strides
        for name, parameter in module.named_parameters():
            found = gradients[name]
            if name == "half.bias":  # used nowhere
                assert found is None
                continue
            zero = torch.zeros_like(parameter)
            mean = (first.get(parameter, zero) + second.get(parameter, zero)) / 2
            assert torch.equal(found, mean), name
        assert buffers["norm.running_mean"].tolist() == [1.5] * 4
        assert buffers["seen"].tolist() == [True, False]  # of the first process
        for dtype in OTHER_DTYPES:
            found = buffers[str(dtype)[6:]]
            assert found.dtype == dtype
            assert found.float().tolist() == [[0, 1], [2, 3], [4, 5]]


SHAPES = st.lists(st.integers(0, 3), max_size=4)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.complex64])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Be the only process of a group."""
    folder = tmp_path_factory.mktemp("group")
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@given(
    tensors=st.lists(st.tuples(SHAPES, DTYPES, st.booleans(), st.booleans()), max_size=6),
    seed=st.integers(0, 100),
)
@settings(max_examples=50, deadline=None)
def test_the_mean_over_one_process_is_its_own_gradient(tensors: Any, seed: int) -> None:
    torch.manual_seed(seed)
    parameters, gradients = [], {}
    for shape, dtype, is_turned, is_used in tensors:
        values = torch.randn(shape, dtype=dtype)
        if is_turned:  # in memory it lies in another order
            values = values.permute(tuple(reversed(range(values.ndim))))
        parameter = nn.Parameter(values)
        parameters.append(parameter)
        if is_used:
            gradients[parameter] = torch.randn_like(values)
    statistic = torch.randn(3)
    expected = statistic.clone()
    found = Averaging(parameters, gradients, None, averaged=[statistic]).wait()
    assert found.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        assert torch.equal(found[parameter], gradient)
        assert found[parameter].stride() == torch.empty_like(parameter).stride()
    assert torch.equal(statistic, expected)


def test_a_sparse_gradient_is_refused() -> None:
    weight = nn.Parameter(torch.zeros(4, 2))
    gradient = torch.eye(4, 2).to_sparse()
    with pytest.raises(sffx.InputError, match=r"shape \(4, 2\) is sparse.*sparse=False"):
        Averaging([weight], {weight: gradient})
