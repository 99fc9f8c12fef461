"""The graph of a plan: Graphviz reads it; its nodes and edges are compared with written lists."""

from __future__ import annotations

import itertools
import sys
import xml.etree.ElementTree as xml
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import sffx
from sffx.blocks import BlockPlan, Input, Leaf, Options
from sffx.draw.graph import ROWS, block_graph
from sffx.draw.render import render
from sffx.errors import MissingExtra
from sffx.tasks import LanguageModel, Regression, Task
from tests.draw.drawn import DrawnNumber, drawn, need_graphviz
from tests.stream_models import HRNet

Chain = Callable[[int], BlockPlan]


def parse(plan: BlockPlan, unfold: bool = False) -> DrawnNumber:
    return drawn(block_graph(plan, unfold=unfold))


def reading(plan: BlockPlan, index: int, *names: str) -> BlockPlan:
    """The plan, with one block that reads more values."""
    blocks = list(plan.blocks)
    blocks[index] = replace(blocks[index], inputs=(*blocks[index].inputs, *names))
    return replace(plan, blocks=tuple(blocks))


def giving(plan: BlockPlan, index: int, *names: str) -> BlockPlan:
    """The plan, with one block that computes side values."""
    blocks = list(plan.blocks)
    blocks[index] = replace(blocks[index], sides=names)
    return replace(plan, blocks=tuple(blocks))


def test_a_chain_is_its_blocks_heads_and_cuts(small: BlockPlan) -> None:
    graph = parse(small)
    assert set(graph.nodes) == {"input_x", "block_0", "block_1", "head_0", "head_1", "classifier"}
    assert graph.ends("cut") == [("block_0", "block_1"), ("block_1", "classifier")]
    assert graph.ends("head") == [("block_0", "head_0"), ("block_1", "head_1")]
    assert graph.ends("input") == [("input_x", "block_0")]
    assert len(graph.edges) == 5


def test_every_cut_is_red_dashed_and_labelled(resnet18: BlockPlan) -> None:
    cuts = [edge for edge in parse(resnet18).edges if edge["class"] == "cut"]
    assert len(cuts) == 9
    assert {(cut["color"], cut["style"]) for cut in cuts} == {("#c0392b", "dashed")}
    assert all("detach · layer norm" in cut["label"] for cut in cuts)


@pytest.mark.parametrize(
    ("options", "cut", "legend", "head"),
    [
        (Options(norm="none"), "detach", "the output is detached; no gradient", "10 classes"),
        (Options(norm="batch"), "detach · batch norm", "detached and batch-normed", "10 classes"),
        (Options(norm="other"), "detach · other norm", "detached and normed (other)", "10 classes"),
        (
            Options(kernel_size=3),
            "detach · layer norm",
            "goodness (SFF, kernels of 3)",
            "3×3 kernels",
        ),
        (
            Options(goodness="cosine(4)"),
            "detach · layer norm",
            "goodness (cosine: a direction for each class, 4 x 4 regions)",
            "cosine",
        ),
        (
            Options(goodness="mlp"),
            "detach · layer norm",
            "goodness (cosine after a hidden layer of 128 units)",
            "hidden",
        ),
        (
            Options(goodness="cwc", kernel_size=3),
            "detach · layer norm",
            "goodness (CwC: groups of channels, no parameters)",
            "CwC, no",
        ),
    ],
)
def test_cuts_and_heads_are_called_what_they_are(
    small: BlockPlan, options: Options, cut: str, legend: str, head: str
) -> None:
    graph = parse(replace(small, options=options))
    labels = [edge["label"] for edge in graph.edges if edge["class"] == "cut"]
    assert all(f">{cut}<" in label for label in labels)
    assert legend in graph.attributes["label"]
    assert head in graph.nodes["head_0"]["label"]
    assert ("kernels" in graph.nodes["head_0"]["label"]) == (head == "3×3 kernels")


