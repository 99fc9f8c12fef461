"""Heads by name. Those of a callable are tested in tests/scenarios/test_custom_goodness.py."""

import re
from dataclasses import replace

import pytest
import torch

import sffx
from sffx.blocks import Options
from sffx.errors import InputError
from sffx.learning.channelwise import CwCGoodness
from sffx.learning.convolution import SFFGoodness
from sffx.learning.cosine import CosineGoodness
from sffx.learning.heads import make_head, named_head
from sffx.learning.named_heads import EXAMPLES, FORMS, NUMBERS, parse_goodness
from sffx.learning.shared_output import SharedOutput
from sffx.tasks import Classification, MultiLabel, Regression, Segmentation, TokenClassification
from tests.toys import Residual, block_of

CLASSES = {
    "sff": SFFGoodness,
    "cwc": CwCGoodness,
    "cosine": CosineGoodness,
    "mlp": CosineGoodness,
    "auto": CosineGoodness,
}


@pytest.mark.parametrize("example", [name for name in EXAMPLES if name != "shared"])
def test_each_example_names_a_goodness(example):
    name, numbers = parse_goodness(example)
    assert len(numbers) == len(NUMBERS[name])
    head = make_head(Options(example), block_of(6, 4, 4), 5)
    assert type(head) is CLASSES[name]
    assert head(torch.zeros(2, 6, 4, 4)).shape == (2, 5)


def test_the_shared_output_layer_is_a_goodness_of_tokens_only():
    head = make_head(Options("shared"), block_of(9, 6, axis=2), 5, TokenClassification())
    assert type(head) is SharedOutput
    with pytest.raises(InputError, match=r"Hint: "):
        make_head(Options("shared"), block_of(9, 6, axis=2), 5)


def test_each_goodness_has_an_example():
    every = set().union(*FORMS.values())
    assert {parse_goodness(example)[0] for example in EXAMPLES} == every == set(NUMBERS)


@pytest.mark.parametrize(
    ("shape", "axis"), [((6,), 1), ((9, 6), 2), ((6, 4, 5), 1), ((4, 5, 6), 3)]
)
@pytest.mark.parametrize("goodness", ["sff", "cwc", "mlp"])
def test_heads_fit_the_layout_of_the_block(goodness, shape, axis):
    head = make_head(Options(goodness), block_of(*shape, axis=axis), 3)
    assert head(torch.zeros(2, *shape)).shape == (2, 3)


def size_of(block, num_classes=5, **options):
    """Return hidden units and regions of the head that "auto" gives a block."""
    head = make_head(Options("auto"), block, num_classes, **options)
    head = getattr(head, "goodness", head)
    return head.hidden.out_features, head.regions


def test_auto_takes_large_heads_where_they_cost_a_tenth_of_the_block():
    # 3 channels in 4 x 4 regions, 256 units, 5 classes.
    cost = 256 * (3 * 16 + 5)
    block = block_of(3, 8, 8)
    assert size_of(replace(block, macs=10 * cost)) == (256, 4)
    assert size_of(replace(block, macs=10 * cost - 1)) == (128, 2)
    # More classes cost more.
    assert size_of(replace(block, macs=10 * cost), num_classes=6) == (128, 2)


@pytest.mark.parametrize(
    ("shape", "axis", "regions"),
    [((3, 3, 9), 1, 3), ((2, 9, 3), 3, 2), ((3, 8, 8, 2), 1, 2), ((3,), 1, 4), ((9, 3), 2, 4)],
)
def test_auto_has_no_more_regions_than_places(shape, axis, regions):
    block = replace(block_of(*shape, axis=axis), macs=10**9)
    assert size_of(block) == (256, regions)


