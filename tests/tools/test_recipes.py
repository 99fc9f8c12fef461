"""The recipes beside `mlp`, each against its formula, written by hand on the plain layers."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tools.reproduce.data import Images, split
from tools.reproduce.experiments import EXPERIMENTS
from tools.reproduce.methods import METHODS
from tools.reproduce.recipe_heads import GroupedHead, supervised_contrast
from tools.reproduce.recipes import clustered, group_counts, heads_of
from tools.reproduce.render import gains
from tools.reproduce.search import candidates

CLASSES = 3
BLOCKS = 4


def plain_model() -> nn.Module:
    """Four blocks of conv, BN and ReLU; the first one changes the shape of its input."""
    torch.manual_seed(0)
    layers = []
    for before in (3, 6, 6, 6):
        convolution = nn.Conv2d(before, 6, 3, padding=1)
        layers.append(nn.Sequential(convolution, nn.BatchNorm2d(6), nn.ReLU()))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 36, CLASSES))
    return model.double()


class Case:
    """A plain model, the same cut by a method, and a batch."""

    def __init__(self, name: str, strength: float | None = None) -> None:
        self.method = METHODS[name].at(strength)
        self.model = plain_model().train()
        example = torch.zeros(1, 3, 6, 6, dtype=torch.float64)
        self.net = self.method.prepare(self.model, "batchnorm", example).train()
        assert len(self.net.plan) == BLOCKS
        self.x = torch.randn(6, 3, 6, 6, dtype=torch.float64)
        self.y = torch.tensor([0, 1, 2, 0, 1, 2])

    def head(self, i: int) -> nn.Module:
        return self.net.get_submodule(f"head_{i}")

    def run(self, cut=lambda i: True):
        """Yield the input and the output of each plain block, and at last the logits."""
        h = self.x
        for i in range(BLOCKS):
            y = self.model[i](h)
            yield h, y
            h = F.layer_norm(y.detach() if cut(i) else y, y.shape[1:])
        yield h, self.model[-1](h.flatten(1))

    def require_gradients_of(self, loss: torch.Tensor) -> None:
        """Check the net's gradients against those of a loss on the plain model."""
        self.net.zero_grad()
        self.method.loss(self.net, self.x, self.y).backward()
        expected = torch.autograd.grad(loss, list(self.model.parameters()))
        targets = [*(f"block_{i}" for i in range(BLOCKS)), "classifier"]
        found = [p for target in targets for p in self.net.get_submodule(target).parameters()]
        for parameter, gradient in zip(found, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-7, atol=1e-10)


def test_transport_adds_how_far_blocks_move_what_they_read():
    case = Case("mlp, transport", strength=0.3)
    *blocks, (_, logits) = case.run()
    loss = F.cross_entropy(logits, case.y)
    for i, (x, y) in enumerate(blocks):
        loss = loss + F.cross_entropy(case.head(i).head(y), case.y)
        if i > 0:
            loss = loss + (y - x).square().mean() / (2 * 0.3)
    case.require_gradients_of(loss)
    assert case.net.eval()(case.x).shape == (6, CLASSES)


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_alternating_cuts_let_pairs_of_blocks_learn_together(strength):
    case = Case("mlp, alternating cuts", strength)
    for ends in ((1, 3, 4), (0, 2, 4), (1, 3, 4)):
        *blocks, (_, logits) = case.run(cut=lambda i, ends=ends: i in ends)
        loss = F.cross_entropy(logits, case.y)
        for i, (_, y) in enumerate(blocks):
            weight = 1.0 if i in ends else strength
            loss = loss + weight * F.cross_entropy(case.head(i)(y), case.y)
        case.require_gradients_of(loss)


def test_a_head_of_groups_learns_the_summed_probability_of_the_label_s_group():
    head = GroupedHead(nn.Identity(), 4)
    logits = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(head(logits), logits)  # each class is its own group
    head.group_of.copy_(torch.tensor([1, 1, 2, 1]))
    p = logits.softmax(1)
    together = p[:, [0, 1, 3]].sum(1)
    expected = torch.stack([together / 3, together / 3, p[:, 2], together / 3], dim=1)
    torch.testing.assert_close(head(logits).softmax(1), expected)


def test_groups_become_classes_with_depth():
    assert group_counts(4, 10, 1.0) == [2, 4, 8, 10]
    assert group_counts(4, 10, 0.5) == [4, 10, 10, 10]
    assert group_counts(9, 10, 1.0) == [2, 2, 4, 4, 4, 8, 8, 8, 10]
    assert group_counts(4, 100, 1.0) == [4, 16, 32, 100]