@pytest.mark.parametrize(
    ("task", "goodness", "legend", "head"),
    [
        (LanguageModel(), "shared", "the model's output layer behind an adapter", "output layer"),
        (Regression(), "sff", "linear readout", "linear readout"),
        (
            Regression(),
            "mlp(64)",
            "linear readout after a hidden layer of 64 units",
            "linear readout",
        ),
        (Regression(), "auto", "linear readout after a hidden layer, sized", "linear readout"),
    ],
)
def test_heads_of_other_tasks_are_called_what_they_are(
    small: BlockPlan, task: Task, goodness: str, legend: str, head: str
) -> None:
    graph = parse(replace(small, task=task, options=Options(goodness=goodness)))
    assert f"goodness ({legend}" in graph.attributes["label"]
    assert head in graph.nodes["head_0"]["label"]
    assert "cosine" not in graph.nodes["head_0"]["label"]


def test_the_classifier_has_no_head_and_its_own_look(resnet18: BlockPlan) -> None:
    nodes = parse(resnet18).nodes
    assert sum(name.startswith("head_") for name in nodes) == 9
    assert nodes["classifier"]["fillcolor"] != nodes["block_0"]["fillcolor"]
    assert all("1000 classes" in nodes[f"head_{index}"]["label"] for index in range(9))


def test_a_side_value_is_an_edge_that_bears_its_name(skipping: BlockPlan) -> None:
    graph = parse(skipping)
    mask, skip = graph.one("side"), graph.one("side detached")
    assert (mask["tail"], mask["head"]) == (skip["tail"], skip["head"]) == ("block_0", "block_2")
    assert ">mask<" in mask["label"]
    assert ">skip (detached)<" in skip["label"]
    assert (mask.get("style", ""), skip["style"]) == ("", "dotted")


def test_values_that_run_the_same_way_share_an_edge(chain: Chain) -> None:
    side = parse(reading(giving(chain(3), 0, "cos", "sin"), 2, "cos", "sin")).one("side")
    assert ">cos<" in side["label"]
    assert ">sin<" in side["label"]


def test_a_side_value_that_nobody_reads_is_not_drawn(small: BlockPlan) -> None:
    assert parse(giving(small, 0, "mask")).ends() == parse(small).ends()


def test_an_output_that_a_block_further_on_reads_is_a_detached_side_value(chain: Chain) -> None:
    assert parse(reading(chain(3), 2, "out_0")).ends("side detached") == [("block_0", "block_2")]


def test_a_value_with_many_readers_runs_along_a_rail_with_a_stop_at_each(chain: Chain) -> None:
    plan = giving(chain(5), 0, "mask")
    for index in (1, 2, 4):
        plan = reading(plan, index, "mask")
    graph = parse(plan)
    assert graph.ends("side") == []
    at_blocks = {(f"stop_{index}", f"block_{index}") for index in (0, 1, 2, 4)}
    assert set(graph.ends("rail")) == at_blocks | {
        ("stop_0", "stop_1"),
        ("stop_1", "stop_2"),
        ("stop_2", "stop_4"),
    }
    ways = {
        edge["tail"]: edge["dir"]
        for edge in graph.edges
        if (edge["tail"], edge["head"]) in at_blocks
    }
    assert ways == {"stop_0": "back", "stop_1": "forward", "stop_2": "forward", "stop_4": "forward"}
    labels = {name: node["label"] for name, node in graph.nodes.items() if name.startswith("stop_")}
    assert {name for name, label in labels.items() if ">mask<" in label} == {
        "stop_1",
        "stop_2",
        "stop_4",
    }
    assert {name for name, label in labels.items() if ">+ mask<" in label} == {"stop_0"}


def test_a_stop_names_only_what_its_block_reads(chain: Chain) -> None:
    plan = giving(chain(5), 0, "mask", "table")
    for name, readers in (("mask", (1, 2, 3)), ("table", (2, 3, 4))):
        for index in readers:
            plan = reading(plan, index, name)
    labels = {
        name: node["label"] for name, node in parse(plan).nodes.items() if name.startswith("stop_")
    }
    assert {name: (">mask<" in label, ">table<" in label) for name, label in labels.items()} == {
        "stop_0": (False, False),
        "stop_1": (True, False),
        "stop_2": (True, True),
        "stop_3": (True, True),
        "stop_4": (False, True),
    }


