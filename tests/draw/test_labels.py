"""What stands in the boxes, in the title and in the footer of a drawing."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from sffx.blocks import BlockPlan, Leaf
from sffx.draw.labels import block_label, edge_label, footer_label, title_label


def lines(label: str) -> list[str]:
    """The rows of a label as plain text, cells joined by a bar."""
    rows = re.findall(r"<TR>(.*?)</TR>", label)
    return [
        "|".join(re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<TD.*?</TD>", row))
        for row in rows
    ]


def test_a_box_holds_name_modules_shape_and_costs(resnet18: BlockPlan) -> None:
    assert lines(block_label(resnet18.blocks[3], ())) == [
        "layer2.0|block_3",
        "conv1 · bn1 · relu ×2 · conv2 · bn2 · downsample.0 · downsample.1",
        "128×28×28 · 230 k parameters · 180 M MACs · 3.06 MiB",
    ]


@pytest.mark.parametrize(
    ("name", "modules", "text"),
    [
        (
            "m",
            [f"m.conv{index}" for index in range(20)],
            "conv0 · conv1 · conv2 · conv3 · … 13 more … · conv17 · conv18 · conv19",
        ),
        (
            "m",
            ["m.ln", *(f"m.mlp.{index}" for index in range(8)), "m.drop", "m.drop"],
            "ln · mlp (8) · drop ×2",
        ),
        ("m", ["m.attn.flag", *(f"m.mlp.{index}" for index in range(8))], "attn.flag · mlp (8)"),
        ("m", ["m.0.0", "m.0.1", "m.1"], "0.0 · 0.1 · 1"),
        ("a.conv … a.pool", ["a.conv", "a.pool"], "conv · pool"),
        ("a.b … a.c.pool", ["a.b.conv", "a.b.relu", "a.c.pool"], "b.conv · b.relu · c.pool"),
        ("stem … body.0", ["stem", "body.0.conv"], "stem · body.0.conv"),
        ("m", ["m.conv", "elsewhere.table"], "conv · elsewhere.table"),
        ("m", ["m.x", "mm.x"], "x · mm.x"),
        ("add_7", [], ""),
        ("m", ["m"], ""),
        ("m", ["m", "m"], "m ×2"),
    ],
)
def test_modules_are_named_from_the_block_and_as_deep_as_there_is_room(
    small: BlockPlan, name: str, modules: list[str], text: str
) -> None:
    inside = lines(block_label(replace(small.blocks[0], name=name, modules=tuple(modules)), ()))[
        1:-1
    ]
    assert " · ".join(inside) == text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("conv1 … maxpool", "conv1 … maxpool"),
        ("bert.encoder.layer.0 … bert.encoder.layer.11", "bert.encoder.layer.0 … 11"),
        ("features.denseblock1 … features.transition1.relu", "…denseblock1 … …transition1.relu"),
        ("conv1 … model.encoder.layers.stage_with_a_name.7", "conv1 … …layers.stage_with_a_name.7"),
        ("model.encoder.layers.stage_with_a_name.7 … pool", "…layers.stage_with_a_name.7 … pool"),
    ],
)
def test_a_name_of_first_and_last_keeps_both_ends(small: BlockPlan, name: str, shown: str) -> None:
    assert lines(block_label(replace(small.blocks[0], name=name), ()))[0] == f"{shown}|block_0"


def test_a_block_that_is_a_single_leaf_repeats_no_name(small: BlockPlan) -> None:
    assert lines(block_label(replace(small.blocks[0], modules=("layers.0",)), ())) == [
        "layers.0|block_0",
        "8×4×4 · 72 parameters · 1.15 k MACs · 512 B",
    ]


def test_an_untraced_leaf_is_named_in_its_box(small: BlockPlan) -> None:
    leaf = Leaf("layers.0.conv", "Weird", "control flow", 0.25)
    assert lines(block_label(small.blocks[0], (leaf,)))[2] == "not traced: conv (Weird)"


def test_the_title_adds_up_the_blocks(resnet18: BlockPlan) -> None:
    heading, facts, _ = lines(title_label(resnet18))
    assert heading == "ResNet: 9 feature blocks and the classifier"
    assert facts == (
        "policy residual · 1000 classes · 1.81 G MACs · "
        "activations kept for one sample: 28.5 MiB in all, 9.95 MiB in the largest block"
    )


def test_the_footer_has_leaves_and_notes_and_explains_only_what_is_drawn(
    small: BlockPlan,
) -> None:
    noted = replace(
        small,
        leaves=(Leaf("layers.0.conv", "Weird", "needs <x>", 0.25),),
        notes=("First.", "Second " * 20),
    )
    rows = lines(footer_label(noted, {"detached"}))
    assert [row.partition("|")[0] for row in rows] == [
        "",
        "– – →",
        "–––→",
        "last box",
        "· · · →",
        "in a box",
        "not traced",
        "note",
        "note",
        " ",
    ]
    assert rows[6] == "not traced|layers.0.conv (Weird, 25% of the parameters): needs &lt;x&gt;"
    assert rows[7] == "note|First."


def test_an_edge_with_many_values_folds_them() -> None:
    assert lines(edge_label(["a", "b", "c", "d", "e"], "red")) == ["|a", "|b", "|c", "|… 2 more"]
