"""Models of which FFCL makes two nets, and models where it cannot keep them apart."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sffx
from sffx import InputError
from sffx.learning.objectives.side_by_side import require_two_nets
from sffx.learning.objectives.twin_layers import TwinLayer, with_twins
from tests.toys import seeded

CLASSES = 3


class Tokens(nn.Module):
    """Two layers on tokens, (B, T, 5), in the way that a subclass has."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.second = nn.Linear(8, 8)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, x):
        h = self.begin(x).relu()
        return self.last(self.second(h).relu().mean(1))

    def begin(self, x):
        return self.first(x)


class TokensFirst(Tokens):
    def forward(self, x):
        h = self.first(x.transpose(0, 1)).relu()
        return self.last(self.second(h).relu().mean(0))


class Positions(Tokens):
    def __init__(self):
        super().__init__()
        self.positions = nn.Embedding(6, 8)

    def begin(self, x):
        return self.first(x) + self.positions(torch.arange(x.shape[1]))


class Functional(Tokens):
    def begin(self, x):
        return F.linear(x, self.first.weight, self.first.bias)


class Counting(Tokens):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(8))

    def begin(self, x):
        y = self.first(x)
        if self.training:
            self.seen += y.detach().mean((0, 1))
        return y - self.seen


class Constant(Tokens):
    """Positions in a buffer that stays belong to both nets."""

    def __init__(self):
        super().__init__()
        self.register_buffer("positions", torch.rand(6, 8))

    def begin(self, x):
        return self.first(x) + self.positions


class Tied(Tokens):
    """Two layers of one block have the same weight."""

    def __init__(self):
        super().__init__()
        self.third = nn.Linear(8, 8)
        self.third.weight = self.second.weight

    def forward(self, x):
        h = self.second(self.begin(x).relu()).relu()
        return self.last(self.third(h).relu().mean(1))


X = torch.rand(4, 6, 5, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0])


def cut(kind):
    with seeded():
        return sffx.transform(kind(), "layer", X[:1], objective="ffcl").train()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (TokensFirst, "'first', a Linear, gives values of both"),
        (Positions, "'positions', a Embedding, gives values of both"),
        (Functional, "'second', a Linear, gives values of both"),
        (Counting, "writes on the buffer 'seen'"),
    ],
)
def test_models_that_mix_the_nets_are_refused(kind, message):
    with pytest.raises(InputError, match=f"{message}.*Hint: "):
        cut(kind)
    with pytest.raises(InputError, match=message):
        sffx.plan(kind(), "layer", X[:1], objective="ffcl")


def test_layers_that_begin_at_zero_hide_nothing():
    model = Positions()
    nn.init.zeros_(model.last.weight)
    with pytest.raises(InputError, match="'positions', a Embedding"):
        sffx.transform(model, "layer", X[:1], objective="ffcl")


@pytest.mark.parametrize("kind", [Tokens, Constant, Tied])
def test_a_model_of_two_nets_stays_as_it_is(kind):
    twins = with_twins(kind(), "ffcl").train()
    before = {name: value.clone() for name, value in twins.state_dict().items()}
    state = torch.random.get_rng_state()
    require_two_nets(twins, lambda model, values: model(values["x"]), {"x": X}, "ffcl")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in twins.modules())
    assert not any(module._forward_hooks for module in twins.modules())
    for name, value in twins.state_dict().items():
        assert torch.equal(value, before[name])


def test_twins_share_what_their_layers_share():
    net = cut(Tied)
    optimizer = torch.optim.SGD(sffx.parameter_groups(net, 0.1))
    sffx.local_step(net, X, Y, optimizer)
    tied = [layer for layer in net.block_1.modules() if isinstance(layer, TwinLayer)]
    one, two = tied
    assert one.weight is two.weight
    assert one.twin.weight is two.twin.weight
    assert one.twin.bias is not two.twin.bias
    assert not torch.equal(one.weight, one.twin.weight)


def test_layers_that_do_not_learn_are_the_same_in_both_nets():
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    model[0].weight.requires_grad_(False)
    twins = with_twins(model, "ffcl")
    assert torch.equal(twins[0].twin.weight, model[0].weight)
    assert not torch.equal(twins[0].twin.bias, model[0].bias)
    assert not torch.equal(twins[2].twin.weight, model[2].weight)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weights_that_cannot_be_initialised_anew_are_refused(norm):
    model = nn.Sequential(norm(nn.Linear(5, 8)), nn.ReLU(), nn.Linear(8, CLASSES))
    with pytest.raises(InputError, match="'0', a Linear, has weights of its own"):
        sffx.transform(model, "layer", torch.zeros(1, 5), objective="ffcl")


@pytest.mark.parametrize("samples", [1, 3, 4])
def test_a_probe_reads_the_first_net(samples):
    net = cut(Tokens)
    features = sffx.LinearProbe(net, ["block_0"]).features(X[:samples])
    first = sffx.extract(net)
    pooled = first.first(X[:samples]).relu().mean(1)
    expected = pooled / (pooled.square().mean(1, keepdim=True).sqrt() + 1e-8)
    torch.testing.assert_close(features, expected.detach())
