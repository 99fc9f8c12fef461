"""Which blocks become one, and how the folded picture shows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sffx.blocks import BlockPlan, Leaf, Node
from sffx.draw.fold import Run, fold
from sffx.draw.graph import FEW, block_graph

Chain = Callable[[int], BlockPlan]


def lengths(plan: BlockPlan) -> list[int]:
    return [len(block.blocks) if isinstance(block, Run) else 1 for block in fold(plan)]


def change(plan: BlockPlan, index: int, **fields: Any) -> BlockPlan:
    blocks = list(plan.blocks)
    blocks[index] = replace(blocks[index], **fields)
    return replace(plan, blocks=tuple(blocks))


def test_blocks_alike_become_a_run_with_the_figures_of_each(chain: Chain) -> None:
    (run,) = fold(chain(5)).blocks
    assert isinstance(run, Run)
    assert (run.name, run.target, run.output) == ("layers.0 … layers.4", "block_0", "out_4")
    assert (run.num_parameters, run.macs, run.activation_bytes) == (72, 1152, 512)
    assert run.blocks == chain(5).blocks


def test_two_alike_are_left_as_they_are(chain: Chain) -> None:
    assert lengths(chain(2)) == [1, 1]


@pytest.mark.parametrize(
    "other",
    [
        {"shape": (8, 2, 2)},
        {"num_parameters": 73},
        {"macs": 1},
        {"activation_bytes": 1},
        {"modules": ("layers.3.conv", "layers.3.bn")},
    ],
)
def test_a_block_that_differs_parts_the_run(chain: Chain, other: dict[str, Any]) -> None:
    assert lengths(change(chain(7), 3, **other)) == [3, 1, 3]


def test_a_block_whose_values_are_read_further_on_stays_visible(chain: Chain) -> None:
    assert lengths(change(chain(7), 3, sides=("mask",))) == [3, 1, 3]
    assert lengths(change(chain(7), 6, inputs=("out_5", "out_2"))) == [1, 1, 1, 3, 1]


def test_blocks_that_read_the_same_mask_are_alike(chain: Chain) -> None:
    plan = chain(4)
    for index in range(4):
        plan = change(plan, index, inputs=(*plan.blocks[index].inputs, "mask"))
    assert lengths(plan) == [4]
    assert lengths(change(plan, 0, inputs=("x",))) == [1, 3]


def prepared(plan: BlockPlan, by: int = 0) -> BlockPlan:
    """Return a chain whose block `by` makes a mask of an input, which all behind it read."""
    plan = change(plan, by, inputs=(*plan.blocks[by].inputs, "tokens"), sides=("mask",))
    for index in range(by + 1, len(plan)):
        plan = change(plan, index, inputs=(*plan.blocks[index].inputs, "mask"))
    return plan


def test_the_block_that_prepares_a_value_for_a_run_belongs_to_it(chain: Chain) -> None:
    assert lengths(prepared(chain(12))) == [12]
    assert lengths(prepared(chain(8), by=3)) == [3, 5]
    (run,) = fold(prepared(chain(4))).blocks
    assert run.inputs == ("x", "tokens")
    assert run.sides == ()


@pytest.mark.parametrize(
    "other",
    [
        {"macs": 1},
        {"shape": (8, 2, 2)},
        {"detached": ("mask",)},
        {"sides": ("mask", "skip")},
    ],
)
def test_a_block_that_prepares_and_differs_parts_the_run(
    chain: Chain, other: dict[str, Any]
) -> None:
    plan = change(prepared(chain(6)), 0, **other)
    if "skip" in other.get("sides", ()):
        plan = replace(plan, classifier=replace(plan.classifier, inputs=("out_5", "skip")))
    assert lengths(plan) == [1, 5]


def test_a_value_that_is_read_behind_the_run_stays_visible(chain: Chain) -> None:
    plan = prepared(chain(6))
    plan = replace(plan, classifier=replace(plan.classifier, inputs=("out_5", "mask")))
    assert lengths(plan) == [1, 5]


def test_a_block_with_another_shortcut_parts_the_run(chain: Chain) -> None:
    plain = tuple(
        Node(f"out_{index}", "iadd", False, (), True, "sum", (0, 2)) for index in range(7)
    )
    plan = replace(
        chain(7),
        blocks=tuple(
            replace(block, graph=(node,))
            for block, node in zip(chain(7).blocks, plain, strict=True)
        ),
    )
    assert lengths(plan) == [7]
    assert lengths(change(plan, 3, graph=(replace(plain[3], paths=(1, 2)),))) == [3, 1, 3]


def test_an_untraced_leaf_parts_the_run(chain: Chain) -> None:
    assert lengths(replace(chain(7), leaves=(Leaf("layers.3.conv", "Weird", "flow", 0.1),))) == [
        3,
        1,
        3,
    ]


def test_the_picture_of_a_deep_net_is_folded(chain: Chain) -> None:
    plan = chain(40)
    text = block_graph(plan).source
    assert "40 × layers.0 … layers.39" in text
    assert "block_0 … 39" in text
    assert "40 feature blocks" in text
    assert "same modules, shape and cost" in text
    assert "block_0 -> classifier " in text
    assert "40 × " not in block_graph(plan, unfold=True).source
    assert " × layers" not in block_graph(chain(FEW)).source
    assert "9 × layers.0 … layers.8" in block_graph(chain(FEW + 1)).source
