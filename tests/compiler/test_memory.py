"""The memory-saving rewrites: before and after as text, then values and gradients.

Each kind of rewrite has cases, and so has each place where it must not be made.
"""

from __future__ import annotations

import copy
from textwrap import dedent
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import sffx
from sffx.compiler.memory import save_memory
from sffx.kernels.activation import (
    MemorySavingGELU,
    MemorySavingHardswish,
    MemorySavingReLU,
    MemorySavingSiLU,
    private_gradients,
)
from sffx.kernels.attention import self_attention
from sffx.kernels.pool import MemorySavingMaxPool2d
from sffx.kernels.recompute import recomputed
from sffx.memory.count import count_memory
from tests.compiler.passes import layers, rewritten, text
from tests.toys import Residual, step_scores

MEMORY_SAVING = (
    MemorySavingReLU,
    MemorySavingHardswish,
    MemorySavingSiLU,
    MemorySavingGELU,
    MemorySavingMaxPool2d,
)


class Attends(nn.Module):
    """Attention of a norm's output to itself, with a shortcut around both."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, **self.options)[0]
        return self.head(x.mean(1))


def conv(size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(4, 4, size)


IMAGE = torch.zeros(2, 4, 9, 9)

# case: the layers of a block, and its text before the pass and after it. The numbers are those of
# the docstring of `sffx.compiler.memory`.
CASES = {
    "1, 2 and 5: a ReLU moves behind a max pool": (
        layers(conv=conv(), relu=nn.ReLU(), pool=nn.MaxPool2d(2)),
        """
        conv = Conv2d(input_1)
        relu = ReLU(conv)
        pool = MaxPool2d(relu)
        return pool
        """,
        """
        conv = Conv2d(input_1)
        pool = MemorySavingMaxPool2d(conv)
        relu_1_saving = MemorySavingReLU(pool)
        return relu_1_saving
        """,
    ),
    "2: a GELU does not commute with a max pool": (
        layers(conv=conv(), gelu=nn.GELU(), pool=nn.MaxPool2d(2)),
        """
        conv = Conv2d(input_1)
        gelu = GELU(conv)
        pool = MaxPool2d(gelu)
        return pool
        """,
        """
        conv = Conv2d(input_1)
        gelu_saving = MemorySavingGELU(conv)
        pool = MemorySavingMaxPool2d(gelu_saving)
        return pool
        """,
    ),
    "3: a layer takes over a norm and an activation": (
        layers(first=conv(), norm=nn.BatchNorm2d(4), relu=nn.ReLU(), last=conv()),
        """
        first = Conv2d(input_1)
        norm = BatchNorm2d(first)
        relu = ReLU(norm)
        last = Conv2d(relu)
        return last
        """,
        """
        first = Conv2d(input_1)
        recomputed = recomputed(first, self.last, norm=self.norm, activation='relu')
        return recomputed
        """,
    ),
    "3: without a norm, the layer's gradient may be written over its input": (
        layers(first=conv(), act=nn.Hardswish(inplace=True), last=conv(1)),
        """
        first = Conv2d(input_1)
        act = Hardswish[inplace](first)
        last = Conv2d(act)
        return last
        """,
        """
        first = Conv2d(input_1)
        recomputed = recomputed(first, self.last, activation='hardswish', overwrite=True)
        return recomputed
        """,
    ),
    "3: two in a row, of which the first frees its gradient": (
        layers(
            norm=nn.BatchNorm2d(4), first=conv(1), act=nn.SiLU(), drop=nn.Dropout(), last=conv()
        ),
        """
        norm = BatchNorm2d(input_1)
        first = Conv2d(norm)
        act = SiLU(first)
        drop = Dropout(act)
        last = Conv2d(drop)
        return last
        """,
        """
        recomputed = recomputed(input_1, self.first, norm=self.norm, frees_gradient=True)
        recomputed_1 = recomputed(recomputed, self.last, dropout=self.drop, activation='silu', \
overwrite=True)
        return recomputed_1
        """,
    ),
    "3: dropout alone is not taken over": (
        layers(first=conv(), drop=nn.Dropout(), last=conv()),
        """
        first = Conv2d(input_1)
        drop = Dropout(first)
        last = Conv2d(drop)
        return last
        """,
        """
        first = Conv2d(input_1)
        drop = Dropout(first)
        last = Conv2d(drop)
        return last
        """,
    ),
    "3: a convolution with other padding takes nothing over, but reads a memory-saving twin": (
        layers(first=conv(), act=nn.ReLU(), last=nn.Conv2d(4, 4, 3, padding_mode="circular")),
        """
        first = Conv2d(input_1)
        act = ReLU(first)
        last = Conv2d(act)
        return last
        """,
        """
        first = Conv2d(input_1)
        act_saving = MemorySavingReLU(first)
        last = Conv2d(act_saving)
        return last
        """,
    ),
    "4: self-attention takes over its norm": (
        Attends(need_weights=False),
        """
        norm = LayerNorm(x)
        attention = MultiheadAttention(norm, norm, norm, need_weights=False)
        getitem = getitem(attention, 0)
        add = add(x, getitem)
        return add
        """,
        """
        self_attention = self_attention(x, self.attention, norm=self.norm)
        add = add(x, self_attention)
        return add
        """,
    ),
    "5: an activation that feeds a head, in place as before": (
        layers(conv=conv(), norm=nn.BatchNorm2d(4), relu=nn.ReLU(inplace=True)),
        """
        conv = Conv2d(input_1)
        norm = BatchNorm2d(conv)
        relu = ReLU[inplace](norm)
        return relu
        """,
        """
        conv = Conv2d(input_1)
        norm = BatchNorm2d(conv)
        relu_saving = MemorySavingReLU[inplace](norm)
        return relu_saving
        """,
    ),
}


def uncut(block: nn.Module) -> tuple[nn.Module, str, Tensor]:
    """Return a classifier around the layers of a case, where to cut it, and its input."""
    if isinstance(block, Attends):
        return block, "add", torch.zeros(2, 5, 8)
    named = dict(block.named_children())
    model = layers(**named, flat=nn.Flatten(), head=nn.LazyLinear(3))
    model(IMAGE)
    return model, list(named)[-1], IMAGE


@pytest.mark.parametrize("case", CASES)
def test_before_and_after(case):
    block, before, after = CASES[case]
    model, last, x = uncut(block)
    net = rewritten(model, [last], x)
    assert text(net.block_0) == dedent(before).strip()
    save_memory(net)
    assert text(net.block_0) == dedent(after).strip()


@pytest.mark.parametrize("case", CASES)
def test_the_block_computes_the_same_before_and_after(case):
    model, last, x = uncut(copy.deepcopy(CASES[case][0]))
    net = rewritten(model, [last], x).double().train()
    x = torch.randn(x.shape, dtype=torch.float64)
    results = []
    for _ in ("before", "after"):
        twin = copy.deepcopy(net)
        torch.manual_seed(0)
        with private_gradients():
            output = twin.block_0(x)
            weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
            (output * weights).sum().backward()
        results.append((output, {name: p.grad for name, p in twin.named_parameters()}))
        save_memory(net)
    (output, gradients), (output_after, gradients_after) = results
    torch.testing.assert_close(output_after, output, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(gradients_after[name], gradient, rtol=1e-9, atol=1e-12)


def memory_saving_modules(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if type(module) in MEMORY_SAVING]


def assert_as_the_plain_layers(net: fx.GraphModule, plain: nn.Module, x: Tensor) -> None:
    """Compare the first block with the layers that it was made from, which end in its output."""
    with private_gradients():
        goodness = step_scores(net, x)[0]
    output = plain(x)
    expected = torch.autograd.grad(
        copy.deepcopy(net.head_0)(output).sum(), list(plain.parameters())
    )
    found = torch.autograd.grad(goodness.sum(), list(net.block_0.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def cut(*layers: nn.Module) -> tuple[fx.GraphModule, nn.Sequential]:
    torch.manual_seed(0)
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3)).double()
    x = torch.randn(5, 3, 9, 9, dtype=torch.float64)
    model(x)
    name = f"_{len(layers) - 1}"
    return sffx.transform(model, [name], x, norm="none").train(), model[:-2]


X = torch.randn(5, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6()])
@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 1, padding=1, ceil_mode=True)]
)
def test_a_relu_moves_behind_a_pool_that_keeps_only_its_indices(relu, pool):
    net, plain = cut(nn.Conv2d(3, 4, 3), relu, pool)
    order = [node.name for node in net.block_0.graph.nodes]
    assert order[1:3] == ["_0", "_2"]
    assert isinstance(net.block_0.get_submodule("2"), MemorySavingMaxPool2d)
    assert_as_the_plain_layers(net, plain, X)


@pytest.mark.parametrize(
    ("activation", "twin"),
    [
        (nn.ReLU(), MemorySavingReLU),
        (nn.ReLU(inplace=True), MemorySavingReLU),
        (nn.Hardswish(), MemorySavingHardswish),
        (nn.Hardswish(inplace=True), MemorySavingHardswish),
        (nn.SiLU(), MemorySavingSiLU),
        (nn.GELU(), MemorySavingGELU),
    ],
)
@pytest.mark.parametrize("after", ["layer", "dropout", "end"])
def test_an_activation_writes_over_the_gradient_it_is_given(activation, twin, after):
    reader = nn.Conv2d(
        4, 4, 3, padding_mode="circular"
    )  # a plain convolution would take over the activation
    rest = {"layer": [reader], "dropout": [nn.Dropout(0.0), reader], "end": []}[after]
    net, plain = cut(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), activation, *rest)
    assert memory_saving_modules(net) == ["block_0._2_saving"]
    assert type(net.block_0._2_saving) is twin
    assert_as_the_plain_layers(net, plain, X)
    assert torch.equal(net.eval().block_0(X), plain.eval()(X))


def test_functions_are_replaced_as_modules_are():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.b(F.relu(self.a(x), True))))

    net = sffx.transform(Functional(), ["relu_1"])
    assert memory_saving_modules(net) == ["block_0.relu_saving", "block_0.relu_1_saving"]
    assert net.block_0.relu_saving.inplace
    assert not net.block_0.relu_1_saving.inplace


class _Branching(nn.Module):
    """An activation that two layers read, one that a sum reads, and one with a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = (
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 3),
        )
        self.watched = nn.ReLU()
        self.watched.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.relu(self.b(x) + self.c(x)) + x
        x = F.gelu(x, approximate="tanh")
        return self.head(self.watched(x))