def test_classes_that_lie_close_are_a_group_after_the_first_epoch():
    means = torch.tensor([[0.0, 0.0], [9.0, 9.0], [0.1, 0.0], [9.0, 8.9]])
    groups = clustered(means, 2)
    assert groups[0] == groups[2] != groups[1] == groups[3]
    assert len(clustered(means, 4).unique()) == 4

    case = Case("mlp, coarse to fine", strength=1.0)
    case.net.float()
    images = Images(torch.randint(0, 255, (30, 3, 6, 6), dtype=torch.uint8), torch.arange(30) % 3)
    data = split(images, images, None, 0)
    heads = heads_of(case.net, GroupedHead)
    case.method.begin_epoch(case.net, 0, 5, data)
    assert [len(head.group_of.unique()) for head in heads.values()] == [3, 3, 3, 3]
    case.method.begin_epoch(case.net, 1, 5, data)
    assert [len(head.group_of.unique()) for head in heads.values()] == [2, 2, 3, 3]


def test_a_momentum_head_is_behind_a_slow_copy_of_the_next_layer():
    case = Case("mlp, momentum auxiliary", strength=0.9)
    first = case.model[1][0].weight.detach().clone()
    second = torch.randn_like(first)
    with torch.no_grad():
        case.model[1][0].weight.copy_(second)
        case.net.block_1.get_submodule("1.0").weight.copy_(second)
        case.head(0).bias.fill_(0.25)
    *blocks, (_, logits) = case.run()
    loss = F.cross_entropy(logits, case.y)
    for i, (_, y) in enumerate(blocks):
        hidden, head = y, case.head(i)
        if i < BLOCKS - 1:
            weight = 0.9 * first + 0.1 * second if i == 0 else case.model[i + 1][0].weight.detach()
            bias = case.model[i + 1][0].bias.detach()
            normed = F.layer_norm(y, y.shape[1:])
            hidden = F.conv2d(normed, weight, bias, padding=1) + (0.25 if i == 0 else 0)
            hidden, head = hidden.relu(), head.head
        loss = loss + F.cross_entropy(head(hidden), case.y)
    case.require_gradients_of(loss)
    assert case.head(0).layer.weight.grad is None
    torch.testing.assert_close(case.head(0).layer.weight, 0.9 * first + 0.1 * second)


def test_copied_layers_stand_before_a_head_and_learn_with_it():
    case = Case("mlp, copied layers", strength=2)
    *blocks, (_, logits) = case.run()
    loss = F.cross_entropy(logits, case.y)
    for i, (_, y) in enumerate(blocks):
        hidden = y
        # At the start, the copies have the weights of the model's own layers.
        for later in range(i + 1, min(i + 3, BLOCKS)):
            convolution = case.model[later][0]
            normed = F.layer_norm(hidden, hidden.shape[1:])
            weight, bias = convolution.weight.detach(), convolution.bias.detach()
            convolved = F.conv2d(normed, weight, bias, padding=1)
            hidden = F.batch_norm(convolved, None, None, training=True).relu()
        head = case.head(i) if i == BLOCKS - 1 else case.head(i).head
        loss = loss + F.cross_entropy(head(hidden), case.y)
    case.require_gradients_of(loss)
    assert all(p.grad is not None for p in case.head(0).parameters())


def test_contrast_of_samples_by_hand():
    z = torch.randn(5, 4, dtype=torch.float64)
    y = torch.tensor([0, 1, 0, 0, 2])
    terms = []
    for n in range(5):
        others = [a for a in range(5) if a != n]
        positives = [p for p in others if y[p] == y[n]]
        if not positives:
            continue
        whole = sum(math.exp(z[n] @ z[a]) for a in others)
        logs = [math.log(math.exp(z[n] @ z[p]) / whole) for p in positives]
        terms.append(-sum(logs) / len(logs))
    assert len(terms) == 3
    assert float(supervised_contrast(z, y)) == pytest.approx(sum(terms) / 3)


def test_blocks_learn_classes_and_the_contrast_of_their_features():
    case = Case("mlp, contrast", strength=0.3)
    case.method.begin_epoch(case.net, 4, 5, None)
    *blocks, (_, logits) = case.run()
    loss = F.cross_entropy(logits, case.y)
    for i, (_, y) in enumerate(blocks):
        head = case.head(i)
        features = F.batch_norm(head.projection(y.mean((2, 3))), None, None, training=True)
        unit = features / features.norm(dim=1, keepdim=True)
        contrast = supervised_contrast(unit / math.sqrt(0.1), case.y)
        loss = loss + F.cross_entropy(head.head(y), case.y) + 0.3 * contrast
    case.require_gradients_of(loss)


