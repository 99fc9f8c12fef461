"""Offloaded models, on one CPU.

The copier notes which memory is host memory, so a computation that reads it is found out. Tests
that need a GPU are at the end, and skipped without one.
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sffx
from sffx.errors import InputError
from sffx.inputs import bind
from sffx.memory.count import count_memory
from sffx.runtime import offload as offload_module
from sffx.runtime.copier import Copier, copier_for
from sffx.runtime.offload import Offloading, offloading_of
from sffx.runtime.walk import run_blocks
from tests.runtime import interrupts
from tests.toys import Chain, Residual, SharedBias, TwoBranches, kept

MODELS = {
    "chain": (Chain, (3, 8, 8)),
    "residual": (Residual, (3, 8, 8)),
    "two branches": (TwoBranches, (3, 8, 8)),
    "shared bias": (SharedBias, (6,)),
}

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "NAdam": lambda groups: torch.optim.NAdam(groups, lr=0.01),
    "Adagrad": lambda groups: torch.optim.Adagrad(
        groups, lr=0.01
    ),  # has its state before the first step
}


@kept
def cut_once(name: str, **options: Any) -> fx.GraphModule:
    torch.manual_seed(0)
    kind, shape = MODELS[name]
    return sffx.transform(
        kind(), example_input=torch.zeros(1, *shape), **{"policy": "layer", **options}
    ).train()


def cut(name: str = "residual", **options: Any) -> tuple[fx.GraphModule, Tensor, Tensor]:
    net = cut_once(name, **options)
    torch.manual_seed(0)
    return net, torch.randn(9, *MODELS[name][1]), torch.randint(0, 4, (9,))


def adamw(net: fx.GraphModule) -> torch.optim.Optimizer:
    return OPTIMIZERS["AdamW"](sffx.parameter_groups(net, lr=0.01))


def train(
    net: fx.GraphModule, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer, steps: int = 3
) -> list[Tensor]:
    losses = []
    for seed in range(steps):
        torch.manual_seed(seed)
        losses.append(sffx.local_step(net, x, y, optimizer))
    return losses


def everything(net: fx.GraphModule, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters, buffers and the optimizer's state, in order."""
    return [
        leaf
        for leaf in tree_leaves([net.state_dict(), optimizer.state_dict()])
        if isinstance(leaf, Tensor)
    ]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    assert all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


# Bytes that are not a number in any float format.
RUBBISH = 0xFF


class Noting(Copier):
    """Knows its host memory by the storages, and how much it is."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.homes: set[int] = set()
        self.host_bytes = 0

    def allocate(self, nbytes: int) -> Tensor:
        home = torch.full((nbytes,), RUBBISH, dtype=torch.uint8)
        storage = home.untyped_storage()
        self.homes.add(storage._cdata)
        self.host_bytes += nbytes
        weakref.finalize(storage, self._end, storage._cdata, nbytes)
        return home

    def _end(self, address: int, nbytes: int) -> None:
        self.homes.discard(address)
        self.host_bytes -= nbytes


class Late(Noting):
    """Copies as late as it may: when somebody waits for the copy. Until then there is rubbish."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.inwards: list[list[tuple[Tensor, Tensor]]] = []
        self.outwards: list[list[tuple[Tensor, Tensor]]] = []

    def begin_load(self, homes: list[Tensor]) -> list[Tensor]:
        copies = [torch.full((home.nbytes,), RUBBISH, dtype=torch.uint8) for home in homes]
        self.inwards.append(list(zip(copies, homes, strict=True)))
        return copies

    def finish_load(self, copies: Any) -> None:
        self._run(self.inwards)

    def begin_store(self, pairs: list[tuple[Tensor, Tensor]], left: Any) -> None:
        self.outwards.append([(home, copy) for copy, home in pairs])

    def finish_store(self) -> None:
        self._run(self.outwards)

    def _run(self, queue: list[list[tuple[Tensor, Tensor]]]) -> None:
        for to, source in itertools.chain(*queue):
            to.copy_(source)
        queue.clear()