@pytest.mark.parametrize(
    ("task", "shape", "axis"),
    [
        (Classification(), (3, 8, 8), 1),
        (MultiLabel(), (3, 8, 8), 1),
        (Regression(), (3, 8, 8), 1),
        (Segmentation(), (3, 8, 8), 1),
        (TokenClassification(), (9, 3), 2),
    ],
)
def test_auto_is_a_named_head_of_two_sizes_for_each_task(task, shape, axis):
    regions = ", 4" if task.form in ("sample", "labels", "number") else ""
    for macs, name in ((10**9, f"mlp(256{regions})"), (1, "mlp")):
        block = replace(block_of(*shape, axis=axis), macs=macs)
        found = make_head(Options("auto"), block, 5, task)
        assert shapes_of(found) == shapes_of(named_head(name, block, 5, task=task))


def shapes_of(module):
    return {name: value.shape for name, value in module.state_dict().items()}


def test_a_named_head_is_a_part_of_one_of_your_own():
    def behind_a_convolution(block, num_classes):
        layer = torch.nn.Conv2d(block.channels, 7, 1)
        return torch.nn.Sequential(layer, named_head("mlp", block, num_classes, channels=7))

    net = sffx.transform(Residual(), goodness=behind_a_convolution)
    assert net.head_0[1].hidden.in_features == 7 * 4
    x = torch.randn(2, *net.plan.inputs[0].shape)
    assert net(x).shape == (len(net.plan) + 1, 2, net.plan.num_classes)


def test_a_named_head_is_that_of_transform():
    torch.manual_seed(0)
    expected = make_head(Options("mlp(64, 3)"), block_of(3, 8, 8), 5)
    torch.manual_seed(0)
    found = named_head("mlp(64, 3)", block_of(3, 8, 8), 5)
    assert type(found) is type(expected)
    assert all(map(torch.equal, found.parameters(), expected.parameters()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("shared", block_of(9, 6, axis=2), 5), "the head 'shared' reads the output layer"),
        (("mlp", block_of(3, 4, 4), 0), "num_outputs is 0"),
        (("softmax", block_of(3, 4, 4), 5), "there is no goodness 'softmax'"),
        ((None, block_of(3, 4, 4), 5), "there is no goodness None"),
    ],
)
def test_what_names_no_head_to_build_on(arguments, message):
    with pytest.raises(InputError, match=rf"{message}.*Hint: "):
        named_head(*arguments)
    with pytest.raises(InputError, match=r"channels is -1.*Hint: "):
        named_head("mlp", block_of(3, 4, 4), 5, channels=-1)


def head_named(goodness, block=None):
    return make_head(Options(goodness), block or block_of(3, 4, 4), 5)


def test_name_tells_the_number_of_regions():
    assert head_named("cosine").weight.shape == (5, 12)
    assert head_named("cosine(4)").weight.shape == (5, 48)
    assert head_named("mlp").hidden.weight.shape == (128, 12)
    assert head_named("mlp(64)").weight.shape == (5, 64)
    assert head_named("mlp(64, 3)").hidden.weight.shape == (64, 27)


@pytest.mark.parametrize(
    "name", ["cosine(0)", "cosine(2, 2)", "mlp(64, 0)", "mlp(64,)", "sff(3)", "softmax", None]
)
def test_names_that_are_none(name):
    with pytest.raises(InputError, match=f"there is no goodness {re.escape(repr(name))}"):
        head_named(name)


def test_a_cosine_needs_two_values():
    with pytest.raises(InputError, match=r"a cosine of 1 hidden unit has no direction\. Hint: "):
        head_named("mlp(1)")
    with pytest.raises(InputError, match="a cosine of 1 feature has no direction"):
        head_named("cosine", block_of(1))


@pytest.mark.parametrize("goodness", ["cosine", "mlp", "cwc"])
def test_what_belongs_to_a_convolution_is_refused(goodness):
    with pytest.raises(InputError, match=f"kernel_size is 3, but heads of '{goodness}'"):
        make_head(Options(goodness, kernel_size=3), block_of(8, 4, 4), 4)


def test_a_head_of_a_block_with_a_mask_takes_it():
    def make(block, num_classes):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(num_classes))

    block = replace(block_of(7, 6), mask="attention_mask")
    message = r"Sequential that takes no mask, but the input 'attention_mask' marks.*Hint"
    with pytest.raises(InputError, match=message):
        make_head(Options(make), block, 5)
    assert make_head(Options("sff"), block, 5) is not None
