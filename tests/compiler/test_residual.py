"""Which modules are residual blocks: the units and the stacks, on toys."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sffx

TOKENS = torch.zeros(2, 6, 3)


def classifier(*body: nn.Module) -> nn.Sequential:
    """Return a model of tokens (B, 6, 3) with a stem and a body of width 8."""
    return nn.Sequential(nn.Linear(3, 8), *body, nn.Flatten(), nn.Linear(48, 4))


def outputs(model: nn.Module, example: Tensor = TOKENS) -> list[str]:
    return [block.name for block in sffx.plan(model, example_input=example)]


def mlp() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


class Mixing(nn.Module):
    """Stands for attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.across = nn.LayerNorm(8), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.across(self.norm(x).transpose(1, 2)).transpose(1, 2)


class Layer(nn.Module):
    """Two sums of different kinds: a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing, self.mlp = Mixing(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixing(x)
        return x + self.mlp(x)


class Macaron(nn.Module):
    """Conformer: two of its four sums are of one kind."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([mlp(), Mixing(), nn.Linear(8, 8), mlp()])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = x + part(x)
        return x


class Stack(nn.Module):
    """Loops over layers and adds: every other one mixes, if asked for."""

    def __init__(self, depth: int, *, mixes: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Mixing() if mixes and i % 2 == 0 else mlp() for i in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) + x
        return x


class Encoder(nn.Module):
    """A stack of units, with a join of its own before or behind them."""

    def __init__(self, depth: int, join: Callable[..., Tensor], *, behind: bool) -> None:
        super().__init__()
        self.positions, self.layers = (
            nn.Linear(8, 8),
            nn.Sequential(*(Layer() for _ in range(depth))),
        )
        self.join, self.behind = join, behind

    def forward(self, x: Tensor) -> Tensor:
        if self.behind:
            x = self.layers(x)
            return self.join(x, self.positions(x))
        return self.layers(self.join(x, self.positions(x)))


def test_units_with_different_joins_are_blocks_as_a_whole():
    assert outputs(classifier(Layer(), Layer())) == ["0", "1", "2"]
    assert outputs(classifier(Macaron(), Macaron())) == ["0", "1", "2"]


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("depths", [(4, 4), (2, 6), (4, 2, 2)])
def test_stacks_of_one_class_are_cut_as_one_stack_of_their_layers(depths, mixes):
    several = outputs(classifier(*(Stack(depth, mixes=mixes) for depth in depths)))
    assert len(several) == len(outputs(classifier(Stack(8, mixes=mixes)))) == 9


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("copies", [1, 2])
def test_a_stack_that_owns_a_join_is_cut_between_its_units(depth, behind, copies):
    encoders = [Encoder(depth, torch.add, behind=behind) for _ in range(copies)]
    names = outputs(classifier(*encoders))
    assert len(names) == 1 + copies * (depth + 1)
    for i in range(depth):
        assert any(name.endswith(f"1.layers.{i}") for name in names)


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("depth", [4, 6])
def test_a_module_that_owns_a_join_is_cut_between_the_joins_of_a_stack_in_it(depth, mixes):
    encoder = Encoder(0, torch.add, behind=False)
    encoder.layers = Stack(depth, mixes=mixes)
    names = outputs(classifier(encoder))
    assert len(names) == 2 + depth  # the stem, the encoder's own join, the stack's joins


class JoinsFromTheStart(nn.Module):
    """Adds around every other layer; the first shortcut starts at the input."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2 * depth))
        self.shortcuts = nn.ModuleList(nn.Linear(3, 3) for _ in range(depth))
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        for i, shortcut in enumerate(self.shortcuts):
            y = self.layers[2 * i + 1](self.layers[2 * i](x).relu())
            x = (y + shortcut(x)).relu()
        return self.head(x.mean(1))


@pytest.mark.parametrize("depth", [2, 3])
def test_paths_that_part_at_the_input_join(depth):
    assert len(outputs(JoinsFromTheStart(depth))) == depth


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("depth", [2, 4])
def test_torchs_encoder_layers_are_blocks_beside_another_sum(residual, depth):
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.position(x) if residual else self.position(x)

    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    names = outputs(classifier(Stem(), encoder))
    assert names[-depth:] == [f"2.layers.{i}" for i in range(depth)]


class DropsConnections(nn.Module):
    """A leaf where it has a shortcut, since it then draws in the forward itself."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(inputs, 16, 1), nn.Conv2d(16, width, 1)
        self.norm, self.skip = nn.BatchNorm2d(width), inputs == width

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.b(self.a(x).relu()))
        if not self.skip:
            return y
        if random.random() > 0.9:
            y = y * 0.5
        return y + x