class Watch(TorchDispatchMode):
    """Sees to it that an operator reads no host memory unless it copies, and counts loaded blocks.

    Attributes:
        most: the most blocks that were on the device, or on their way there or back, at a time.
        operators: how many there were.
    """

    # What carrying is made of: it moves bytes, makes views of a storage, asks where it is.
    COPYING = (
        "aten::copy_",
        "aten::_to_copy",
        "aten::set_",
        "aten::empty",
        "aten::detach",
        "aten::is_pinned",
    )

    def __init__(self, net: fx.GraphModule) -> None:
        super().__init__()
        found = offloading_of(net)
        assert isinstance(found, Offloading)
        assert isinstance(found.copier, Noting)
        self.offloading, self.copier = found, found.copier
        self.leaving = found.copier.outwards if isinstance(found.copier, Late) else []
        self.most = self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name not in self.COPYING:
            for operand in tree_leaves((args, kwargs)):
                assert not isinstance(operand, Tensor) or not self.at_home(operand), (
                    f"{name} reads host memory"
                )
            blocks = {
                i
                for i in range(len(self.offloading.blocks))
                if not all(map(self.at_home, self.offloading._tensors(i)))
            }
            if self.offloading.coming is not None:
                blocks.add(self.offloading.coming.block)
            self.most = max(self.most, len(blocks) + len(self.leaving))
            self.operators += 1
        return func(*args, **(kwargs or {}))

    def at_home(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.copier.homes


@pytest.fixture(autouse=True)
def late(monkeypatch):
    """On the CPU, copies are made as late as they may."""
    monkeypatch.setattr(
        offload_module,
        "copier_for",
        lambda device: (Late if device.type == "cpu" else copier_for)(device),
    )


@pytest.fixture
def at_once(late, monkeypatch):
    """On the CPU, copies are made at once, as there they are outside of this file."""
    monkeypatch.setattr(offload_module, "copier_for", Noting)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "AdamW") for name in MODELS),
        *(("chain", kind) for kind in ("SGD", "NAdam", "Adagrad")),
    ],
)
def test_steps_of_a_offloaded_model_are_those_of_any_other_to_the_bit(name, kind):
    net, x, y = cut(name)
    twin = copy.deepcopy(net)
    optimizers = [OPTIMIZERS[kind](sffx.parameter_groups(each, lr=0.01)) for each in (net, twin)]
    sffx.offload(net, optimizers[0])
    assert_same(train(net, x, y, optimizers[0]), train(twin, x, y, optimizers[1]))
    assert_same(everything(net, optimizers[0]), everything(twin, optimizers[1]))
    sffx.onload(net)
    assert_same(everything(net, optimizers[0]), everything(twin, optimizers[1]))
    assert_same(train(net, x, y, optimizers[0]), train(twin, x, y, optimizers[1]))
    assert_same(everything(net, optimizers[0]), everything(twin, optimizers[1]))


@pytest.mark.parametrize(
    "options",
    [
        {"goodness": "cwc"},
        {"goodness": "mlp"},
        {"kernel_size": 3, "policy": "residual", "norm": "none"},
    ],
    ids=str,
)
@pytest.mark.usefixtures("at_once")
def test_of_all_kinds_of_blocks_and_with_one_group_for_all(options):
    net, x, y = cut("residual", **options)
    twin = copy.deepcopy(net)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.01) for each in (net, twin)]
    train(net, x, y, optimizers[0], steps=1)
    train(twin, x, y, optimizers[1], steps=1)
    sffx.offload(net, optimizers[0])  # with state
    assert_same(train(net, x, y, optimizers[0]), train(twin, x, y, optimizers[1]))
    assert_same(everything(net, optimizers[0]), everything(twin, optimizers[1]))


@pytest.mark.parametrize("name", MODELS)
def test_two_blocks_are_on_the_device_and_nothing_reads_the_others(name):
    net, x, y = cut(name)
    optimizer = adamw(net)
    sffx.offload(net, optimizer)
    for _ in range(2):
        with Watch(net) as watch:
            sffx.local_step(net, x, y, optimizer)
        assert watch.operators > 50
        assert watch.most == 2
        assert all(map(watch.at_home, [*net.parameters(), *net.buffers()]))
        assert all(
            watch.at_home(t)
            for state in optimizer.state.values()
            for key, t in state.items()
            if key != "step"
        )
    with Watch(net) as watch, torch.no_grad():
        net.eval()(x)
    assert watch.most == 2
    assert all(map(watch.at_home, [*net.parameters(), *net.buffers()]))


def test_the_watch_finds_a_computation_in_host_memory():
    net, _, _ = cut()
    sffx.offload(net, adamw(net))
    with Watch(net), pytest.raises(AssertionError, match="aten::mul reads host memory"):
        next(net.parameters()).detach() * 2


