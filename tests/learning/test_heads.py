"""Heads by name. Those of a callable are tested in tests/scenarios/test_custom_goodness.py."""

import re
from dataclasses import replace

import pytest
import torch

from sffx.blocks import Options
from sffx.errors import InputError
from sffx.learning.channelwise import CwCGoodness
from sffx.learning.convolution import SFFGoodness
from sffx.learning.cosine import CosineGoodness
from sffx.learning.heads import EXAMPLES, FORMS, NUMBERS, make_head, parse_goodness
from sffx.learning.shared_output import SharedOutput
from sffx.tasks import TokenClassification
from tests.toys import block_of

CLASSES = {
    "sff": SFFGoodness,
    "cwc": CwCGoodness,
    "cosine": CosineGoodness,
    "mlp": CosineGoodness,
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
