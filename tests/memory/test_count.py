"""Counted memory against four oracles.

They are: counts by hand, torch's MemTracker, a second counter that polls weak references, and the
allocator as the profiler sees it.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import SGD, AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from sffx.errors import InputError
from sffx.memory.count import CATEGORIES, MemoryCount, MemorySplit, count_memory
from sffx.runtime.gradients import listeners, mark_gradients


@dataclass
class Task:
    """A model, its data, its optimizer and one training step."""

    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    optimizer: Optimizer | None

    def step(self) -> None:
        loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def count(self) -> MemoryCount:
        return count_memory(self.step, model=self.model, optimizer=self.optimizer)

    def state(self) -> list[torch.Tensor]:
        return [*self.model.parameters(), *self.model.buffers(), self.x, self.y]


class CheckpointedResNet(nn.Module):
    """resnet18 that keeps only what enters each residual block and computes the rest again."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torchvision.models.resnet18(num_classes=10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        net = self.net
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        for block in (*net.layer1, *net.layer2, *net.layer3, *net.layer4):
            x = checkpoint(block, x, use_reentrant=False)
        return net.fc(torch.flatten(net.avgpool(x), 1))


def mlp() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    ), torch.randn(32, 64)


def convnet() -> tuple[nn.Module, torch.Tensor]:
    first = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
    )
    second = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
    )
    return nn.Sequential(first, second, nn.Linear(16, 10)), torch.randn(4, 3, 16, 16)


def resnet18() -> tuple[nn.Module, torch.Tensor]:
    return torchvision.models.resnet18(num_classes=10), torch.randn(2, 3, 32, 32)


def checkpointed() -> tuple[nn.Module, torch.Tensor]:
    return CheckpointedResNet(), torch.randn(2, 3, 32, 32)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer | None]] = {
    "none": lambda model: None,
    "momentum": lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda model: AdamW(model.parameters(), lr=1e-3),
}
CASES = [(build, name) for build in (mlp, convnet) for name in OPTIMIZERS] + [
    (resnet18, "momentum"),
    (checkpointed, "none"),
]


def task(build: Callable[[], tuple[nn.Module, torch.Tensor]], optimizer: str = "none") -> Task:
    torch.manual_seed(0)
    model, x = build()
    return Task(model, x, torch.randint(0, 10, (x.shape[0],)), OPTIMIZERS[optimizer](model))


def nbytes(tensors: Any) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


# Counted by hand


def test_an_mlp_is_counted_to_the_byte() -> None:
    # B = 2, Linear(5, 16), ReLU, Linear(16, 3), no biases, float32, int64 labels.
    # W1 320, W2 192; x 40, y 16.
    # Forward:  h 128, r = relu(h) 128 (saved; h is dropped), z 24, log-softmax p 24 (saved; z is
    # dropped), loss 4, total weight 4.
    # Backward: a gradient of one for the loss, 4. torch.autograd.backward holds it until it
    # returns, and the step holds the loss. With respect to p 24, with respect to z 24 (p is
    # dropped), then
    #   product 2: r 128 + loss and its one 8 + gz 24 + gW2 192 + gr 128     = 480
    #   relu:      r 128 + loss and its one 8 + gr 128 + gh 128 + gW2 192    = 584
    #              (392 of them are activations: their peak)
    #   product 1: loss and its one 8 + gh 128 + gW2 192 + gW1 320           = 648: the peak
    model = nn.Sequential(nn.Linear(5, 16, bias=False), nn.ReLU(), nn.Linear(16, 3, bias=False))
    count = Task(model, torch.randn(2, 5), torch.tensor([0, 2]), None).count()
    at_peak = MemorySplit(
        parameters=512,
        gradients=512,
        optimizer_state=0,
        optimizer_temporaries=0,
        activations=136,
        inputs=56,
    )
    assert count == MemoryCount(512, 512, 0, 0, 392, 56, peak=512 + 56 + 648, at_peak=at_peak)
    assert at_peak.total == count.peak


def test_adamw_keeps_two_copies_and_a_step_scalar_per_parameter() -> None:
    subject = task(convnet, "adamw")
    parameters = list(subject.model.parameters())
    count = subject.count()
    assert count.gradients == nbytes(parameters)
    assert count.optimizer_state == 2 * nbytes(parameters) + 4 * len(parameters)
    assert count.parameters == nbytes(parameters) + nbytes(subject.model.buffers())
    assert count.inputs == nbytes([subject.x, subject.y])


