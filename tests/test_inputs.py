"""What a user is told whose inputs are not like those that the model was cut for."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import sffx
from sffx.blocks import Input
from sffx.errors import InputError
from sffx.inputs import random_batch
from tests.toys import Chain, TwoInputs

Y = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            torch.zeros(2, 1, 8, 8),
            r"input is \(2, 1, 8, 8\) of float32, but .* for \(B, 3, 8, 8\) of float32.* "
            r"to have 3 channels",
        ),
        (
            torch.zeros(2, 3, 16, 16),
            r"input is \(2, 3, 16, 16\) of float32, but .* shapes cannot be multiplied .*\. Hint: ",
        ),
        (
            torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
            r"input is \(2, 3, 8, 8\) of uint8, but .* of float32\. In block_0 .*, torch says: ",
        ),
    ],
    ids=["channels", "size", "dtype"],
)
def test_an_input_unlike_the_example_is_named(x: torch.Tensor, message: str) -> None:
    net = sffx.transform(Chain(), example_input=torch.zeros(1, 3, 8, 8)).train()
    with pytest.raises(InputError, match=message) as raised:
        sffx.local_loss(net, x, Y)
    assert isinstance(raised.value.__cause__, RuntimeError)
    with pytest.raises(InputError, match=message):
        sffx.evaluate(net, [(x, Y)])


def test_of_several_inputs_the_one_that_differs_is_named() -> None:
    net = sffx.transform(TwoInputs(), example_input=(torch.zeros(1, 6), torch.zeros(1, 5))).train()
    with pytest.raises(
        InputError,
        match=(
            r"^text is \(2, 7\) of float32, but the model was cut for \(B, 5\) of float32\. "
            r"In block_0 \(image … text\), torch says"
        ),
    ):
        sffx.local_loss(net, {"image": torch.zeros(2, 6), "text": torch.zeros(2, 7)}, Y)


@pytest.mark.parametrize(
    "error",
    [NotImplementedError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 GB")],
)
def test_an_error_with_another_cause_stays_as_it_is(error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    net = sffx.transform(Chain(), example_input=torch.zeros(1, 3, 8, 8)).train()
    net.block_0.register_forward_pre_hook(fail)
    with pytest.raises(type(error), match=re.escape(str(error))):
        sffx.local_loss(net, torch.zeros(2, 3, 16, 16), Y)


def test_a_missing_batch_axis_is_told() -> None:
    net = sffx.transform(Chain(), example_input=torch.zeros(1, 3, 8, 8)).train()
    with pytest.raises(
        InputError,
        match=r"input is \(3, 8, 8\) of float32, but the model was cut for \(B, 3, 8, 8\)",
    ):
        sffx.local_loss(net, torch.zeros(3, 8, 8), torch.tensor([0, 1, 2]))


def test_what_fails_on_inputs_like_the_example_stays_torchs_error() -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no")

    net = sffx.transform(Chain(), example_input=torch.zeros(1, 3, 8, 8)).train()
    net.block_1.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match=r"^no$"):
        sffx.local_loss(net, torch.zeros(2, 3, 8, 8), Y)


@pytest.mark.parametrize(
    ("each", "values"),
    [
        (Input("ids", (50,), "int64", 3), {0, 1, 2}),
        (Input("ids", (50,), "int32", 1), {0}),
        (Input("mask", (50,), "bool"), {False, True}),
    ],
)
def test_random_whole_numbers_cover_the_valid_values(each: Input, values: set[int]) -> None:
    (example,) = random_batch((each,), 4)
    assert (example.shape, example.dtype) == ((4, 50), getattr(torch, each.dtype))
    assert set(example.flatten().tolist()) == values


@pytest.mark.parametrize(("ids", "held"), [([[0, 9]], "0 to 9"), ([[-1, 2]], "-1 to 2")])
def test_an_index_that_no_embedding_has_a_row_for_is_named(ids: list[list[int]], held: str) -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 4), nn.Linear(4, 3))
    net = sffx.transform(model, "layer", torch.zeros(1, 2, dtype=torch.long))
    message = f"input holds {held}, but the model takes 0 to 8"
    with pytest.raises(sffx.InputError, match=message):
        sffx.block_scores(net, torch.tensor(ids))
