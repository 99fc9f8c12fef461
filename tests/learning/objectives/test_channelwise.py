"""The losses of CwC and its superclasses against hand-written loops in plain torch."""

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sffx
from sffx import InputError
from sffx.learning.channelwise import CwCGoodness
from sffx.learning.objectives.records import objective_of_record
from sffx.objectives import CwC
from tests.toys import kept

CLASSES = 4
HALVES = [0, 1, 1, 0]


def layers():
    """Three layers as in the paper: a convolution, ReLU, BN; the second one separates."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for i, (before, after, groups) in enumerate(((1, 4, 1), (4, 12, 2), (12, 9, 1))):
        convolution = nn.Conv2d(before, after, 3, padding=1, groups=groups)
        model.add_module(f"layer{i}", nn.Sequential(convolution, nn.ReLU(), nn.BatchNorm2d(after)))
    model.add_module("flatten", nn.Flatten())
    model.add_module("classifier", nn.Linear(9 * 16, CLASSES))
    return model.double()


@kept
def cut(**options):
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    return sffx.transform(
        layers(), "module(1)", x, objective=CwC(**options), norm="none", check=False
    ).train()


def batch(samples=7):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 1, 4, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, CLASSES, (samples,), generator=generator)


def goodness_of_group(y, members):
    """Return the mean square of some channels of one sample, (C, H, W)."""
    return torch.stack([y[channel].pow(2).mean() for channel in members]).mean()


def by_hand(y, labels, number, loss_form, threshold, share):
    """Return the loss of a block's output, sample by sample."""
    members = torch.arange(y.shape[1]).tensor_split(number)
    competitions, separations = [], []
    for sample, label in zip(y, labels.tolist(), strict=True):
        goodness = [goodness_of_group(sample, group.tolist()) for group in members]
        own = goodness.pop(label)
        others = sum(goodness) / len(goodness)
        every = torch.stack([own, *goodness])
        competitions.append(-(own - every.exp().sum().log()))
        separations.append(torch.log(1 + torch.exp(threshold - own)))
        separations.append(torch.log(1 + torch.exp(others - threshold)))
    competition = torch.stack(competitions).mean()
    separation = torch.stack(separations).mean()
    if loss_form == "cwc":
        return competition
    if loss_form == "pvn":
        return separation
    return share * competition + (1 - share) * separation


@pytest.mark.parametrize("superclasses", [(), (HALVES,), (2, None)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_form": "pvn"},
        {"loss_form": "cwg"},
        {"loss_form": "cwg", "threshold": 0.7, "share": 0.9},
    ],
    ids=str,
)
def test_losses_and_gradients_are_those_of_a_hand_written_loop(options, superclasses):
    net = cut(**options, superclasses=superclasses)
    model = layers().train()
    x, y = batch()
    losses = sffx.block_losses(net, x, y)
    sum(losses.values()).backward()
    loss_form = options.get("loss_form", "cwc")
    published = (options.get("threshold", 2.0), options.get("share", 0.28))
    for i in range(3):
        x = model.get_submodule(f"layer{i}")(x.detach())
        labels, number = y, CLASSES
        if i == 0 and superclasses:
            mapping = HALVES if superclasses[0] is HALVES else [0, 0, 1, 1]
            labels, number = torch.tensor(mapping)[y], 2
        loss = by_hand(x, labels, number, loss_form, *published)
        loss.backward()
        torch.testing.assert_close(losses[f"block_{i}"], loss)
    loss = F.cross_entropy(model.classifier(x.detach().flatten(1)), y)
    loss.backward()
    torch.testing.assert_close(losses["classifier"], loss)
    extracted = dict(sffx.extract(net).named_parameters())
    gradients = [p.grad for p in net.parameters()]
    assert len(extracted) == len(gradients)
    for mine, plain in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(mine, plain.grad)


def test_without_options_it_is_the_modified_cwc_of_the_sff_paper():
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    nets = [
        sffx.transform(layers(), "module(1)", x, objective=CwC(), check=False),
        sffx.transform(layers(), "module(1)", x, objective="cwc", check=False),
        sffx.transform(layers(), "module(1)", x, goodness="cwc", check=False),
    ]
    for net in nets:
        sffx.local_loss(net.train(), *batch()).backward()
    for one, two, three in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(one.grad, two.grad)
        assert torch.equal(one.grad, three.grad)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_a_class_has_the_goodness_of_its_superclass(data):
    number = data.draw(st.integers(2, 4))
    rest = data.draw(st.lists(st.integers(0, number - 1), max_size=4))
    mapping = data.draw(st.permutations([*range(number), *rest]))
    channels = data.draw(st.integers(number, 9))
    y = torch.randn(3, channels, 2, 2, dtype=torch.float64, generator=torch.Generator())
    head = CwCGoodness(channels, len(mapping), superclass_of=mapping).double()
    members = torch.arange(channels).tensor_split(number)
    for row, sample in zip(head(y), y, strict=True):
        for label, superclass in enumerate(mapping):
            expected = goodness_of_group(sample, members[superclass].tolist())
            torch.testing.assert_close(row[label], expected)