def test_a_chain_without_gradient_holds_two_tensors_at_a_time() -> None:
    x = torch.zeros(1000)

    @torch.no_grad()
    def step() -> None:
        h = x
        for _ in range(10):
            h = h.exp()

    count = count_memory(step, model=nn.Identity())
    assert (count.activations, count.inputs, count.peak) == (8000, 4000, 12000)


def test_what_only_autograd_saves_is_alive_until_backward_releases_it() -> None:
    # The exp nodes save eight results of 4,000 bytes; nothing in Python holds them. Backward adds
    # one gradient at a time, and loss and its gradient, 4 bytes each. The 32,000 bytes that follow
    # would reach 64,000 if backward had not released the eight.
    model = nn.Linear(1000, 1, bias=False)

    def step() -> None:
        h: torch.Tensor = model.weight
        for _ in range(8):
            h = h.exp()
        loss = h.sum()
        del h
        loss.backward()
        torch.zeros(8000)

    assert count_memory(step, model=model).activations == 9 * 4000 + 8


def test_a_graph_that_is_kept_keeps_its_saved_tensors() -> None:
    model = nn.Linear(1000, 1, bias=False)
    kept: list[torch.Tensor] = []
    count = count_memory(lambda: kept.append(model.weight.exp().exp().exp().sum()), model=model)
    assert count.activations == 3 * 4000 + 4


def test_in_place_relu_saves_one_tensor() -> None:
    first, last, x = nn.Linear(4, 1000), nn.Linear(1000, 1), torch.randn(8, 4)

    def count(inplace: bool) -> MemoryCount:
        def step() -> None:
            hidden = first(x)
            last(F.relu(hidden, inplace=inplace)).sum().backward()

        return count_memory(step, model=nn.Sequential(first, last))

    count(inplace=False)  # makes the gradients that the two counts below add to
    assert count(inplace=False).activations - count(inplace=True).activations == 8 * 1000 * 4


def test_views_count_once_and_a_slice_counts_its_whole_storage() -> None:
    data = torch.zeros(100, 10)
    count = count_memory(
        lambda: (data[:2] + data[2:4]).view(-1).unsqueeze(0).expand(50, -1), model=nn.Identity()
    )
    assert (count.inputs, count.activations) == (4000, 80)


# What belongs where


def test_tensors_made_in_the_step_are_no_inputs() -> None:
    count = count_memory(lambda: torch.tensor([1.0, 2.0, 3.0]) + 1, model=nn.Identity())
    assert (count.inputs, count.activations) == (0, 24)


def test_gradients_that_the_step_drops_are_gradients() -> None:
    model = nn.Linear(1000, 1, bias=False)

    def step() -> None:
        model.weight.sum().backward()
        model.zero_grad()

    assert count_memory(step, model=model).gradients == 4000


def test_marked_gradients_are_gradients_and_unmarked_ones_are_not() -> None:
    model = nn.Linear(1000, 1, bias=False)
    unused = torch.zeros(1, requires_grad=True)

    def step(mark: Callable[[Any], None]) -> None:
        held = torch.autograd.grad(
            model.weight.exp().sum(), [model.weight, unused], allow_unused=True
        )
        mark(held)

    assert count_memory(lambda: step(lambda held: None), model=model).gradients == 0
    assert count_memory(lambda: step(mark_gradients), model=model).gradients == 4000


def test_marking_does_nothing_when_no_count_runs() -> None:
    mark_gradients([torch.zeros(1), None])
    assert listeners == []


def test_temporaries_of_the_optimizer_are_no_activations() -> None:
    # 1,000 parameters, batch 1: 4 bytes of output, its gradient and the ones. But AdamW's
    # denominators take 4,000 and more.
    model, x = nn.Linear(1000, 1, bias=False), torch.ones(1, 1000)
    optimizer = AdamW(model.parameters(), lr=0.1)

    def step() -> None:
        model(x).sum().backward()
        optimizer.step()

    count = count_memory(step, model=model, optimizer=optimizer)
    assert count.activations <= 16
    assert count.optimizer_temporaries >= 4000


