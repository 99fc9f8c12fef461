"""The batch axis is what changes with the batch, whatever sizes a model has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sffx
from sffx.blocks import BatchAxis
from sffx.compiler.batch_axis import BATCH_SIZES, axis_after_reshape
from sffx.compiler.facts import facts
from sffx.compiler.trace.trace import trace

B, OTHER = BATCH_SIZES


class Applies(nn.Module):
    """A layer, a function of its value and the batch size, and a layer that gives logits."""

    def __init__(self, code, width: int = 8) -> None:
        super().__init__()
        self.code = code
        self.first, self.last = nn.Linear(4, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.code(self.first(x), x.shape[0])
        return self.last(y.reshape(x.shape[0], -1, y.shape[-1]).mean(1))


FOLDS = {
    "flatten": (lambda y, b: y.flatten(0, 1), BatchAxis(0, 5, 1)),
    "view": (lambda y, b: y.view(-1, 8), BatchAxis(0, 5, 1)),
    "transposed": (lambda y, b: y.transpose(0, 1).reshape(-1, 8), BatchAxis(0, 5, 5)),
    "moved": (lambda y, b: y.movedim(1, 0), BatchAxis(1)),
    "in the middle": (lambda y, b: y[None].flatten(1, 2), BatchAxis(1, 5, 1)),
    "two folds": (
        lambda y, b: y[:, None].expand(-1, 2, -1, -1).movedim(1, 0).flatten(0, 2),
        BatchAxis(0, 10, 2),
    ),
    "repeated": (lambda y, b: y[:, 0].repeat(3, 1), BatchAxis(0, 3, 3)),
    "interleaved": (lambda y, b: y[:, 0].repeat_interleave(3, 0), BatchAxis(0, 3, 1)),
    "repeated along another axis": (
        lambda y, b: y.flatten(0, 1)[:, None].repeat(1, 3, 1),
        BatchAxis(0, 5, 1),
    ),
    "one behind the other": (lambda y, b: torch.cat([y[:, 0], y[:, 1]]), BatchAxis(0, 2, 2)),
    "stacked": (lambda y, b: torch.stack([y[:, 0], y[:, 1]]), BatchAxis(1)),
    "expanded": (lambda y, b: y[:, :1].expand(-1, 3, -1).reshape(-1, 8), BatchAxis(0, 3, 1)),
    "with a class token": (
        lambda y, b: torch.cat([y[0, 0].repeat(b * 5, 1, 1), y.flatten(0, 1)[:, None]], 1),
        BatchAxis(0, 5, 1),
    ),
    "with what layers make of one token": (
        lambda y, b: y.flatten(0, 1) + torch.ones(1, 8).expand(b * 5, -1).cos().relu(),
        BatchAxis(0, 5, 1),
    ),
    "with what layers make of zeros": (
        lambda y, b: y.transpose(0, 1).flatten(0, 1) * torch.zeros(b * 5, 8).exp().sqrt(),
        BatchAxis(0, 5, 5),
    ),
    "with their numbers": (
        lambda y, b: y.flatten(0, 1) + torch.ones(b * 5, 8).cumsum(0),
        None,
    ),
    "in pairs": (lambda y, b: y.view(b // 2, 2, 5, 8), None),
    "with one more": (lambda y, b: torch.cat([y.flatten(0, 1), y.new_zeros(b, 8)]), None),
}


@pytest.mark.parametrize("fold", FOLDS)
def test_the_rows_of_a_sample(fold):
    code, expected = FOLDS[fold]
    graph = trace(Applies(code), torch.zeros(2, 5, 4)).graph
    nodes = list(graph.nodes)
    # The last reshape reads what the code returns.
    reshape = [node for node in nodes if node.target == "reshape"][-1]
    batch = facts(reshape.args[0]).batch
    assert (batch == expected) if expected else (batch is None or batch.slower is None)


class Rearrange(nn.Module):
    """A layer without tensors that is called by another name than what it does."""

    def __init__(self, code) -> None:
        super().__init__()
        self.code = code

    def forward(self, y: Tensor) -> Tensor:
        return self.code(y)


class Rearranged(nn.Module):
    """Such a layer between two others."""

    def __init__(self, layer: Rearrange) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(4, 8), layer, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(self.first(x)).float()
        return self.last(y.reshape(x.shape[0], -1, 8).mean(1))


REARRANGEMENTS = {
    "folded": (lambda y: y.flatten(0, 1), BatchAxis(0, 5, 1)),
    "transposed and folded": (lambda y: y.transpose(0, 1).reshape(-1, 1, 8), BatchAxis(0, 5, 5)),
    "in the middle": (lambda y: y[None].flatten(1, 2), BatchAxis(1, 5, 1)),
    "tiled": (lambda y: y[:, 0].repeat(3, 1), BatchAxis(0, 3, 3)),
    "repeated": (lambda y: y[:, 0].repeat_interleave(3, 0), BatchAxis(0, 3, 1)),
    "shuffled": (lambda y: y.flatten(0, 1).flip(0), None),
    "mixed": (lambda y: y.flatten(0, 1).roll(1, 0), None),
    "in another dtype": (lambda y: y.flatten(0, 1).double(), BatchAxis(0, 5, 1)),
    "scaled": (lambda y: 2 * y.flatten(0, 1), None),
}


@pytest.mark.parametrize("name", REARRANGEMENTS)
def test_the_rows_that_a_layer_without_tensors_gives(name):
    code, expected = REARRANGEMENTS[name]
    model = Rearranged(Rearrange(code))
    graph = trace(model, torch.zeros(2, 5, 4)).graph
    (call,) = [node for node in graph.nodes if node.target == "layer"]
    batch = facts(call).batch
    assert (batch == expected) if expected else batch.slower is None


def _index_add(messages: Tensor, index: Tensor, nodes: int) -> Tensor:
    return messages.new_zeros(nodes, 6).index_add(0, index, messages)


def _scatter(messages: Tensor, index: Tensor, nodes: int) -> Tensor:
    zeros = torch.zeros(nodes, 6, dtype=messages.dtype)
    return zeros.scatter_add(0, index[:, None].expand_as(messages), messages)


def _scatter_mean(messages: Tensor, index: Tensor, nodes: int) -> Tensor:
    sums = _scatter(messages, index, nodes)
    degrees = torch.zeros(nodes).scatter_add_(0, index, torch.ones(index.shape[0]))
    return sums / degrees.clamp(min=1)[:, None]


class Aggregation(nn.Module):
    """Sums of messages, by a `__call__` that takes more than its forward."""

    def __call__(self, messages: Tensor, index: Tensor | None = None, **more: int) -> Tensor:
        return super().__call__(messages, index, **more)

    def forward(self, messages: Tensor, index: Tensor | None = None, nodes: int = 1) -> Tensor:
        return _index_add(messages, index, nodes)


class MessagePassing(nn.Module):
    """Graphs of five nodes as one graph without edges between them, as graph libraries do it."""

    def __init__(self, aggregate) -> None:
        super().__init__()
        self.aggregate = aggregate
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 4)
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]]))

    def forward(self, x: Tensor) -> Tensor:
        nodes = x.shape[0] * x.shape[1]
        edges = self.edges[:, None] + 5 * torch.arange(x.shape[0])[:, None]
        sources, targets = edges.flatten(1)
        x = x.flatten(0, 1)
        for layer in self.layers:
            messages = layer(x).index_select(0, sources)
            x = self.aggregate(messages, targets, nodes=nodes).relu()
        return self.head(x.view(-1, 5, 6).mean(1))


@pytest.mark.parametrize("aggregate", [_index_add, _scatter, _scatter_mean, Aggregation()])
def test_sums_of_messages_have_the_rows_of_their_nodes(aggregate):
    torch.manual_seed(0)
    model, x = MessagePassing(aggregate), torch.randn(3, 5, 6)
    net = sffx.transform(model, "layer", x, check=True).train()
    assert [block.shape for block in net.plan] == [(5, 6)] * 3
    assert net.plan.leaves == ()
    other = torch.cat([x[:1] + 1, x[1:]])
    torch.testing.assert_close(net(x)[:, 1:], net(other)[:, 1:])


@pytest.mark.parametrize(
    ("before", "axis", "after", "expected"),
    [
        ((6, 5, 8), 2, (30, 8), 1),
        ((6, 8, 2, 3), 1, (6, 8, 6), 1),
        ((30, 5, 7), 1, (6, 5, 5, 7), 2),
        ((6, 8, 2), 1, (6, 16), None),
        ((6, 8), 1, (6, 2, 4), None),
    ],
)
def test_the_axis_that_a_reshape_makes_of_another(before, axis, after, expected):
    assert axis_after_reshape(before, axis, after) == expected


class Bag(nn.Module):
    """Layers on the instances of a bag, (B, N, C, H, W), folded into the batch."""

    def __init__(self, fold, width: int) -> None:
        super().__init__()
        self.fold = fold
        self.layers = nn.Sequential(*(nn.Conv2d(width, width, 3, padding=1) for _ in range(3)))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.fold == "transposed":
            folded = x.transpose(0, 1).flatten(0, 1)
            return self.head(
                self.layers(folded).mean((2, 3)).view(x.shape[1], x.shape[0], -1).mean(0)
            )
        folded = x.flatten(0, 1)
        return self.head(self.layers(folded).mean((2, 3)).view(*x.shape[:2], -1).mean(1))


@pytest.mark.parametrize("fold", ["plain", "transposed"])
@pytest.mark.parametrize("goodness", ["sff", "mlp"])
def test_the_goodness_of_a_bag_is_the_mean_of_its_instances(fold, goodness):
    torch.manual_seed(0)
    # As many instances as channels.
    model, x = Bag(fold, 3).double(), torch.randn(4, 3, 3, 6, 6, dtype=torch.float64)
    net = sffx.transform(model, "layer", x[:1], goodness=goodness, check=True).train()
    assert [block.shape for block in net.plan] == [(3, 3, 6, 6)] * 3
    assert {block.channel_axis for block in net.plan} == {2}
    assert all(block.is_folded for block in net.plan)
    assert any("the goodness of a sample is the mean" in note for note in net.plan.notes)
    one_by_one = [net.head_0.head(model.layers[0](x[:, i])) for i in range(3)]
    torch.testing.assert_close(net(x)[0], torch.stack(one_by_one).mean(0))


def test_any_number_of_instances():
    model, x = Bag("transposed", 3), torch.randn(2, 5, 3, 6, 6)
    net = sffx.transform(model, "layer", x, norm="none").train()
    other = torch.randn(3, 4, 3, 6, 6)
    torch.testing.assert_close(net(other)[-1], model(other))
    sffx.local_loss(net, other, torch.arange(3)).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_two_views_of_a_sample_one_behind_the_other():
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
            self.head = nn.Linear(6, 4)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            one, two = self.layers(torch.cat([left, right])).chunk(2)
            return self.head(one - two)

    net = sffx.transform(Siamese(), "layer", (torch.randn(1, 6), torch.randn(1, 6)), check=True)
    assert [block.shape for block in net.plan][:3] == [(2, 6)] * 3


def test_rows_whose_order_is_unknown_are_no_place_to_cut():
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            pairs = x.view(x.shape[0] // 2, 2, 5, 6).transpose(1, 2)
            y = self.second(self.first(pairs.reshape(-1, 6)).relu())
            y = y.view(x.shape[0] // 2, 5, 2, 6).transpose(1, 2).reshape(x.shape[0], 5, 6)
            return self.head(y.mean(1))

    with pytest.raises(sffx.CutError, match=r"first axis of its value is not the batch.*5 \* B"):
        sffx.plan(Shuffled(), ["second"], torch.randn(2, 5, 6))


@pytest.mark.parametrize("at_least", [2, 3, 4])
def test_a_model_that_wants_batches_of_a_multiple(at_least):
    def asserted(y: Tensor, b) -> Tensor:
        assert b % at_least == 0
        return y.view(b // at_least, at_least, 5, 8).relu().view(b, 5, 8)

    model = Applies(asserted)
    net = sffx.transform(model, "layer", torch.randn(12, 5, 4), check=False)
    assert not net.plan.leaves
    assert sffx.check(model, net).difference is None


def test_a_model_that_wants_the_batch_size_of_the_example_or_multiples():
    model = Applies(lambda y, b: y.view(b // 16, 16, 5, 8).relu().view(b, 5, 8))
    net = sffx.transform(model, "layer", torch.randn(16, 5, 4))
    x = torch.randn(32, 5, 4)
    torch.testing.assert_close(net.eval()(x).shape, model(x).shape)


SIZES = st.sampled_from([2, 3, B, OTHER, 2 * OTHER, B + OTHER, B // 2])
LAYOUTS = {
    "batch first": (lambda y: y, lambda y, b, t: y),
    "tokens first": (lambda y: y.transpose(0, 1), lambda y, b, t: y.transpose(0, 1)),
    "folded": (lambda y: y.flatten(0, 1), lambda y, b, t: y.unflatten(0, (b, t))),
    "tokens first, folded": (
        lambda y: y.transpose(0, 1).flatten(0, 1),
        lambda y, b, t: y.view(t, b, -1).transpose(0, 1),
    ),
}


class Layouts(nn.Module):
    """Linear layers on tokens (B, T, C), which run in one layout or another."""

    def __init__(self, widths: list[int], layouts: list[str], residual: bool) -> None:
        super().__init__()
        self.layouts, self.residual = layouts, residual
        if residual:
            widths = widths[:1] * len(widths)
        self.stem = nn.Linear(2, widths[0])
        layers = [nn.Linear(widths[i], widths[i + 1]) for i in range(len(layouts))]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(layers[-1].out_features, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, t = x.shape[0], x.shape[1]
        y = self.stem(x)
        for layer, layout in zip(self.layers, self.layouts, strict=True):
            to, back = LAYOUTS[layout]
            y = to(y)
            y = (y + layer(y) if self.residual else layer(y)).relu()
            # A branch on sizes that the batch may have.
            if y.shape[-1] == B and b > 0:
                y = y * 2
            y = back(y, b, t)
        return self.head(y.mean(1))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    tokens=SIZES,
    widths=st.lists(SIZES, min_size=4, max_size=4),
    layouts=st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=1, max_size=3),
    residual=st.booleans(),
)
def test_sizes_like_those_of_the_batch_change_nothing(tokens, widths, layouts, residual):
    model = Layouts(widths, layouts, residual)
    net = sffx.transform(model, "layer", torch.randn(1, tokens, 2), check=False)
    assert not net.plan.leaves
    assert len(net.plan) >= len(layouts)
    assert sffx.check(model, net).difference is None