def test_a_block_may_have_fewer_channels_than_classes():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, CLASSES)
    )
    x = torch.randn(6, 5)
    with pytest.raises(InputError, match="3 channels for 4 classes"):
        sffx.transform(model, "layer", x, objective="cwc")
    net = sffx.transform(model, "layer", x, objective=CwC(superclasses=[2]))
    net.train()
    y = torch.arange(6) % CLASSES
    assert net(x).shape == (3, 6, CLASSES)
    optimizer = torch.optim.Adam(sffx.parameter_groups(net, 0.01))
    sffx.local_step(net, x, y, optimizer)
    found = sffx.evaluate(net, [(x, y)])
    # Its scores do not tell the classes of a superclass apart.
    assert found.loss["block_0"] >= torch.tensor(2.0).log()
    scores = sffx.block_scores(net.eval(), x)
    assert torch.equal(scores[0][:, 0], scores[0][:, 1])
    assert not torch.equal(scores[1][:, 0], scores[1][:, 1])
    torch.testing.assert_close(net(x), scores[:2].mean(0))
    with pytest.raises(InputError, match="3 channels for 4 superclasses"):
        sffx.transform(model, "layer", x, objective=CwC(superclasses=[4]))


def test_records_and_checkpoints_have_the_options(tmp_path):
    objective = CwC("cwg", threshold=1.5, share=0.5, superclasses=[HALVES, None])
    assert objective_of_record(json.loads(json.dumps(objective.record()))) == objective
    assert objective_of_record({"name": "cwc"}) == CwC()
    net = cut(superclasses=[HALVES])
    again = sffx.load_checkpoint(sffx.save_checkpoint(tmp_path / "net.pt", net)).net(layers())
    assert again.plan.objective == CwC(superclasses=[HALVES])
    x, _ = batch()
    assert torch.equal(again.eval()(x), net.eval()(x))
    assert hash(again.plan.objective)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_form": "ce"}, "loss_form is 'ce'. Hint: choose one of 'cwc', 'pvn', 'cwg'"),
        ({"threshold": -1}, "threshold is -1. Hint: pass a positive number"),
        ({"share": 0}, "share is 0. Hint"),
        ({"share": 1.5}, "share is 1.5. Hint: pass a number up to 1"),
        ({"superclasses": 2}, "superclasses is 2. Hint: pass a list with an entry"),
        ({"superclasses": "2"}, "superclasses is '2'. Hint"),
        ({"superclasses": [2.5]}, "an entry of superclasses is 2.5. Hint"),
        ({"superclasses": [[0, "a"]]}, "an entry of superclasses is .*Hint"),
        ({"superclasses": [3]}, "3 superclasses do not divide 4 classes evenly. Hint"),
        ({"superclasses": [1]}, "1 superclasses do not divide"),
        ({"superclasses": [[0, 1]]}, "superclasses are given for 2 classes, but there are 4"),
        ({"superclasses": [[0, 2, 2, 0]]}, r"the superclasses are \[0, 2\]. Hint: count"),
        ({"superclasses": [[0, 0, 0, 0]]}, r"the superclasses are \[0\]"),
        ({"superclasses": [2, 2, 2]}, "3 entries for 3 blocks, but the last block must tell"),
    ],
    ids=str,
)
def test_options_that_cannot_be_used(options, message):
    with pytest.raises(InputError, match=message):
        cut(**options)


def test_targets_that_cannot_be_used():
    x, y = batch()
    soft = F.one_hot(y, CLASSES).double()
    assert sffx.local_loss(cut(), x, soft) > 0
    for options in ({"loss_form": "pvn"}, {"superclasses": [2]}):
        with pytest.raises(InputError, match="Hint: "):
            sffx.local_loss(cut(**options), x, soft)


def test_other_tasks_are_refused():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 1))
    with pytest.raises(InputError, match="Hint: "):
        sffx.transform(model, "layer", torch.zeros(1, 5), objective=CwC("pvn"))