def test_blocks_learn_what_the_ensemble_says_as_well():
    case = Case("mlp, distillation", strength=0.5)
    case.model.eval()
    goodness = [case.head(i)(y) for i, (_, y) in enumerate(case.run()) if i < BLOCKS]
    teacher = torch.stack(goodness).mean(0).softmax(1).detach()
    case.model.train()
    loss = 0.0
    for i, (_, y) in enumerate(case.run()):
        scores = case.head(i)(y) if i < BLOCKS else y
        divergence = (teacher * (teacher.log() - scores.log_softmax(1))).sum(1).mean()
        loss = loss + F.cross_entropy(scores, case.y) + 0.5 * divergence
    case.require_gradients_of(loss)


def test_each_block_learns_what_the_blocks_before_it_leave_wrong():
    case = Case("mlp, boosting", strength=0.5)
    loss, before = 0.0, torch.zeros(())
    for i, (_, y) in enumerate(case.run()):
        if i == BLOCKS:
            loss = loss + F.cross_entropy(y, case.y)
            break
        goodness = case.head(i)(y)
        loss = loss + F.cross_entropy(goodness + 0.5 * before, case.y)
        before = before + goodness.detach()
    case.require_gradients_of(loss)


def test_early_blocks_keep_what_restores_the_image_and_late_ones_learn_the_classes():
    case = Case("mlp, reconstruction", strength=5.0)
    images = Images(torch.randint(0, 255, (30, 3, 6, 6), dtype=torch.uint8), torch.arange(30) % 3)
    data = split(images, images, None, 0)
    case.method.begin_epoch(case.net, 0, 5, data)
    image = images.x[:6].double()
    mean, std = data.mean.double(), data.std.double()
    case.x = (image - mean[:, None, None]) / std[:, None, None]
    *blocks, (_, logits) = case.run()
    loss = F.cross_entropy(logits, case.y)
    for i, (_, y) in enumerate(blocks):
        head = case.head(i)
        rise = i / (BLOCKS - 1)
        decoded = head.decoder(y).sigmoid()
        pixels = F.binary_cross_entropy(decoded, image / 255)
        loss = loss + rise * F.cross_entropy(head.head(y), case.y) + 5 * (1 - rise) * pixels
    case.require_gradients_of(loss)
    # The head of the first block learns the classes too, and the block does not.
    own = torch.autograd.grad(
        F.cross_entropy(case.head(0).head(blocks[0][1].detach()), case.y),
        list(case.head(0).head.parameters()),
    )
    for parameter, gradient in zip(case.head(0).head.parameters(), own, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-7, atol=1e-10)
    assert case.net.eval()(case.x).shape == (6, CLASSES)


def test_a_strength_is_one_more_value_of_the_same_number_of_trials():
    tried = candidates(4, (0.3, 3.0))
    assert [(each["lr"], each["strength"]) for each in tried] == [
        (1e-3, 0.3),
        (1e-3, 3.0),
        (3e-3, 0.3),
        (3e-3, 3.0),
    ]
    assert [{**each, "strength": 1} for each in candidates(3)] == candidates(3, (1,))


def test_recipes_are_run_as_the_heads_are():
    for name in ("cifar10-cnnb", "digits-resnet18"):
        own, heads = EXPERIMENTS[f"recipes-{name}"], EXPERIMENTS[f"heads-{name}"]
        assert replace(own, methods=()) == replace(heads, methods=())
        recipes = [METHODS[each] for each in own.methods if METHODS[each].addition is not None]
        assert len(recipes) == (8 if name == "cifar10-cnnb" else 9)
        assert all(recipe.strengths[0] == recipe.addition.strength for recipe in recipes)


def test_gains_are_differences_of_equal_seeds_and_ratios_of_costs():
    def runs(*accuracies):
        return [{"seed": i, "test": {"ensemble": each}} for i, each in enumerate(accuracies)]

    methods = {"mlp": runs(0.5, 0.6), "better": runs(0.53, 0.61, 0.9), "unknown": runs(0.4)}
    costs = {"mlp": {"peak": 0.5, "time": 2.0}, "better": {"peak": 1.0, "time": 3.0}}
    bp = {"BP": [{"seed": 0, "test": {"classifier": 0.7}}]}
    table = gains({**bp, **methods}, costs)
    *_, better, unknown = table.splitlines()
    assert "BP" not in table
    assert better == "| better | 2.00 ± 1.41 | 2 | 2.00 | 1.50 |"
    assert unknown == "| unknown | -10.00 | 1 | – | – |"