def chain(depth: int, width: int) -> fx.GraphModule:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return sffx.transform(nn.Sequential(*layers, nn.Linear(width, 4)), "layer").train()


@pytest.mark.parametrize(("depth", "width", "batch"), [(4, 64, 8), (4, 32, 512), (3, 128, 64)])
@pytest.mark.usefixtures("at_once")
def test_the_device_holds_what_was_predicted(depth, width, batch):
    net = chain(depth, width)
    optimizer = adamw(net)
    x, y = torch.randn(batch, width), torch.randint(0, 4, (batch,))
    sffx.offload(net, optimizer)
    sffx.local_step(net, x, y, optimizer)
    watch = Watch(net)
    before = watch.copier.host_bytes
    counted = count_memory(
        lambda: sffx.local_step(net, x, y, optimizer), model=net, optimizer=optimizer
    )
    assert watch.copier.host_bytes == before
    assert counted.peak - before == pytest.approx(
        sffx.footprint(net, batch, offloaded=True).peak, rel=0.05
    )


def test_the_prediction_does_not_grow_with_depth_and_prints_as_a_table():
    shallow, deep = (sffx.footprint(chain(depth, 64), 8, offloaded=True) for depth in (4, 8))
    assert deep.peak == shallow.peak
    assert sum(deep.resident) == pytest.approx(2 * sum(shallow.resident), rel=0.1)
    lines = str(shallow).splitlines()
    assert [line.split()[0] for line in lines[1:-3]] == [
        "block_0",
        "block_1",
        "block_2",
        "block_3",
        "classifier",
    ]
    assert lines[-2].startswith("in host memory: ")


def test_a_prediction_for_a_offloaded_model_is_that_for_any_other():
    net, _, _ = cut()
    expected = [sffx.footprint(net, 16, offloaded=offloaded) for offloaded in (False, True)]
    sffx.offload(net, adamw(net))
    assert [sffx.footprint(net, 16, offloaded=offloaded) for offloaded in (False, True)] == expected


def test_scores_are_computed_block_by_block():
    net, x, y = cut()
    twin = copy.deepcopy(net)
    sffx.offload(net, adamw(net))
    with torch.no_grad():
        assert torch.equal(net.eval()(x), twin.eval()(x))
    with torch.inference_mode():
        assert torch.equal(net(x), twin(x))
    assert sffx.evaluate(net, [(x, y)]) == sffx.evaluate(twin, [(x, y)])
    optimizers = offloading_of(net).optimizer, adamw(twin)
    assert_same(train(net.train(), x, y, optimizers[0]), train(twin.train(), x, y, optimizers[1]))


def test_statistics_of_a_forward_in_train_mode_are_kept():
    net, x, _ = cut()
    twin = copy.deepcopy(net)
    sffx.offload(net, adamw(net))
    with torch.no_grad():
        for each in (net, twin):
            torch.manual_seed(0)
            each(x)
    assert_same(list(net.buffers()), list(twin.buffers()))


def test_a_run_that_goes_on_from_a_checkpoint_is_the_run_that_went_on():
    net, x, y = cut()
    optimizer = adamw(net)
    sffx.offload(net, optimizer)
    train(net, x, y, optimizer)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = train(net, x, y, optimizer)
    for order in itertools.permutations(["net", "optimizer", "offload"]):
        other, _, _ = cut()
        resumed = adamw(other)
        file.seek(0)
        saved = torch.load(file)
        for what in order:
            if what == "offload":
                sffx.offload(other, resumed)
            else:
                {"net": other, "optimizer": resumed}[what].load_state_dict(saved[what])
        assert_same(train(other, x, y, resumed), expected)
        assert_same(everything(other, resumed), everything(net, optimizer))


def test_parameters_that_are_put_in_the_place_of_others_are_offloaded_as_well():
    net, x, y = cut()
    twin = copy.deepcopy(net)
    optimizer = adamw(net)
    sffx.offload(net, optimizer)
    other, _, _ = cut("residual")
    for p in other.parameters():
        p.data.mul_(0.5)
    for each in (net, twin):
        each.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    with torch.no_grad(), Watch(net):
        net(x)
    with pytest.raises(sffx.InputError, match="holds no parameter of block_0"):
        sffx.local_step(net, x, y, optimizer)
    for group, own in zip(optimizer.param_groups, sffx.parameter_groups(net, lr=0.01), strict=True):
        group["params"] = own["params"]
    optimizers = optimizer, adamw(twin)
    assert_same(train(net, x, y, optimizers[0]), train(twin, x, y, optimizers[1]))
    assert_same(list(net.parameters()), list(twin.parameters()))