def test_leaves_are_units_as_their_siblings_that_are_traced():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        *(DropsConnections(*sizes) for sizes in [(8, 8), (8, 12), (12, 12)]),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    )
    plan = sffx.plan(model, example_input=torch.zeros(2, 3, 8, 8))
    assert [block.name for block in plan] == ["0 … 1", "2", "3", "4"]
    assert plan.leaves


class Add(nn.Module):
    """A sum that is a module."""

    def forward(self, x: Tensor, residual: Tensor, past: tuple[Tensor, ...] = ()) -> Tensor:
        return x + residual


class Concatenate(nn.Module):
    def forward(self, *values: Tensor) -> Tensor:
        return torch.cat(values, -1)


class DropsAndAdds(nn.Module):
    """A sum that depends on the mode."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, self.training) + residual


class JoinsByModules(nn.Module):
    """Each layer is joined to the value by a module, which is handed all earlier values as well."""

    def __init__(self, join: Callable[[], nn.Module], width: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 8), nn.Linear(8, 4)
        self.layers = nn.ModuleList(nn.Linear(8, width) for _ in range(3))
        self.backs = nn.ModuleList(nn.Linear(8 if width == 8 else 12, 8) for _ in range(3))
        self.joins = nn.ModuleList(join() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x, past = self.stem(x), []
        for layer, back, join in zip(self.layers, self.backs, self.joins, strict=True):
            past.append(x)
            y = layer(x).relu()
            x = back(join(y, x, past=past) if isinstance(join, Add) else join(y, x))
        return self.head(x.mean(1))


@pytest.mark.parametrize(("join", "width"), [(Add, 8), (Concatenate, 4), (DropsAndAdds, 8)])
def test_joins_in_modules_without_children_are_joins(join, width):
    model = JoinsByModules(join, width)
    plan = sffx.plan(model, example_input=TOKENS)
    assert len(plan) >= 4
    assert not plan.notes
    assert not plan.leaves
    net = sffx.transform(model, example_input=TOKENS, norm="none")
    net.readout.mode = "classifier"
    x = torch.randn(4, 6, 3)
    for training in (True, False):
        torch.manual_seed(0)
        expected = model.train(training)(x)
        torch.manual_seed(0)
        logits = net.train(training)(x)
        torch.testing.assert_close(logits[-1] if training else logits, expected)


class Branches(nn.Module):
    """Streams that meet in one sum alone."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 8), nn.Linear(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


def test_a_plan_of_one_block_says_why():
    model = nn.Sequential(Branches(), nn.Flatten(), nn.Linear(48, 4))
    plan = sffx.plan(model, example_input=TOKENS)
    assert len(plan) == 1
    assert any("one feature block" in note for note in plan.notes)


class GatedLayer(nn.Module):
    """A product of two layers, as a gated linear unit, or of a value and its gate."""

    def __init__(self, gates_value: bool) -> None:
        super().__init__()
        self.gates_value = gates_value
        self.value, self.gate = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        value = self.value(x)
        gate = self.gate(value if self.gates_value else x)
        return value * gate.sigmoid()


@pytest.mark.parametrize("gates_value", [True, False])
@pytest.mark.parametrize("depth", [2, 3])
def test_layers_that_end_in_a_product_are_blocks_of_their_own(gates_value, depth):
    layers = [GatedLayer(gates_value) for _ in range(depth)]
    x = torch.randn(3, 5, 6)
    head = nn.Sequential(nn.Flatten(), nn.Linear(30, 4))
    plan = sffx.plan(nn.Sequential(*layers, head), example_input=x)
    assert [block.target for block in plan] == [f"block_{i}" for i in range(depth)]
    assert [block.num_parameters for block in plan] == [2 * 42] * depth
