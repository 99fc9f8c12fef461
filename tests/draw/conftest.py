"""Plans written by hand, so small that every node and edge of their drawing can be listed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from sffx.blocks import Block, BlockPlan, Input, Node

# ResNet-18 at 224 x 224: name, output shape, leaf modules, parameters, multiply-adds, and bytes
# kept for one sample.
BASIC = ("conv1", "bn1", "relu", "conv2", "bn2", "relu")
DOWN = (*BASIC, "downsample.0", "downsample.1")
RESNET18 = (
    ("conv1", (64, 56, 56), ("conv1", "bn1", "relu", "maxpool"), 9_536, 118_013_952, 10_437_632),
    ("layer1.0", (64, 56, 56), BASIC, 73_984, 231_211_008, 4_816_896),
    ("layer1.1", (64, 56, 56), BASIC, 73_984, 231_211_008, 4_816_896),
    ("layer2.0", (128, 28, 28), DOWN, 230_144, 179_830_784, 3_211_264),
    ("layer2.1", (128, 28, 28), BASIC, 295_424, 231_211_008, 2_408_448),
    ("layer3.0", (256, 14, 14), DOWN, 919_040, 179_830_784, 1_605_632),
    ("layer3.1", (256, 14, 14), BASIC, 1_180_672, 231_211_008, 1_204_224),
    ("layer4.0", (512, 7, 7), DOWN, 3_673_088, 179_830_784, 802_816),
    ("layer4.1", (512, 7, 7), BASIC, 4_720_640, 231_211_008, 602_112),
)


def block(target: str, name: str, inputs: tuple[str, ...], **fields: object) -> Block:
    """A block with plain values where none are given; its output is "out_3" for block_3."""
    output = target.replace("block", "out")
    plain = Block(
        name,
        target,
        (output,),
        output,
        (8, 4, 4),
        1,
        inputs,
        (),
        (),
        (f"{name}.conv",),
        (f"{name}.conv.weight",),
        72,
        1152,
        512,
    )
    return replace(plain, **fields)  # type: ignore[arg-type]


def chain(length: int) -> BlockPlan:
    """A plan of blocks one after the other, without side values."""
    reads = [("x",), *((f"out_{index}",) for index in range(length))]
    blocks = tuple(
        block(f"block_{index}", f"layers.{index}", reads[index]) for index in range(length)
    )
    classifier = block("classifier", "fc", reads[length], shape=(10,))
    return BlockPlan(
        "Chain", "residual", blocks, classifier, 10, (Input("x", (3, 8, 8), "float32"),), (), ()
    )


@pytest.fixture
def small() -> BlockPlan:
    """Two blocks and the classifier."""
    return chain(2)


@pytest.fixture
def skipping() -> BlockPlan:
    """Three blocks; the last reads a mask and a skip of the first; the skip carries a gradient."""
    plan = chain(3)
    first = replace(plan.blocks[0], sides=("mask", "skip"), detached=("skip",))
    last = replace(plan.blocks[2], inputs=("out_1", "mask", "skip"))
    return replace(plan, blocks=(first, plan.blocks[1], last))


@pytest.fixture
def resnet18() -> BlockPlan:
    """The nine blocks of a ResNet-18."""
    plan = chain(len(RESNET18))
    blocks = []
    for plain, (name, shape, modules, parameters, macs, kept) in zip(
        plan.blocks, RESNET18, strict=True
    ):
        inside = tuple(f"{name}.{module}" if name != "conv1" else module for module in modules)
        block = replace(plain, name=name, shape=shape, modules=inside)
        blocks.append(replace(block, num_parameters=parameters, macs=macs, activation_bytes=kept))
    return replace(plan, model="ResNet", blocks=tuple(blocks), num_classes=1000)


@pytest.fixture
def residual() -> BlockPlan:
    """A convolution, a residual block whose last node reads a size, and the classifier."""
    plan = chain(2)
    stem = replace(plan.blocks[0], graph=(Node("out_0", "layers.0", True, ("x",)),))
    graph = (
        Node("conv1", "layers.1.conv1", True, ("out_0",)),
        Node("relu", "relu", False, ("conv1",)),
        Node("conv2", "layers.1.conv2", True, ("relu",)),
        Node("size", "size", False, ("conv2",), is_path=False),
        Node("add", "iadd", False, ("conv2", "out_0"), True, "sum", (2, 0)),
        Node("out_1", "view", False, ("add", "size")),
    )
    block = replace(
        plan.blocks[1],
        graph=graph,
        nodes=tuple(node.name for node in graph),
        modules=("layers.1.conv1", "layers.1.conv2"),
    )
    classifier = replace(plan.classifier, graph=(Node("classifier", "fc", True, ("out_1",)),))
    return replace(plan, blocks=(stem, block), classifier=classifier)


@pytest.fixture(name="chain")
def chain_factory() -> Callable[[int], BlockPlan]:
    """A function that makes a chain of so many blocks."""
    return chain