def test_copies_pickles_and_exports_are_of_an_ordinary_model():
    net, x, y = cut()
    twin = copy.deepcopy(net)
    optimizers = adamw(net), adamw(twin)
    sffx.offload(net, optimizers[0])
    train(net, x, y, optimizers[0])
    train(twin, x, y, optimizers[1])
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        assert offloading_of(other) is None
        assert torch.equal(
            other.eval()(x), twin.eval()(x)
        )  # with gradients, which a offloaded one refuses
        sffx.offload(other, adamw(other))
    extracted = [sffx.extract(each) for each in (net.eval(), twin)]
    assert torch.equal(*(each(x) for each in extracted))
    scores = sffx.EarlyExit(net, 0.5)(x)
    sffx.onload(net)
    assert torch.equal(scores.scores, sffx.EarlyExit(net, 0.5)(x).scores)
    assert torch.equal(sffx.extract(net)(x), extracted[1](x))


@pytest.mark.parametrize("frozen", ["block_0", "head_1", "classifier"])
def test_what_is_frozen_comes_and_goes_as_it_was(frozen):
    net, x, y = cut("chain")
    optimizer = adamw(net)
    net.get_submodule(frozen).requires_grad_(False)
    twin = copy.deepcopy(net)
    sffx.offload(net, optimizer)
    assert_same(
        train(net, x, y, optimizer),
        train(twin, x, y, torch.optim.AdamW(twin.parameters(), lr=0.01)),
    )
    assert_same(list(net.state_dict().values()), list(twin.state_dict().values()))


def test_a_loss_without_gradients_leaves_the_parameters():
    net, x, y = cut()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = adamw(net)
    sffx.offload(net, optimizer)
    with torch.no_grad(), Watch(net) as watch:
        value = sffx.local_loss(net, x, y)
        with pytest.raises(InputError, match="would train nothing"):
            sffx.local_step(net, x, y, optimizer)
    assert value.isfinite()
    assert watch.most == 2
    assert_same(list(net.parameters()), before)


def test_autocast_of_several_steps_casts_the_parameters_of_each():
    net, x, y = cut()
    twin = copy.deepcopy(net)
    optimizers = adamw(net), adamw(twin)
    sffx.offload(net, optimizers[0])
    with torch.autocast("cpu", torch.bfloat16):
        found = train(net, x, y, optimizers[0])
    expected = []
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16):
            expected.append(sffx.local_step(twin, x, y, optimizers[1]))
    assert_same(found, expected)


class Stop(Exception):
    """Raised by a test in the middle of a step."""


@contextmanager
def stopping_at(net: fx.GraphModule, target: str) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Stop

    hook = net.get_submodule(target).register_forward_hook(stop)
    try:
        with pytest.raises(Stop):
            yield
    finally:
        hook.remove()


@pytest.mark.parametrize("target", ["block_1", "head_1", "classifier"])
def test_a_step_that_is_broken_off_leaves_what_an_onloaded_one_would(target):
    net, x, y = cut()
    twin = copy.deepcopy(net)
    optimizers = adamw(net), adamw(twin)
    sffx.offload(net, optimizers[0])
    for each, optimizer in zip((net, twin), optimizers, strict=True):
        torch.manual_seed(0)
        with stopping_at(each, target):
            sffx.local_step(each, x, y, optimizer)
    assert_same(everything(net, optimizers[0]), everything(twin, optimizers[1]))
    assert offloading_of(net).loaded is offloading_of(net).coming is None
    assert_same(train(net, x, y, optimizers[0]), train(twin, x, y, optimizers[1]))
    with torch.no_grad():
        with stopping_at(net, target):
            net(x)
        with Watch(net) as watch:
            net(x)
    assert watch.most == 2
    assert all(map(watch.at_home, [*net.parameters(), *net.buffers()]))


def run_first_block(net: fx.GraphModule, x: Tensor) -> None:
    run_blocks(net, bind(net.plan, x), 0)


def break_off_in(target: str) -> Callable[[fx.GraphModule, Tensor], None]:
    def call(net: fx.GraphModule, x: Tensor) -> None:
        with stopping_at(net, target):
            net(x)

    return call