def test_activations_with_other_readers_stay():
    assert memory_saving_modules(sffx.transform(_Branching(), ["watched"])) == []


def test_an_activation_that_no_head_reads_stays():
    """The classifier ends in an activation, whose gradient comes from a loss of the user's own."""

    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.head(F.relu(self.a(x))))

    assert memory_saving_modules(sffx.transform(Skips(), ["relu"])) == ["block_0.relu_saving"]


def test_a_relu_with_another_reader_stays_before_the_pool():
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool, self.head = nn.Conv2d(3, 4, 1), nn.MaxPool2d(2), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.conv(x))
            return self.head((self.pool(x) + x[:, :, ::2, ::2]).mean((2, 3)))

    net = sffx.transform(Skips(), ["add"], torch.zeros(1, 3, 4, 4))
    order = [node.name for node in net.block_0.graph.nodes]
    assert order.index("relu") < order.index("pool")


@pytest.mark.parametrize(
    "twin", [MemorySavingReLU, MemorySavingHardswish, MemorySavingSiLU, MemorySavingGELU]
)
def test_a_broadcast_gradient_is_not_written_over(twin):
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    plain = twin.__mro__[1]()
    (expected,) = torch.autograd.grad(plain(x).sum(), x)
    with private_gradients():
        (found,) = torch.autograd.grad(twin()(x).sum(), x)
        assert torch.equal(found, expected)
        assert torch.autograd.gradcheck(lambda v: twin()(v) * 2, x)


