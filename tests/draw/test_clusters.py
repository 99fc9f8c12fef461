"""The graph inside the blocks: Graphviz reads it; its edges are compared with written lists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sffx.blocks import BlockPlan, Node
from sffx.draw.clusters import detailed_graph
from tests.draw.drawn import drawn

Edge = tuple[str, str, str]


def parse(
    plan: BlockPlan, detail: str = "nodes", **options: Any
) -> tuple[dict[str, dict[str, Any]], list[Edge]]:
    """The nodes and clusters by name, and the visible edges, each as its class and its ends."""
    graph = drawn(detailed_graph(plan, detail, **options), "json")
    edges = [
        (edge["class"], edge["tail"], edge["head"])
        for edge in graph.edges
        if edge.get("style") != "invis"
    ]
    return {**graph.nodes, **graph.subgraphs}, sorted(edges)


def test_nodes_are_drawn_with_all_their_edges(residual: BlockPlan) -> None:
    nodes, edges = parse(residual)
    assert edges == [
        ("cut", "block_0/out_0", "block_1"),
        ("cut", "block_1/out_1", "classifier"),
        ("head", "block_0/out_0", "head_0"),
        ("head", "block_1/out_1", "head_1"),
        ("inner", "block_0", "block_0/out_0"),
        ("inner", "block_1", "block_1/add"),
        ("inner", "block_1", "block_1/conv1"),
        ("inner", "block_1/add", "block_1/out_1"),
        ("inner", "block_1/conv1", "block_1/relu"),
        ("inner", "block_1/conv2", "block_1/add"),
        ("inner", "block_1/conv2", "block_1/size"),
        ("inner", "block_1/relu", "block_1/conv2"),
        ("inner", "classifier", "classifier/classifier"),
        ("inner aside", "block_1/size", "block_1/out_1"),
        ("input", "input_x", "block_0"),
    ]
    assert nodes["block_1/add"]["class"] == "part join"
    assert nodes["block_1/size"]["class"] == "part aside"


def test_modules_are_drawn_with_edges_through_what_lies_between(residual: BlockPlan) -> None:
    _, edges = parse(residual, "modules")
    assert [edge[1:] for edge in edges if edge[0] == "inner" and "block_1" in edge[1]] == [
        ("block_1", "block_1/add"),
        ("block_1", "block_1/conv1"),
        ("block_1/add", "block_1/out_1"),
        ("block_1/conv1", "block_1/conv2"),
        ("block_1/conv2", "block_1/add"),
    ]


def test_a_side_value_is_an_edge_from_node_to_node(residual: BlockPlan) -> None:
    sides = replace(residual.blocks[1], sides=("size", "relu"), detached=("relu",))
    last = replace(
        residual.classifier, graph=(Node("classifier", "fc", True, ("out_1", "size", "relu")),)
    )
    _, edges = parse(replace(residual, blocks=(residual.blocks[0], sides), classifier=last))
    assert [edge for edge in edges if edge[0].startswith("side")] == [
        ("side", "block_1/size", "classifier/classifier"),
        ("side detached", "block_1/relu", "classifier/classifier"),
    ]


def test_of_a_run_the_first_block_is_drawn_and_its_output_is_that_of_the_last(
    chain: Callable[[int], BlockPlan],
) -> None:
    nodes, edges = parse(chain(5))
    assert [edge[1:] for edge in edges if edge[0] == "cut"] == [("block_0/out_0", "classifier")]
    assert "5 × layers.0 … layers.4" in nodes["block_0"]["label"]
    assert len([edge for edge in parse(chain(5), unfold=True)[1] if edge[0] == "cut"]) == 5


def test_of_a_node_that_reads_many_values_one_edge_is_drawn_and_the_tooltip_names_them(
    residual: BlockPlan,
) -> None:
    graph = (
        *(Node(f"conv{index}", f"layers.1.conv{index}", True, ("out_0",)) for index in range(9)),
    )
    reads = tuple(node.name for node in graph)
    wide = replace(
        residual.blocks[1],
        graph=(*graph, Node("out_1", "cat", False, reads, True, "cat", (1,) * 9)),
    )
    nodes, edges = parse(replace(residual, blocks=(residual.blocks[0], wide)))
    assert [edge[1] for edge in edges if edge[2] == "block_1/out_1"] == ["block_1/conv8"]
    assert nodes["block_1/out_1"]["label"] == "cat   (out_1) of 9"
    assert nodes["block_1/out_1"]["tooltip"].endswith(", ".join(reads))


def test_a_long_graph_goes_on_in_a_second_column(chain: Callable[[int], BlockPlan]) -> None:
    nodes, edges = parse(chain(30), unfold=True)
    assert {name for name in nodes if name.startswith("cluster_column")} == {
        "cluster_column_0",
        "cluster_column_1",
    }
    assert len([edge for edge in edges if edge[0] == "cut"]) == 30
    (turn,) = [edge[1:] for edge in edges if edge[0] == "cut turn"]
    before = int(turn[0].removeprefix("from_block_"))
    assert turn[1] == f"block_{before + 1}"
    assert ("cut", f"block_{before}/out_{before}", f"to_block_{before + 1}") in edges
    first, second = (
        [float(edge) for edge in nodes[f"cluster_column_{column}"]["bb"].split(",")]
        for column in (0, 1)
    )
    assert first[2] < second[0]


@pytest.mark.parametrize("name", ["a<b>&c", 'a "quoted" name', "back\\slash\\", "\\N", "]]>", ""])
def test_any_name_gives_the_same_edges(residual: BlockPlan, name: str) -> None:
    graph = tuple(replace(node, call=name) for node in residual.blocks[1].graph)
    odd = replace(
        residual,
        model=name,
        blocks=(residual.blocks[0], replace(residual.blocks[1], name=name, graph=graph)),
    )
    assert parse(odd)[1] == parse(residual)[1]