CALLS_THAT_END_EARLY = {
    **{target: break_off_in(target) for target in ("block_0", "head_0", "norm_0", "classifier")},
    "blocks without their heads": run_first_block,
}


@pytest.mark.parametrize("call", CALLS_THAT_END_EARLY.values(), ids=CALLS_THAT_END_EARLY)
def test_weights_that_are_loaded_after_a_call_that_ended_early_are_kept(call):
    net, x, _ = cut()
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    sffx.offload(net, adamw(net))
    with torch.no_grad():
        call(net.eval(), x)
        net.load_state_dict(other.state_dict())
        # Twice, as the first call may compute with what is on the device.
        for _ in range(2):
            assert torch.equal(net(x), other.eval()(x))
    assert_same(list(net.state_dict().values()), list(other.state_dict().values()))
    with Watch(net) as watch, torch.no_grad():
        run_first_block(net, x)
    assert all(map(watch.at_home, [*net.parameters(), *net.buffers()]))


def test_where_host_memory_does_not_suffice_nothing_is_offloaded(monkeypatch):
    net, x, y = cut()
    twin = copy.deepcopy(net)
    optimizers = adamw(net), adamw(twin)
    calls = itertools.count()

    def allocate(self: Noting, nbytes: int, plenty: Any = Noting.allocate) -> Tensor:
        if next(calls) == 6:  # in the midst of a block
            raise RuntimeError("no more memory to pin")
        return plenty(self, nbytes)

    monkeypatch.setattr(Noting, "allocate", allocate)
    with pytest.raises(RuntimeError, match="no more memory"):
        sffx.offload(net, optimizers[0])
    assert next(calls) == 7
    assert offloading_of(net) is None
    assert_same(train(net, x, y, optimizers[0]), train(twin, x, y, optimizers[1]))
    assert_same(everything(net, optimizers[0]), everything(twin, optimizers[1]))
    sffx.offload(net, optimizers[0])
    with Watch(net) as watch:
        assert_same(train(net, x, y, optimizers[0]), train(twin, x, y, optimizers[1]))
    assert watch.most == 2


def test_views_of_one_memory_in_a_block_stay_views_of_one_memory():
    net, x, y = cut()
    flat = torch.cat([p.detach().flatten() for p in net.block_0.parameters()])
    start = 0
    for p in net.block_0.parameters():
        p.data = flat[start : start + p.numel()].view_as(p)
        start += p.numel()
    twin = copy.deepcopy(net)
    optimizers = adamw(net), adamw(twin)
    sffx.offload(net, optimizers[0])
    assert_same(train(net, x, y, optimizers[0]), train(twin, x, y, optimizers[1]))
    assert len({p.untyped_storage()._cdata for p in net.block_0.parameters()}) == 1


def test_a_buffer_of_two_blocks_stays():
    net, x, y = cut("chain")
    buffer = torch.ones(3)
    net.block_0.register_buffer("common", buffer)
    net.block_1.register_buffer("common", buffer)
    optimizer = adamw(net)
    sffx.offload(net, optimizer)
    place = buffer.data_ptr()
    train(net, x, y, optimizer, steps=1)
    assert net.block_0.common.data_ptr() == net.block_1.common.data_ptr() == place


def tied(net: fx.GraphModule) -> fx.GraphModule:
    net.head_1.bias = net.head_0.bias
    return net


def scattered(net: fx.GraphModule) -> fx.GraphModule:
    net.block_1.to("meta")
    return net