def test_a_closure_that_the_optimizer_calls_holds_activations() -> None:
    def count(closure: bool) -> MemoryCount:
        subject = task(mlp)
        optimizer = SGD(subject.model.parameters(), lr=0.1)

        def loss() -> float:
            value = F.cross_entropy(subject.model(subject.x), subject.y)
            value.backward()
            return value.item()

        def separate() -> None:
            loss()
            optimizer.step()

        return count_memory(
            (lambda: optimizer.step(loss)) if closure else separate,
            model=subject.model,
            optimizer=optimizer,
        )

    assert count(closure=True) == count(closure=False)


def test_an_optimizer_that_steps_during_backward_is_seen_without_being_named() -> None:
    subject = task(mlp)
    parameters = list(subject.model.parameters())
    optimizers: dict[torch.Tensor, SGD] = {
        parameter: SGD([parameter], lr=0.1, momentum=0.9) for parameter in parameters
    }

    def step_and_drop(parameter: torch.Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(step_and_drop)
    count = subject.count()
    assert count.optimizer_state == nbytes(parameters)
    assert 0 < count.gradients < nbytes(parameters)


def test_state_that_exists_before_is_held_from_the_start() -> None:
    subject = task(mlp, "adamw")
    first, second, third = subject.count(), subject.count(), subject.count()
    forward_only = count_memory(
        lambda: subject.model(subject.x), model=subject.model, optimizer=subject.optimizer
    )
    assert second == third
    assert first.optimizer_state == second.optimizer_state == forward_only.at_peak.optimizer_state


# Checkpointing, fake tensors, threads


def test_checkpointing_lowers_the_activations_and_nothing_else() -> None:
    plain, again = task(resnet18).count(), task(checkpointed).count()
    assert again.activations < 0.7 * plain.activations
    assert (again.parameters, again.gradients, again.inputs) == (
        plain.parameters,
        plain.gradients,
        plain.inputs,
    )


@pytest.mark.parametrize(("build", "optimizer"), CASES)
def test_fake_tensors_count_like_real_ones(
    build: Callable[[], tuple[nn.Module, torch.Tensor]], optimizer: str
) -> None:
    def counts(fake: bool) -> list[MemoryCount]:
        with FakeTensorMode() if fake else nullcontext():
            subject = task(build, optimizer)
            return [subject.count(), subject.count()]

    assert counts(fake=True) == counts(fake=False)


class Deep(torch.autograd.Function):
    """Identity whose backward runs another backward, `depth` levels down.

    At the bottom it calls `at_the_bottom`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, depth: int, at_the_bottom: Callable[[], object]
    ) -> torch.Tensor:
        ctx.depth, ctx.at_the_bottom = depth, at_the_bottom
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if ctx.depth == 0:
            ctx.at_the_bottom()
        else:
            with torch.enable_grad():
                Deep.apply(
                    torch.zeros(1, requires_grad=True), ctx.depth - 1, ctx.at_the_bottom
                ).sum().backward()
        return grad, None, None


def test_what_a_thread_of_autograd_allocates_is_seen() -> None:
    # Past 60 nested calls the engine goes on in a thread of its own, as it does for every backward
    # on CUDA.
    model, threads = nn.Linear(1, 1, bias=False), set()

    def allocate() -> None:
        threads.add(threading.get_ident())
        torch.zeros(1_000_000)

    count = count_memory(
        lambda: Deep.apply(model.weight, 80, allocate).sum().backward(), model=model
    )
    assert threads.isdisjoint({threading.get_ident()})
    assert 4_000_000 < count.activations < 4_010_000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_counts_like_the_cpu() -> None:
    with torch.device("cuda"):
        subject = task(mlp)
    assert subject.count() == task(mlp).count()


# Other counters


@pytest.mark.parametrize(("build", "optimizer"), CASES)
def test_mem_tracker_agrees(
    build: Callable[[], tuple[nn.Module, torch.Tensor]], optimizer: str
) -> None:
    # The total agrees to the byte, and so do all categories but one. The tracker calls a tensor a
    # gradient when it reaches .grad, count_memory from its allocation on. So gradients and
    # activations are compared as a sum. Elsewhere there are three more differences. On CUDA the
    # tracker rounds to 512 bytes. It takes a tensor that will be added to an existing .grad for a
    # gradient. It takes all that happens inside optimizer.step(closure) for optimizer state.
    subject = task(build, optimizer)
    tracker = MemTracker()
    tracker.track_external(subject.model, subject.x, subject.y)
    with tracker:
        subject.step()
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    seen = {getattr(kind, "name", kind): size for kind, size in snapshot.items()}
    count = task(build, optimizer).count()
    at_peak = count.at_peak
    assert seen["Total"] == count.peak
    assert seen["PARAM"] + seen["BUFFER"] == at_peak.parameters
    assert seen["OPT"] == at_peak.optimizer_state + at_peak.optimizer_temporaries
    assert seen["GRAD"] + seen["ACT"] + seen["TEMP"] == at_peak.gradients + at_peak.activations
    assert seen["OTH"] == at_peak.inputs


class Polling(TorchDispatchMode):
    """Sums up, after every operator, the storages whose C++ weak reference has not expired.

    It needs no finalizers and no Python wrappers.
    """

    def __init__(self, held: list[torch.Tensor]) -> None:
        super().__init__()
        self.alive: dict[StorageWeakRef, int] = {}
        self.peak = 0
        self.add(held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add([leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)])
        return result

    def add(self, tensors: list[torch.Tensor]) -> None:
        self.alive = {
            reference: size for reference, size in self.alive.items() if not reference.expired()
        }
        for storage in (tensor.untyped_storage() for tensor in tensors):
            self.alive.setdefault(StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(self.alive.values()))


@pytest.mark.parametrize(("build", "optimizer"), CASES)
def test_polling_weak_references_agrees(
    build: Callable[[], tuple[nn.Module, torch.Tensor]], optimizer: str
) -> None:
    subject = task(build, optimizer)
    with Polling(subject.state()) as polling:
        subject.step()
    assert task(build, optimizer).count().peak == polling.peak


def allocator_peak(subject: Task) -> int:
    """Return the peak of a step as the CPU allocator reports it to the profiler.

    No dispatch mode is active.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        subject.step()
    events = [
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    now = peak = nbytes(subject.state())
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("optimizer", ["none", "momentum"])
def test_the_allocator_agrees_where_operators_need_no_workspace(optimizer: str) -> None:
    assert allocator_peak(task(mlp, optimizer)) == task(mlp, optimizer).count().peak


def test_the_allocator_sees_the_workspace_of_convolutions_on_top() -> None:
    assert allocator_peak(task(convnet)) >= task(convnet).count().peak


# Guards, order in the house, printing


def test_a_step_that_fails_leaves_nothing_behind() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ZeroDivisionError):
        count_memory(lambda: 1 / 0, model=model)
    assert listeners == []
    assert gc.isenabled()
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_the_step_computes_what_it_computes_uncounted() -> None:
    counted, plain = task(convnet, "adamw"), task(convnet, "adamw")
    torch.manual_seed(1)
    counted.count()
    torch.manual_seed(1)
    plain.step()
    for left, right in zip(counted.state(), plain.state(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(InputError, match="step must be a callable without arguments, not Tensor"):
        count_memory(torch.zeros(1), model=nn.Identity())  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"model must be a torch\.nn\.Module, not list"):
        count_memory(int, model=[])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="optimizer must be a torch optimizer, not list"):
        count_memory(int, model=nn.Identity(), optimizer=[])  # type: ignore[arg-type]


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(10, 3, sparse=True)
    with pytest.raises(InputError, match=r"layout torch.sparse_coo cannot be counted"):
        count_memory(lambda: table(torch.tensor([1])).sum().backward(), model=table)


def test_it_prints_as_a_table() -> None:
    count = MemoryCount(
        2**20,
        0,
        0,
        0,
        3 * 2**20,
        56,
        peak=3 * 2**20 + 56,
        at_peak=MemorySplit(2**20, 0, 0, 0, 2 * 2**20, 56),
    )
    assert len(CATEGORIES) == 6
    assert str(count).splitlines() == [
        "bytes                         own peak     at the peak       MiB",
        "parameters                   1,048,576       1,048,576      1.00",
        "gradients                            0               0      0.00",
        "optimizer state                      0               0      0.00",
        "optimizer temporaries                0               0      0.00",
        "activations                  3,145,728       2,097,152      2.00",
        "inputs                              56              56      0.00",
        "total                                        3,145,784      3.00",
    ]
