"""Objectives of one's own: what breaks the contract of `sffx.objective` is refused, in words."""

import pickle
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sffx
from sffx import InputError
from sffx.learning.objectives.records import OBJECTIVES
from sffx.objectives import ForwardForward, Objective
from tests.toys import seeded

CLASSES = 3
X = torch.rand(6, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(6) % CLASSES


def perceptron():
    return nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))


def cut(objective):
    with seeded():
        return sffx.transform(perceptron(), "layer", X[:1], objective=objective).train()


def own(**members):
    return type("Own", (Objective,), {"name": "own", **members})()


@dataclass(frozen=True)
class Scaled(Objective):
    """Multiplies the scores; its option may be anything."""

    name: ClassVar[str] = "scaled"
    by: Any = 1.0

    def loss(self, scores, y, place):
        factor = self.by[place.index] if isinstance(self.by, list) else self.by
        return F.cross_entropy(scores * factor, y)


class Unequal(Objective):
    """All objects of the class are equal, though they differ."""

    name = "unequal"

    def __init__(self, by):
        object.__setattr__(self, "by", by)

    def loss(self, scores, y, place):
        return F.cross_entropy(scores * self.by, y)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_class_of_ones_own_needs_a_name_of_its_own(name):
    kind = OBJECTIVES[name]
    without_name = type("Mine", (kind,), {})
    with pytest.raises(InputError, match=f"Mine has the name '{name}'.*loaded as a .*Hint: name ="):
        cut(without_name())
    named = type("Mine", (kind,), {"name": f"my-{name}"})
    model = nn.Sequential(nn.Flatten(), *perceptron())
    assert sffx.plan(model, "layer", _image(), objective=named()).objective.name == f"my-{name}"


def _image():
    return torch.zeros(1, 1, 2, 4)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"name": 3}, "the objective Own has the name 3"),
        ({"name": ""}, "the objective Own has the name ''"),
        ({"views": 0}, "views of the objective 'own' is 0"),
        ({"views": 2}, "has 2 views, but no training_views"),
        ({"skips": -1}, "skips of the objective 'own' is -1"),
        ({"skips": None}, "skips of the objective 'own' is None"),
        ({"goodness": None}, "has the goodness None, but no make_head"),
    ],
)
def test_what_an_objective_must_say(members, message):
    with pytest.raises(InputError, match=f"{message}.*Hint: "):
        cut(own(**members))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda batch: None, "returned a NoneType. Hint: return a mapping with the inputs input"),
        (lambda batch: batch.inputs["input"], "returned a Tensor"),
        (lambda batch: {"image": batch.inputs["input"]}, r"returned a mapping of \['image'\]"),
        (lambda batch: batch.inputs, r"of shape \(6, 8\), but 2 views of 6 samples are 12 rows"),
        (lambda batch: batch.repeated(3), r"of shape \(18, 8\), but 2 views"),
        (lambda batch: {"input": [1, 2]}, "'input' of list, but 2 views"),
    ],
)
def test_views_that_are_none(made, message):
    net = cut(own(views=2, training_views=lambda self, batch: made(batch)))
    with pytest.raises(InputError, match=message):
        sffx.local_loss(net, X, Y)


@pytest.mark.parametrize("name", ["ff", "ff-unsupervised", "scff"])
def test_inputs_of_which_no_views_can_be_made_are_described(name):
    with seeded():
        model = nn.Sequential(nn.Flatten(), *perceptron())
        net = sffx.transform(model, "layer", _image(), objective=name).train()
    bytes_of_images = torch.zeros(6, 1, 2, 4, dtype=torch.uint8)
    with pytest.raises(InputError, match=r"input is \(.*\) of uint8, but the model was cut for"):
        sffx.local_loss(net, bytes_of_images, Y)
    with pytest.raises(InputError, match=r"input is .* but the model was cut for"):
        sffx.local_loss(net, torch.zeros(6, 7), Y)


def test_options_may_be_anything():
    expected = None
    for by in (2.0, [2.0] * 3, torch.tensor(2.0), np.float32(2)):
        with seeded():
            loss = sffx.local_loss(cut(Scaled(by)), X, Y).detach()
        expected = loss if expected is None else expected
        torch.testing.assert_close(loss, expected)


def test_each_object_has_its_own_loss():
    assert Unequal(1.0) == Unequal(2.0)
    losses = [sffx.local_loss(cut(Unequal(by)), X, Y).item() for by in (1.0, 2.0, 1.0)]
    assert losses[0] == losses[2] != losses[1]


def in_words(value):
    return value


class Local:
    pass