def offloaded(net: fx.GraphModule) -> fx.GraphModule:
    sffx.offload(net, adamw(net))
    return net


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda net, x, y: sffx.offload(Chain(), adamw(net)), r"net is a Chain, not a cut model"),
        (
            lambda net, x, y: sffx.offload(offloaded(net), adamw(net)),
            r"offloaded already\. Hint: sffx\.onload\(net\)",
        ),
        (
            lambda net, x, y: sffx.offload(net, adamw(copy.deepcopy(net))),
            r"holds \d+ parameters, none of them of net.*Hint: make it by AdamW",
        ),
        (
            lambda net, x, y: sffx.offload(tied(net), torch.optim.SGD(net.parameters())),
            r"parameter head_[01]\.bias belongs to several blocks",
        ),
        (
            lambda net, x, y: sffx.offload(net.to("meta"), adamw(net), "cpu"),
            r"lies on meta, but is to run on cpu\. Hint: net\.to\('cpu'\)",
        ),
        (
            lambda net, x, y: sffx.offload(net.to("meta"), adamw(net)),
            r"net is on the meta device, without values\. Hint: load the weights first",
        ),
        (
            lambda net, x, y: sffx.offload(net, adamw(net), "meta"),
            r"device is 'meta', where tensors have no values.*Hint: name one that computes",
        ),
        (
            lambda net, x, y: sffx.offload(scattered(net), adamw(net)),
            r"net lies on cpu, meta\. Hint: net\.to",
        ),
        (lambda net, x, y: sffx.onload(net), r"net is not offloaded\. Hint: sffx\.offload"),
        (
            lambda net, x, y: sffx.local_step(offloaded(net), x, y, adamw(net)),
            r"offloaded with another optimizer.*Hint: pass that one",
        ),
        (
            lambda net, x, y: sffx.local_loss(offloaded(net), x, y),
            r"only sffx\.local_step gives it gradients.*Hint: torch\.no_grad\(\)",
        ),
        (
            lambda net, x, y: sffx.sff_loss(offloaded(net)(x), y),
            r"only sffx\.local_step gives it gradients",
        ),
        (lambda net, x, y: offloaded(net).eval()(x), r"only sffx\.local_step gives it gradients"),
    ],
)
def test_what_cannot_be_done(what, message):
    net, x, y = cut("chain")
    with pytest.raises(InputError, match=message):
        what(net, x, y)


needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="streams and pinned memory need a CUDA device"
)


@needs_gpu
@pytest.mark.parametrize("from_host", [False, True])
def test_on_a_gpu_steps_are_those_of_an_onloaded_model(from_host):
    net, x, y = cut()
    x, y, twin = x.cuda(), y.cuda(), copy.deepcopy(net).cuda()
    net = net if from_host else net.cuda()
    optimizers = adamw(net), adamw(twin)
    sffx.offload(net, optimizers[0], "cuda")
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        assert_same(
            train(net, x, y, optimizers[0], steps=20), train(twin, x, y, optimizers[1], steps=20)
        )
        with torch.no_grad():
            assert torch.equal(net.eval()(x), twin.eval()(x))
    assert all(t.is_pinned() for t in (*net.parameters(), *net.buffers()))
    assert_same(
        [t.cpu() for t in everything(net, optimizers[0])],
        [t.cpu() for t in everything(twin, optimizers[1])],
    )
    sffx.onload(net)
    assert all(t.is_cuda for t in (*net.parameters(), *net.buffers()))


@needs_gpu
def test_on_a_gpu_the_device_holds_what_was_predicted():
    net, batch = chain(8, 1024).cuda(), 256
    optimizer = adamw(net)
    x, y = torch.randn(batch, 1024, device="cuda"), torch.randint(0, 4, (batch,), device="cuda")
    train(net, x, y, optimizer, steps=1)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    sffx.offload(net, optimizer)
    fallen = before - torch.cuda.memory_allocated()
    predicted = sffx.footprint(net, batch, offloaded=True)
    assert fallen == pytest.approx(sum(predicted.resident), rel=0.05)
    train(net, x, y, optimizer, steps=1)
    torch.cuda.reset_peak_memory_stats()
    train(net, x, y, optimizer, steps=1)
    assert (
        torch.cuda.max_memory_allocated() <= 1.25 * predicted.peak
    )  # the optimizer's loops over several parameters hold more at once


@pytest.mark.usefixtures("at_once")
def test_an_interrupt_at_any_line_leaves_a_model_that_can_be_brought_back():
    net, x, y = cut("chain")
    optimizer = adamw(net)
    train(net, x, y, optimizer, steps=1)
    expected = everything(net, optimizer)
    call = functools.partial(sffx.offload, net, optimizer)
    lines = interrupts.lines_run(offload_module, call, ("offload", "start", "_evict_all"))
    sffx.onload(net)
    for line in range(lines):
        interrupts.interrupt(offload_module, call, ("offload", "start", "_evict_all"), line)
        if offloading_of(net) is not None:
            sffx.onload(net)
        assert_same(everything(net, optimizer), expected)
        sffx.local_loss(net, x, y).backward()  # which an offloaded model refuses
        net.zero_grad()
        expected = everything(net, optimizer)  # the statistics of batch norms have moved
