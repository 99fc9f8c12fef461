"""Operations that a step dispatches: how they are counted, and how many there may be."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

import sffx
from tests.toys import Chain
from tools.operations import Case, Operations, bytes_moved, counted_operations

# What a step by `local_loss` may dispatch, relative to backpropagation.
BARS = [
    (Case("resnet18", 32, 10, 128), 1.42),
    (Case("resnet18", 32, 10, 128, "mlp"), 1.88),
    (Case("resnet50", 224, 1000, 64), 1.55),
    (Case("mobilenet_v3_large", 224, 10, 64), 1.29),
]


@cache
def by_backpropagation(model: str, size: int, classes: int, batch: int) -> Operations:
    return Case(model, size, classes, batch, None).count()


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("case", "bar"), BARS, ids=str)
def test_a_step_dispatches_few_more_operations_than_backpropagation(case, bar):
    base = by_backpropagation(case.model, case.size, case.classes, case.batch)
    found = case.count()
    assert found.total <= bar * base.total
    assert not found.backward["norm"]
    # A layer norm is one operation. A loss and its gradient are three, two more are for all of
    # them, and two add them up.
    blocks = found.forward["norm"]
    assert found.forward["loss"] == 3 * (blocks + 1) + 2 + 2
    # The start of the backward pass, one scale for all gradients, one count for all batch norms.
    assert found.forward["gradients"] + found.backward["gradients"] == 3
    assert found.names["aten._foreach_add_.ScalarList"] == 1


def test_operations_and_bytes_by_hand():
    x = torch.ones(2, 3, requires_grad=True)
    w = torch.ones(3, 5)
    with counted_operations() as operations:
        y = x.view(2, 3) @ w
        y.sum().backward()
    # The product, the sum, the seed of ones; and the product of the backward pass, which reads an
    # expanded number. The views count as nothing.
    assert operations.names == {
        "aten.mm.default": 2,
        "aten.sum.default": 1,
        "aten.ones_like.default": 1,
    }
    assert operations.forward.total() == 3
    assert operations.backward.total() == 1
    forward = 4 * (6 + 15 + 10) + 4 * (10 + 1) + 4 * 1
    backward = 4 * (1 + 15 + 6)
    assert operations.moved == forward + backward


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "expected"),
    [
        ("add_.Tensor", ["x", "x"], {}, 4 * 3 * 6),
        ("mm.out", ["x", "w"], {"out": "y"}, 4 * (6 + 15 + 10)),
        ("empty_like.default", ["x"], {}, 0),
        ("zeros_like.default", ["x"], {}, 4 * 6),
        ("_foreach_mul_.Scalar", [["x", "w"], 2.0], {}, 4 * 2 * (6 + 15)),
    ],
)
def test_bytes_of_an_operation(name, args, kwargs, expected):
    tensors = {"x": torch.ones(2, 3), "w": torch.ones(3, 5), "y": torch.ones(2, 5)}

    def given(value):
        if isinstance(value, list):
            return [given(each) for each in value]
        return tensors.get(value, value) if isinstance(value, str) else value

    packet, overload = name.split(".")
    operation = getattr(getattr(torch.ops.aten, packet), overload)
    args = given(args)
    kwargs = {key: given(value) for key, value in kwargs.items()}
    result = operation(*args, **kwargs)
    assert bytes_moved(operation, args, kwargs, result) == expected


def test_each_operation_of_a_step_has_the_source_that_it_comes_from():
    torch.manual_seed(0)
    net = sffx.transform(Chain(), example_input=torch.zeros(1, 3, 8, 8))
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    net.train()
    with counted_operations() as found:
        sffx.local_loss(net, x, y).backward()
    assert found.total == found.forward.total() + found.backward.total()
    blocks = len(net.plan)
    assert found.forward["norm"] == blocks
    assert found.backward["norm"] == 0
    # A head alone has the same operations, forward and backward.
    alone = counted_head(net)
    assert (found.forward["head"], found.backward["head"]) == alone


def counted_head(net: nn.Module) -> tuple[int, int]:
    """Count the operations of all heads of a net, each on a value of its block's shape."""
    forward = backward = 0
    for i, block in enumerate(net.plan):
        y = torch.randn(4, *block.shape, requires_grad=True)
        head = net.get_submodule(f"head_{i}")
        with counted_operations() as found:
            goodness = head(y)
            torch.autograd.grad(goodness, [y, *head.parameters()], torch.ones(goodness.shape))
        forward += found.forward.total() - 1  # the ones
        backward += found.backward.total()
    return forward, backward


def test_backpropagation_is_counted_as_it_always_was():
    # The figures of torch 2.14: a change in torch shows here first.
    assert by_backpropagation("resnet18", 32, 10, 128).total == 183
