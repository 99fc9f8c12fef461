"""The inside of a block: its parts, and its joins in words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sffx.blocks import BlockPlan, Node
from sffx.draw.detail import joins_in_words, parts
from sffx.draw.labels import block_label


def join(kind: str, *paths: int) -> Node:
    return Node("add", "add", False, (), True, kind, paths)


@pytest.mark.parametrize(
    ("joins", "text"),
    [
        ((), ""),
        ((join("other", 1, 1, 1),), ""),
        ((join("sum", 4, 0),), "+ shortcut"),
        ((join("sum", 2, 0), join("sum", 0, 3)), "+ shortcut ×2"),
        ((join("sum", 4, 2),), "+ shortcut through 2 layers"),
        ((join("sum", 1, 2),), "+ shortcut through a layer"),
        ((join("sum", 2, 2, 2),), "3 paths summed"),
        ((join("product", 0, 2), join("sum", 8, 0)), "× gate · + shortcut"),
        ((join("product", 1, 2),), "2 paths multiplied"),
        ((join("cat", 2, 4, 6, 2),), "4 paths joined (cat)"),
        (
            (join("cat", 0, 2), join("cat", 0, 2, 4), join("cat", 0, 2, 4, 6)),
            "2 to 4 paths joined (cat) ×3",
        ),
    ],
)
def test_joins_are_written_in_words(small: BlockPlan, joins: tuple[Node, ...], text: str) -> None:
    block = replace(small.blocks[0], graph=joins)
    assert joins_in_words(block) == text
    assert (f"inside: {text}" in block_label(block, ())) == bool(text)


def edges(plan: BlockPlan, detail: str) -> list[tuple[str, tuple[str, ...]]]:
    return [(part.node.name, part.node.reads) for part in parts(plan.blocks[1], detail)]


def test_all_nodes_have_all_that_they_read(residual: BlockPlan) -> None:
    assert edges(residual, "nodes") == [
        ("conv1", ("out_0",)),
        ("relu", ("conv1",)),
        ("conv2", ("relu",)),
        ("size", ("conv2",)),
        ("add", ("conv2", "out_0")),
        ("out_1", ("add", "size")),
    ]


@pytest.mark.parametrize(
    ("node", "text"),
    [
        (Node("conv1", "layers.1.conv1", True, ()), "conv1"),
        (Node("layers_1_conv1_1", "layers.1.conv1", True, ()), "layers_1_conv1_1"),
        (Node("layers_1_conv_a", "layers.1.Conv.A", True, ()), "layers_1_conv_a"),
        (Node("size", "view", False, ()), "view   (size)"),
        (Node("add_2", "iadd", False, (), True, "sum", (0, 1)), "+   (add_2)"),
    ],
)
def test_a_node_bears_its_name_unless_that_hides_what_it_calls(
    residual: BlockPlan, node: Node, text: str
) -> None:
    (part,) = parts(replace(residual.blocks[1], graph=(node,)), "nodes")
    assert part.text == text


def test_between_modules_and_joins_edges_are_drawn_through(residual: BlockPlan) -> None:
    # The size is no path, so it is no way from conv2 to the output.
    assert edges(residual, "modules") == [
        ("conv1", ("out_0",)),
        ("conv2", ("conv1",)),
        ("add", ("conv2", "out_0")),
        ("out_1", ("add",)),
    ]


def test_a_plan_without_nodes_gives_one_part_for_the_block(small: BlockPlan) -> None:
    assert edges(small, "modules") == edges(small, "nodes") == [("out_1", ("out_0",))]