@pytest.mark.parametrize(
    ("option", "recorded"),
    [
        (None, None),
        (True, True),
        (np.float64(0.5), 0.5),
        (np.int64(3), 3),
        (torch.tensor([1.0, 2.0]), [1.0, 2.0]),
        (np.array([1, 2]), [1, 2]),
        ((1, [2, "three"]), (1, [2, "three"])),
        ({"a": (1, in_words)}, {"a": (1, f"{__name__}.in_words")}),
        (nn.CrossEntropyLoss(), "torch.nn.modules.loss.CrossEntropyLoss"),
        (Local, f"{__name__}.Local"),
    ],
)
def test_a_checkpoint_records_options_without_code(option, recorded, tmp_path):
    net = cut(Scaled(option))
    assert net.plan.objective.record() == {"name": "scaled", "by": recorded}
    sffx.save_checkpoint(tmp_path / "net.pt", net)
    again = sffx.load_checkpoint(tmp_path / "net.pt").net(perceptron(), objective=Scaled(option))
    assert torch.equal(again.eval()(X), net.eval()(X))
    pickle.loads(pickle.dumps(net))


def test_numbers_of_numpy_are_options(tmp_path):
    objective = ForwardForward(threshold=np.float64(2.0), alpha=np.float32(3.0))
    sffx.save_checkpoint(tmp_path / "net.pt", cut(objective))
    assert sffx.load_checkpoint(tmp_path / "net.pt").net(perceptron()).plan.objective == objective


def test_an_objective_that_pickle_cannot_hold_is_named():
    with pytest.raises(InputError, match="attribute 'by' of the objective 'scaled' holds"):
        pickle.dumps(cut(Scaled(lambda value: value)))
    with pytest.raises(InputError, match="the objective 'own' is of the class Own"):
        pickle.dumps(cut(own()))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ff", {"neutral": "no"}),
        ("cffa", {"neutral": 1}),
        ("ff", {"threshold": float("inf")}),
        ("ff", {"alpha": float("inf")}),
        ("ff", {"peer": float("inf")}),
        ("ff-unsupervised", {"threshold": float("inf")}),
        ("scff", {"penalty": (0.1, float("inf"))}),
        ("cwc", {"threshold": float("nan")}),
    ],
)
def test_options_that_mean_nothing(name, options):
    with pytest.raises(InputError, match=r" is .*\. Hint: "):
        OBJECTIVES[name](**options)


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_without_samples_counts_nothing(name):
    with seeded():
        model = nn.Sequential(nn.Flatten(), *perceptron())
        net = sffx.transform(model, "layer", _image(), objective=name).train()
    x = torch.rand(6, 1, 2, 4)
    evaluation = sffx.evaluate(net, [(x, Y), (x[:0], Y[:0])])
    assert evaluation == sffx.evaluate(net, [(x, Y)])
    with pytest.raises(InputError, match="the loader yielded no samples"):
        sffx.evaluate(net, [(x[:0], Y[:0])])


def flat(block, num_classes):
    return nn.Linear(block.shape[0], num_classes)


def centred(block):
    return nn.LayerNorm(block.shape, elementwise_affine=False)


@dataclass(frozen=True)
class Defaults(Objective):
    """Heads and norms of its own, as the functions that `transform` takes."""

    name: ClassVar[str] = "defaults"
    goodness = staticmethod(flat)
    norm = staticmethod(centred)


def test_an_objective_may_bring_a_goodness_and_a_norm(tmp_path):
    net = cut(Defaults())
    assert isinstance(net.head_0, nn.Linear)
    assert isinstance(net.norm_0, nn.LayerNorm)
    features = sffx.LinearProbe(net, ["block_0"]).features(X)
    output = net.block_0(X).detach()
    torch.testing.assert_close(features, F.layer_norm(output, output.shape[1:]))
    sffx.save_checkpoint(tmp_path / "net.pt", net)
    checkpoint = sffx.load_checkpoint(tmp_path / "net.pt")
    again = checkpoint.net(perceptron(), objective=Defaults())
    assert torch.equal(again.eval()(X), net.eval()(X))
    # Another goodness than the objective's own is still to be passed.
    with seeded():
        other = sffx.transform(
            perceptron(), "layer", X[:1], objective=Defaults(), goodness=another, norm="none"
        )
    sffx.save_checkpoint(tmp_path / "net.pt", other)
    checkpoint = sffx.load_checkpoint(tmp_path / "net.pt")
    with pytest.raises(InputError, match=r"Hint: pass goodness=.*another as in the training"):
        checkpoint.net(perceptron(), objective=Defaults())


def another(block, num_classes):
    return nn.Linear(block.shape[0], num_classes, bias=False)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "sff"])
def test_a_kernel_size_is_for_convolutions_alone(name):
    model = nn.Sequential(nn.Flatten(), *perceptron())
    with pytest.raises(InputError, match=r"kernel_size is 3, but .*Hint: "):
        sffx.transform(model, "layer", _image(), objective=name, kernel_size=3)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_probe_refuses_what_is_no_tensor(name):
    model = nn.Sequential(nn.Flatten(), *perceptron())
    probe = sffx.LinearProbe(sffx.transform(model, "layer", _image(), objective=name))
    with pytest.raises(InputError, match="x is a ndarray, not a tensor"):
        probe(np.zeros((2, 1, 2, 4)))
