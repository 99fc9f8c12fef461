"""Tensors that share memory without being one are kept together, said, or refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
from sffx.errors import TraceError


class _Model(nn.Module):
    """Two layers with code before each of them, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.share()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(torch.relu(self.a(x)))
        return self.last(self.second(torch.relu(self.b(x))))

    def share(self) -> None:
        pass

    def first(self, x: Tensor) -> Tensor:
        return x

    def second(self, x: Tensor) -> Tensor:
        return x


class _Buffers(_Model):
    def share(self) -> None:
        self.register_buffer("whole", torch.zeros(8))
        self.register_buffer("part", self.whole[2:6])


class _WritesTheWhole(_Buffers):
    def first(self, x: Tensor) -> Tensor:
        return x + self.part.sum()

    def second(self, x: Tensor) -> Tensor:
        self.whole.add_(x.detach().mean(0))
        return x


class _WritesThePart(_Buffers):
    def first(self, x: Tensor) -> Tensor:
        self.part.mul_(0.5).add_(1)
        return x

    def second(self, x: Tensor) -> Tensor:
        return x * self.whole


class _Reshaped(_Model):
    def share(self) -> None:
        self.register_buffer("flat", torch.arange(8.0))
        self.register_buffer("table", self.flat.view(2, 4))

    def first(self, x: Tensor) -> Tensor:
        self.table.mul_(1.5)
        return x

    def second(self, x: Tensor) -> Tensor:
        return x + self.flat


class _Expanded(_Model):
    def share(self) -> None:
        self.register_buffer("row", torch.ones(1).expand(8))

    def first(self, x: Tensor) -> Tensor:
        return x + self.row


class _OneStorage(_Model):
    """A storage of several tensors that have no number in common, as of a recurrent layer."""

    def share(self) -> None:
        numbers = torch.randn(72)
        self.b.weight.data, self.b.bias.data = numbers[:64].view(8, 8), numbers[64:]


@pytest.mark.parametrize(
    "kind", [_WritesTheWhole, _WritesThePart, _Reshaped, _Expanded, _OneStorage]
)
def test_buffers_that_share_memory_go_on_to_share_it(kind):
    model = kind()
    net = sffx.transform(model, "layer", torch.zeros(2, 6), check=False)
    assert sffx.check(model, net).difference is None
    assert not any("memory" in note for note in net.plan.notes)


def _tied(model: _Model) -> None:
    model.b.weight.data = model.a.weight.data[:, :1].expand(8, 8).contiguous()
    model.last.weight.data = model.b.weight.data[:3]


def _transposed(model: _Model) -> None:
    model.last.weight = nn.Parameter(model.b.weight.data[:, :3].t())


def _buffer_of_a_parameter(model: _Model) -> None:
    model.register_buffer("first_bias", model.b.bias.data)


def _attribute_of_a_parameter(model: _Model) -> None:
    model.first_weight = model.b.weight.data


def _overlapping(model: _Model) -> None:
    numbers = torch.randn(12)
    model.b.bias, model.a.bias = nn.Parameter(numbers[:8]), nn.Parameter(numbers[4:])


@pytest.mark.parametrize(
    "share",
    [_tied, _transposed, _buffer_of_a_parameter, _attribute_of_a_parameter, _overlapping],
)
def test_parameters_that_share_memory_are_noted(share):
    model = _Model()
    share(model)
    notes = sffx.plan(model, "layer", torch.zeros(2, 6)).notes
    assert any("b." in note and "share memory" in note and "Hint" in note for note in notes)


def test_a_parameter_that_repeats_its_numbers_is_noted():
    model = _Model()
    model.a.bias = nn.Parameter(torch.ones(1).expand(8))
    notes = sffx.plan(model, "layer", torch.zeros(2, 6)).notes
    assert any("numbers of a.bias share memory with each other" in note for note in notes)


@pytest.mark.parametrize("of", ["buffer", "parameter"])
def test_a_view_in_an_attribute_is_refused_where_it_is_read(of):
    class Reads(_Model):
        def share(self) -> None:
            self.register_buffer("whole", torch.zeros(8))
            self.view = self.whole[:4] if of == "buffer" else self.a.bias.data[:4]

        def second(self, x: Tensor) -> Tensor:
            return x + self.view.sum()

    with pytest.raises(TraceError, match=r"attribute 'view', a view of .*Hint: register it"):
        sffx.plan(Reads(), "layer", torch.zeros(2, 6))


class _Leaf(nn.Module):
    """A module that runs whole, with a tensor in an attribute."""

    def __init__(self, held: nn.Module, view: Tensor | list[Tensor], *, reads: bool) -> None:
        super().__init__()
        self.held, self.view, self.reads = held, view, reads

    def forward(self, x: Tensor) -> Tensor:
        values = x.sum().item()  # no trace can look into this
        (view,) = self.view if isinstance(self.view, list) else [self.view]
        return self.held(x + (view.sum() if self.reads else 0) + 0 * values)


@pytest.mark.parametrize("of", ["values", "list", "history", "buffer", "unread"])
def test_a_leaf_reads_no_view_that_would_go_stale(of):
    layer = nn.Linear(8, 8)
    layer.register_buffer("whole", torch.ones(8))
    view = {"buffer": layer.whole[:4], "history": layer.weight.t()}
    held = view.get(of, layer.weight.data[:4])
    leaf = _Leaf(layer, [held] if of == "list" else held, reads=of != "unread")
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), leaf, nn.ReLU(), nn.Linear(8, 3))
    if of in ("buffer", "unread"):
        net = sffx.transform(model, "layer", torch.zeros(2, 6))
        (own,) = [each for each in net.modules() if isinstance(each, _Leaf)]
        assert net.plan.leaves
        own.held.whole.fill_(2)
        assert of == "unread" or own.view.tolist() == [2.0] * 4
    else:
        with pytest.raises(TraceError, match=r"reads its attribute '2.view', a view of"):
            sffx.plan(model, "layer", torch.zeros(2, 6))


class _Functional(nn.Module):
    """A batch norm by the function, which is traced."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm1d(channels, affine=False)
        self.last = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        own = self.statistics
        return self.last(F.batch_norm(x, own.running_mean, own.running_var, training=True))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, _Functional])
@pytest.mark.parametrize("places", [slice(2, 6), slice(None)], ids=["view", "whole"])
def test_batch_norms_that_share_statistics_stay_together(kind, places):
    norms = [kind(8), kind(8 if places == slice(None) else 4), kind(4)]
    first, second, _ = (getattr(norm, "statistics", norm) for norm in norms)
    second.running_mean = first.running_mean[places]
    width = second.num_features
    layers = [nn.Linear(6, 8), nn.Linear(8, width), nn.Linear(width, 4)]
    pairs = [part for pair in zip(layers, norms, strict=True) for part in (*pair, nn.ReLU())]
    model = nn.Sequential(*pairs, nn.Linear(4, 3))
    plan = sffx.plan(model, "layer", torch.zeros(2, 6))
    assert {"_0", "_3"} <= set(plan.blocks[0].nodes)
    assert len(plan.all_blocks) > 1


def test_a_spectral_norm_keeps_a_view_only_until_it_is_called():
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))
    assert not sffx.plan(model, "layer", torch.zeros(2, 6)).notes
