"""A linear probe against an explicit loop over the blocks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sffx
from sffx import InputError
from sffx.objectives import ForwardForward
from tests.toys import kept

CLASSES = 3


def perceptron():
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in ((16, 7), (7, 6), (6, 5)):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(5, CLASSES)).double()


@kept
def cut(**options):
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    return sffx.transform(perceptron(), "layer", x, **options).train()


def normed(h, objective):
    if objective == "sff":
        return F.layer_norm(h, h.shape[1:])
    return h / (h.square().mean(1, keepdim=True).sqrt() + 1e-8)


def features_by_hand(net, x, objective):
    """Return the normalised outputs of the last two blocks; with "ff" of the neutral label."""
    h = x.clone()
    if objective == "ff":
        h.reshape(len(x), -1)[:, :CLASSES] = 1 / CLASSES
    outputs = []
    for block in (net.block_0, net.block_1, net.block_2):
        h = normed(block(h), objective)
        outputs.append(h)
    return torch.cat(outputs[1:], dim=1)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("objective", ["sff", "ff", "ff-unsupervised"])
def test_it_is_a_softmax_on_the_concatenated_outputs(objective, mode):
    net = cut(objective=objective).train(mode)
    x = torch.rand(6, 1, 4, 4, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    probe = sffx.LinearProbe(net, ["block_1", "block_2"])
    with torch.no_grad():
        expected = features_by_hand(net, x, objective)
    assert torch.equal(probe.features(x), probe.features({"input": x}))
    torch.testing.assert_close(probe.features(x), expected)

    weight = probe.linear.weight.detach().clone().requires_grad_()
    bias = probe.linear.bias.detach().clone().requires_grad_()
    optimizer = torch.optim.SGD(probe.parameters(), 0.5)
    by_hand = torch.optim.SGD([weight, bias], 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(probe(x), y).backward()
        optimizer.step()
        by_hand.zero_grad()
        F.cross_entropy(F.linear(expected, weight, bias), y).backward()
        by_hand.step()
    torch.testing.assert_close(probe.linear.weight.detach(), weight.detach())
    torch.testing.assert_close(probe(x), F.linear(expected, weight, bias))
    assert net.training == mode


def test_batch_norm_keeps_its_statistics_and_later_blocks_do_not_run():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, CLASSES),
    )
    net = sffx.transform(model, "layer", torch.zeros(1, 1, 6, 6)).train()
    runs = []
    net.block_1.register_forward_hook(lambda *args: runs.append("block_1"))
    net.head_0.register_forward_hook(lambda *args: runs.append("head_0"))
    x = torch.rand(4, 1, 6, 6)
    probe = sffx.LinearProbe(net, ["block_0"], regions=2)
    features = probe.features(x)
    assert not runs
    net.eval()
    regions = F.adaptive_avg_pool2d(net.block_0(x), 2).flatten(1)
    torch.testing.assert_close(features, F.layer_norm(regions, regions.shape[1:]))


def test_the_default_leaves_out_what_the_ensemble_leaves_out():
    assert sffx.LinearProbe(cut()).blocks == ("block_0", "block_1", "block_2")
    assert sffx.LinearProbe(cut(objective=ForwardForward())).blocks == ("block_1", "block_2")
    assert set(sffx.LinearProbe(cut()).state_dict()) == {"linear.weight", "linear.bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": ["block_9"]}, "blocks names 'block_9'. Hint: the blocks are block_0, block_1"),
        ({"blocks": ["classifier"]}, "blocks names 'classifier'"),
        ({"blocks": []}, "blocks names no block"),
        ({"blocks": "block_1"}, "blocks is 'block_1', not a list"),
        ({"regions": 0}, "regions is 0. Hint: pass a positive integer"),
    ],
)
def test_what_cannot_be_probed(options, message):
    with pytest.raises(InputError, match=message):
        sffx.LinearProbe(cut(), **options)


def test_other_tasks_have_no_classes():
    with pytest.raises(InputError, match=r"not sffx\.tasks\.Regression"):
        sffx.LinearProbe(cut(task=sffx.tasks.Regression()))