def test_many_values_into_one_block_take_the_rail_as_well(chain: Chain) -> None:
    plan = chain(4)
    for index in range(3):
        plan = giving(plan, index, f"size_{index}")
    plan = reading(plan, 3, "size_0", "size_1", "size_2")
    graph = parse(plan)
    assert graph.ends("side") == []
    assert graph.ends("input") == [("input_x", "block_0")]
    assert all(f">size_{index}<" in graph.nodes["stop_3"]["label"] for index in range(3))


def test_an_input_that_every_block_reads_gets_on_the_rail_at_the_first(chain: Chain) -> None:
    plan = replace(
        chain(3), inputs=(Input("x", (3, 8, 8), "float32"), Input("mask", (8,), "int64", 2))
    )
    for index in range(3):
        plan = reading(plan, index, "mask")
    assert parse(plan).ends("input") == [("input_mask", "stop_0"), ("input_x", "block_0")]


def test_an_input_that_a_later_block_reads_is_drawn_to_it(chain: Chain) -> None:
    plan = replace(
        reading(chain(3), 2, "mask"),
        inputs=(Input("x", (3, 8, 8), "float32"), Input("mask", (8,), "int64", 2)),
    )
    assert parse(plan).ends("input") == [("input_mask", "block_2"), ("input_x", "block_0")]


class ReadsInput(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(input).relu())


def test_an_input_is_found_under_the_name_that_fx_gives_a_builtin() -> None:
    plan = sffx.plan(ReadsInput(), "layer", torch.zeros(2, 4))
    assert plan.inputs[0].name == "input"
    assert parse(plan).ends("input") == [("input_input", "block_0")]


def test_a_value_from_nowhere_is_drawn_all_the_same(chain: Chain) -> None:
    graph = parse(reading(chain(2), 1, "table"))
    assert set(graph.nodes) - set(parse(chain(2)).nodes) == {"value_table"}
    assert ("value_table", "block_1") in graph.ends()


def test_an_untraced_leaf_marks_the_block_that_calls_it(small: BlockPlan) -> None:
    graph = parse(replace(small, leaves=(Leaf("layers.1.conv", "Weird", "control flow", 0.5),)))
    assert (graph.nodes["block_0"]["class"], graph.nodes["block_1"]["class"]) == (
        "block",
        "block untraced",
    )
    assert "not traced: conv (Weird)" in graph.nodes["block_1"]["label"]
    assert "layers.1.conv (Weird, 50% of the parameters): control flow" in graph.attributes["label"]


def test_a_leaf_marks_no_block_whose_name_only_begins_alike(small: BlockPlan) -> None:
    assert (
        parse(replace(small, leaves=(Leaf("layers.1.co", "Weird", "flow", 0.5),))).nodes["block_1"][
            "class"
        ]
        == "block"
    )


def test_notes_stand_at_the_bottom(small: BlockPlan) -> None:
    assert (
        "Two &lt;blocks&gt; share a table."
        in parse(replace(small, notes=("Two <blocks> share a table.",))).attributes["label"]
    )


@pytest.mark.parametrize(
    "name",
    [
        "a<b>&c",
        'a "quoted" name',
        "back\\slash\\",
        "\\N\\G",
        "ünï·cödé",
        "tab\tand\nline",
        "]]>",
        "<!--",
        "",
    ],
)
def test_any_name_gives_a_graph_with_the_same_nodes(small: BlockPlan, name: str) -> None:
    first = replace(small.blocks[0], name=name, modules=(f"{name}.{name}", name), sides=(name,))
    odd = replace(
        small,
        model=name,
        policy=name,
        blocks=(first, small.blocks[1]),
        notes=(name,),
        leaves=(Leaf(name, name, name, 0.1),),
    )
    assert set(parse(odd).nodes) == set(parse(small).nodes)