def test_less_is_held_at_the_peak():
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 49, 3),
    )
    x, y = torch.randn(64, 3, 16, 16), torch.zeros(64, dtype=torch.int64)
    net = sffx.transform(model, example_input=x).train()
    counted = count_memory(lambda: sffx.local_loss(net, x, y).backward(), model=net).activations
    value = 64 * 32 * 14 * 14 * 4
    # BN's input, the gradient of its output and that of its input. The block's output, a quarter
    # of that, is handed on.
    assert counted < 3.5 * value


def test_the_original_keeps_its_own_layers():
    assert not memory_saving_modules(sffx.extract(sffx.transform(Residual())))


def test_outside_a_block_local_step_no_gradient_is_written_over():
    """The gradient of a block's output is the caller's: asked for, handed in, or seen by a hook."""
    net = sffx.transform(
        nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)), "layer"
    ).train()
    x, given = torch.randn(5, 6), torch.randn(5, 6)
    output, kept = net.block_0(x), given.clone()
    output.backward(given)
    assert torch.equal(given, kept)
    output = net.block_0(x)
    found, _ = torch.autograd.grad(
        (output * given).sum(), [output, net.block_0.get_submodule("0").weight]
    )
    assert torch.equal(found, given)


def test_a_layer_that_may_hand_its_gradient_through_is_no_reader_to_rely_on():
    class Switchable(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.Sequential(
        nn.Linear(6, 6), nn.ReLU(), Switchable(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
    )
    assert memory_saving_modules(sffx.transform(model, ["_3"])) == []


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_full_backward_hook", "register_forward_pre_hook"],
)
def test_layers_with_hooks_stay_what_they_are(register):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 3),
    )
    for layer in (model[2], model[4]):
        getattr(layer, register)(lambda *_: None)
    assert memory_saving_modules(sffx.transform(model, ["_4"], torch.zeros(1, 3, 8, 8))) == []


