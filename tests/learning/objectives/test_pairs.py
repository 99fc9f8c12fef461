"""Two nets side by side against two nets in plain torch."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sffx
from sffx import InputError
from sffx.learning.objectives.pairs import pair_loss
from sffx.learning.objectives.twin_layers import TwinLayer, remove_twins, with_twins
from sffx.objectives import FFCL
from tests.toys import kept

CLASSES = 3


def convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, CLASSES),
    ).double()


@kept
def cut(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = convolutions()
        x = torch.zeros(2, 1, 6, 6, dtype=torch.float64)
        return sffx.transform(model, "batchnorm", x, objective=FFCL(**options)).train()


def batch(samples=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 1, 6, 6, dtype=torch.float64, generator=generator)
    return x, torch.arange(samples) % CLASSES


def two_nets(net):
    """Return the layers of both nets of a cut model, as two plain models."""
    first, second = convolutions(), convolutions()
    twins = [layer for layer in net.modules() if isinstance(layer, TwinLayer)]
    for model, is_second in ((first, False), (second, True)):
        own = [layer for layer in model if any(True for _ in layer.parameters())]
        for layer, pair in zip(own, twins, strict=True):
            source = pair.twin if is_second else pair
            state = {
                name: value for name, value in source.state_dict().items() if "twin" not in name
            }
            layer.load_state_dict(state)
    return first.train(), second.train()


def normed(y):
    return (y / (y.square().mean((1, 2, 3), keepdim=True).sqrt() + 1e-8)).detach()


def expected_loss(net, x, y, loss_form):
    """Return the loss by hand, of two plain models and the readouts of the net's heads."""
    models = two_nets(net)
    total = 0.0
    values = [x, x]
    for block, layers in enumerate((slice(0, 3), slice(3, 6))):
        outputs = [model[layers](value) for model, value in zip(models, values, strict=True)]
        readout = getattr(net, f"head_{block}").probe
        logits = []
        for output in outputs:
            seen = output if loss_form == "bce" else output.detach()
            pooled = F.adaptive_avg_pool2d(seen, 2).flatten(1)
            features = pooled / (pooled.square().mean(1, keepdim=True).sqrt() + 1e-8)
            logits.append(F.linear(features, readout.linear.weight, readout.linear.bias))
        if loss_form == "bce":
            for own in logits:
                targets = F.one_hot(y, CLASSES).double()
                total = total + F.binary_cross_entropy_with_logits(own, targets) / 2
        else:
            first, second = (output.flatten(1) for output in outputs)
            same, other = [], []
            for n in range(len(x)):
                for m in range(len(x)):
                    target = torch.tensor([1.0 if y[n] == y[m] else -1.0])
                    own = F.cosine_embedding_loss(first[n : n + 1], second[m : m + 1], target)
                    (same if y[n] == y[m] else other).append(own)
            total = total + (torch.stack(same).mean() + torch.stack(other).mean()) / 2
            total = total + sum(F.cross_entropy(own, y) for own in logits) / 2
        values = [normed(output) for output in outputs]
    logits = [model[6:](value) for model, value in zip(models, values, strict=True)]
    return models, total + sum(F.cross_entropy(own, y) for own in logits) / 2


@pytest.mark.parametrize("loss_form", ["cosine", "bce"])
def test_gradients_are_those_of_two_nets_by_hand(loss_form):
    net = cut(loss_form=loss_form)
    x, y = batch()
    models, expected = expected_loss(net, x, y, loss_form)
    loss = sffx.local_loss(net, x, y)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    twins = [layer for layer in net.modules() if isinstance(layer, TwinLayer)]
    for model, is_second in zip(models, (False, True), strict=True):
        layers = [layer for layer in model if any(True for _ in layer.parameters())]
        parameters = [p for layer in layers for p in layer.parameters()]
        gradients = iter(torch.autograd.grad(expected, parameters, retain_graph=True))
        for layer, pair in zip(layers, twins, strict=True):
            source = pair.twin if is_second else pair
            for name, _ in layer.named_parameters():
                torch.testing.assert_close(source.get_parameter(name).grad, next(gradients))


def test_the_first_net_answers_and_is_extracted():
    net = cut()
    x, _ = batch()
    sffx.local_loss(net, *batch()).backward()
    net.eval()
    first, second = (model.eval() for model in two_nets(net))
    value = x
    for layers in (slice(0, 3), slice(3, 6)):
        value = normed(first[layers](value))
    with torch.no_grad():
        torch.testing.assert_close(sffx.block_scores(net, x)[-1], first[6:](value))
        model = sffx.extract(net)
        torch.testing.assert_close(model(x), first(x))
        assert not torch.allclose(first(x), second(x))
    assert not any(isinstance(layer, TwinLayer) for layer in model.modules())
    assert type(model[0]) is nn.Conv2d


def test_twins_come_and_go():
    model = convolutions()
    twins = with_twins(model, "ffcl")
    assert not any(isinstance(layer, TwinLayer) for layer in model.modules())
    x, _ = batch(5)
    pickle.loads(pickle.dumps(twins))
    torch.testing.assert_close(twins.eval()(x)[:3], model.eval()(x)[:3])
    assert not torch.allclose(twins(x)[3:], model(x)[3:])
    back = remove_twins(copy.deepcopy(twins))
    torch.testing.assert_close(back(x), model(x))
    assert list(back.state_dict()) == list(model.state_dict())


class Keywords(nn.Module):
    """Calls its layers by keywords, and one with a further argument."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1)
        self.last = nn.Linear(4, CLASSES)

    def forward(self, x):
        y = self.down(input=x).relu()
        y = self.up(y, output_size=[6, 6]).relu()
        return self.last(input=y.mean((2, 3)))


def test_layers_may_be_called_by_keywords():
    x, y = batch()
    model = Keywords().double()
    net = sffx.transform(model, "layer", x[:2], objective=FFCL()).train()
    sffx.local_loss(net, x, y).backward()
    both = with_twins(model, "ffcl")
    torch.testing.assert_close(both(x)[:4], model(x)[:4])
    assert not torch.allclose(both(x)[4:], model(x)[4:])


def test_a_batch_of_one_label_has_pairs_of_one_kind():
    cosines = torch.full((3, 3), 0.25)
    assert pair_loss(cosines, torch.zeros(3, dtype=torch.long)) == pytest.approx(0.375)
    own = pair_loss(cosines, torch.arange(3))
    assert own == pytest.approx((0.75 + 0.25) / 2)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.scale


def test_layers_that_cannot_be_doubled_are_named():
    model = nn.Sequential(nn.Linear(4, 4), Scaled(), nn.Linear(4, 3))
    with pytest.raises(InputError, match="'1', a Scaled, has weights of its own"):
        sffx.transform(model, "layer", torch.zeros(1, 4), objective="ffcl")


@pytest.mark.parametrize("options", [{"loss_form": "hinge"}, {"regions": 0}])
def test_options_that_cannot_be_used(options):
    with pytest.raises(InputError, match="Hint: "):
        FFCL(**options)