def test_names_reach_the_picture_as_they_are(small: BlockPlan) -> None:
    need_graphviz()
    name = r"a<b>&c\N 'd' \\"
    odd = replace(small, blocks=(replace(small.blocks[0], name=name), small.blocks[1]))
    picture = xml.fromstring(render(block_graph(odd), "svg"))
    assert name in [element.text for element in picture.iter() if element.tag.endswith("}text")]


def test_a_shortened_name_keeps_its_end_and_its_full_form_in_the_tooltip(small: BlockPlan) -> None:
    name = "model.encoder.transformer.layers.stage_with_a_long_name.17"
    node = parse(
        replace(small, blocks=(replace(small.blocks[0], name=name), small.blocks[1]))
    ).nodes["block_0"]
    assert ">…layers.stage_with_a_long_name.17<" in node["label"]
    assert node["tooltip"] == name


def test_a_tall_plan_is_set_in_columns_of_equal_height(chain: Chain) -> None:
    # With the classifier these are one more than fit into two columns.
    graph = parse(chain(2 * ROWS), unfold=True)
    rows = graph.rows()
    assert ["block_0", "block_10", "block_20"] in rows
    assert ["block_8", "block_18", "classifier"] in rows
    assert ["block_9", "block_19"] in rows
    assert graph.ends("cut turn") == [("from_block_19", "block_20"), ("from_block_9", "block_10")]
    assert {("block_9", "to_block_10"), ("block_19", "to_block_20")} <= set(graph.ends("cut"))
    assert parse(chain(ROWS - 1), unfold=True).ends("cut turn") == []


@pytest.mark.parametrize("inputs", [1, 2])
def test_columns_stand_from_left_to_right(chain: Chain, inputs: int) -> None:
    plan = chain(5 * ROWS)
    more = [Input(f"x{index}", (3, 8, 8), "float32") for index in range(1, inputs)]
    plan = replace(plan, inputs=(*plan.inputs, *more))
    nodes = drawn(block_graph(plan, unfold=True), "json").nodes
    places = [nodes[f"block_{index}"]["pos"].split(",") for index in range(5 * ROWS)]
    left = [float(x) for x, _ in places]
    columns = list(dict.fromkeys(left))
    assert len(columns) == 6
    assert columns == sorted(columns)
    assert left == sorted(left)


@pytest.mark.parametrize("length", [1, 9, 17, 50])
def test_plans_of_every_length_have_all_their_edges(chain: Chain, length: int) -> None:
    graph = parse(chain(length), unfold=True)
    names = [*(f"block_{index}" for index in range(length)), "classifier"]
    cuts = sorted(itertools.pairwise(names))
    assert [(tail, head.removeprefix("to_")) for tail, head in graph.ends("cut")] == cuts
    turns = [(tail.removeprefix("from_"), head) for tail, head in graph.ends("cut turn")]
    assert turns == [(tail, head[3:]) for tail, head in graph.ends("cut") if head[:3] == "to_"]
    assert len(turns) == length // ROWS
    shown = [edge for edge in graph.edges if edge.get("style") != "invis"]
    assert len(shown) == 2 * length + 1 + len(turns)
    boxes = [node for node in graph.nodes.values() if node.get("style") != "invis"]
    assert len(boxes) == 2 * length + 2 + 2 * len(turns)


def test_a_missing_package_is_named(small: BlockPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "graphviz", None)
    with pytest.raises(MissingExtra, match=r"'graphviz'.*sffx\[viz\]"):
        block_graph(small)


def test_values_of_several_streams_are_normed_and_scored_together() -> None:
    plan = sffx.plan(HRNet(), [("relu", "relu_1")], torch.zeros(1, 3, 16, 16))
    graph = parse(plan)
    assert ">relu (detached, normed)<" in graph.one("side detached")["label"]
    assert ">of 2 streams<" in graph.nodes["head_0"]["label"]