def test_an_activation_whose_in_place_write_is_read_again_stays():
    class ReadsAgain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.head = (
                nn.Linear(6, 6),
                nn.Linear(6, 6),
                nn.Linear(6, 6),
                nn.Linear(6, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            y = F.silu(h, inplace=True)
            return self.head(torch.relu(self.b(y) + self.c(h)))

    model = ReadsAgain()
    net = sffx.transform(model, ["relu"], norm="none").train()
    assert memory_saving_modules(net) == ["block_0.relu_saving"]
    x = torch.randn(5, 6)
    with private_gradients():
        net.readout.mode = "classifier"
        assert torch.equal(net(x)[-1], model(x))


def calls(net: fx.GraphModule, function: object) -> list[dict[str, object]]:
    """Return the keyword arguments of every call of a function in the blocks, modules by name."""
    nodes = [
        node
        for block in net.children()
        if isinstance(block, fx.GraphModule)
        for node in block.graph.nodes
    ]
    return [
        {k: str(v.target) if isinstance(v, fx.Node) else v for k, v in node.kwargs.items()}
        for node in nodes
        if node.target is function
    ]


def test_layers_take_over_what_comes_before_them():
    net, plain = cut(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.Hardswish(True),
        nn.Conv2d(4, 5, 1),
    )
    assert calls(net, recomputed) == [
        {"norm": "1", "activation": "relu", "frees_gradient": True},
        {"activation": "hardswish", "overwrite": True},
    ]
    assert_as_the_plain_layers(net, plain, X)
    net.eval(), plain.eval()
    assert torch.equal(net.block_0(X), plain(X))


def test_an_mlp_frees_the_gradient_of_its_hidden_layer():
    mlp = [nn.LayerNorm(6), nn.Linear(6, 12), nn.GELU(), nn.Dropout(0.0), nn.Linear(12, 6)]
    net = sffx.transform(nn.Sequential(nn.Linear(6, 6), *mlp, nn.Linear(6, 3)), ["_5"])
    assert calls(net, recomputed) == [
        {"norm": "1", "frees_gradient": True},
        {"dropout": "4", "activation": "gelu", "overwrite": True},
    ]


def test_what_another_node_reads_is_not_taken_over():
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.head = (
                nn.Linear(6, 6),
                nn.Linear(6, 6),
                nn.Linear(6, 6),
                nn.Linear(6, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = F.gelu(self.a(x), approximate="tanh")
            x = F.silu(self.b(x))
            return self.head(self.c(x) + x)

    assert calls(sffx.transform(Skips(), ["add"]), recomputed) == []


@pytest.mark.parametrize(
    "other", [{"key_padding_mask": None}, {"need_weights": True}, {"average_attn_weights": True}]
)
def test_attention_of_another_kind_stays(other):
    class Attends(nn.Module):
        def __init__(self, **kwargs: object) -> None:
            super().__init__()
            self.kwargs = kwargs
            self.norm, self.attention = (
                nn.LayerNorm(8),
                nn.MultiheadAttention(8, 2, batch_first=True),
            )
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            x = x + self.attention(y, y, y, **self.kwargs)[0]
            return self.head(x.mean(1))

    x = torch.zeros(1, 5, 8)
    assert calls(sffx.transform(Attends(need_weights=False), ["add"], x), self_attention) == [
        {"norm": "norm"}
    ]
    taken = calls(
        sffx.transform(Attends(**{"need_weights": False, **other}), ["add"], x), self_attention
    )
    assert bool(taken) == (other == {"key_padding_mask": None})


def test_only_blocks_that_set_the_peak_compute_again():
    """The first block keeps far more than the second."""
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.MaxPool2d(5)]
    small = [nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)]
    model = nn.Sequential(*layers, *small, nn.Flatten(), nn.Linear(8, 3))
    net = sffx.transform(model, ["_4", "_8"], torch.zeros(1, 3, 9, 9))
    assert [net.plan.is_large(block) for block in net.plan] == [True, False]
    assert [
        len(calls(nn.Sequential(block), recomputed)) for block in (net.block_0, net.block_1)
    ] == [1, 0]
    assert (
        calls(
            sffx.transform(model, ["_4", "_8"], torch.zeros(1, 3, 9, 9), recompute=False),
            recomputed,
        )
        == []
    )


class WritesOn(nn.Module):
    """A value that a ReLU has read is written in place: before its reader runs, or after."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.stem, self.conv, self.last = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Conv2d(4, 4, 1),
        )
        self.pool, self.head = nn.MaxPool2d(3, 1, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.way == "after the layer":
            x += self.conv(F.relu(x))
        else:
            seen = F.relu(x)
            x *= 0.5
            x = x + (self.conv(seen) if self.way == "before the layer" else self.pool(seen))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


@pytest.mark.parametrize("way", ["before the layer", "before the pool", "after the layer"])
def test_what_is_written_in_place_later_is_read_where_it_was(way):
    torch.manual_seed(0)
    model, x = WritesOn(way).double(), torch.randn(5, 3, 9, 9, dtype=torch.float64)
    last = sffx.plan(model, "layer", x).blocks[-1].output
    net = sffx.transform(model, [last], x, norm="none").train()
    assert torch.equal(net(x)[-1], model(x))
    twin = sffx.transform(model, [last], x, norm="none", recompute=False).train()
    twin.load_state_dict(net.state_dict())
    for cut_model in (net, twin):
        sffx.local_loss(cut_model, x, torch.tensor([0, 1, 2, 0, 1])).backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


class WritesBehind(nn.Module):
    """A value that a rewrite could keep is written in place: what a pool or attention returns."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.tokens = way, nn.Parameter(torch.randn(1))
        self.stem, self.mixed, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.conv, self.pool = nn.Conv2d(1, 1, 3, padding=1), nn.MaxPool2d(3, 1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.way == "attention":
            x += self.attention(x, x, x, need_weights=False)[0]
        else:
            pooled = self.pool(F.relu(self.conv(x[:, None])))
            if self.way == "pool":
                pooled += self.tokens
            elif self.way == "view of the pool":
                pooled[:, 0].mul_(self.tokens)
            else:
                F.relu(pooled, inplace=True)
            x = pooled[:, 0]
        return self.last(self.mixed(x).mean(1))


@pytest.mark.parametrize("way", ["attention", "pool", "view of the pool", "second relu"])
def test_what_autograd_keeps_is_not_written_in_place_later(way):
    torch.manual_seed(0)
    model, x = WritesBehind(way).double(), torch.randn(5, 6, 4, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0, 1])
    before = rewritten(model.train(), ["mixed"], x)
    net = copy.deepcopy(before)
    save_memory(net)
    sffx.local_loss(net, x, y).backward()
    sffx.sff_loss(before(x), y).backward()
    for p, q in zip(net.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
