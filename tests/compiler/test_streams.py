"""Where streams run side by side: the cut sets that are found, and those that a user names."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
from sffx.errors import CutError
from sffx.learning.stream_heads import SideBySide, StreamHeads
from tests.stream_models import (
    AttentionUNet,
    CrossStage,
    Dense,
    EncoderDecoder,
    Fusion,
    HRNet,
    Nested,
    Pairs,
    Siamese,
    Spiking,
    Towers,
    TwoStreams,
    UNet,
    UnrolledCells,
    twice,
)
from tests.toys import Residual
from tools.tasks.networks import UNet as Interpolated

IMAGE = torch.zeros(1, 3, 16, 16)
VIDEO = (torch.zeros(1, 3, 4, 6, 6), torch.zeros(1, 2, 4, 6, 6))
ENCODER = ("enc1_5", "enc2_5", "enc3_5")


def names(plan: sffx.BlockPlan) -> list[str]:
    return [block.name for block in plan]


def cuts(plan: sffx.BlockPlan) -> list[object]:
    return [block.cut for block in plan]


def test_a_unet_has_a_block_for_each_stage():
    # The bottleneck has 46 % of the parameters, so each of its two layers is a block.
    stages = ["enc1", "enc2", "enc3", "mid.0 … mid.2", "mid.3 … mid.5", "up3", "up2", "up1"]
    plan = sffx.plan(UNet(), example_input=IMAGE)
    assert names(plan) == stages
    # Each skip connection is the output of its stage, and is normed once, there.
    assert all(not block.sides for block in plan)
    assert "enc1_5" in plan.blocks[-1].inputs


def test_a_skip_connection_that_is_gated_later_crosses_cuts():
    task = sffx.tasks.Segmentation()
    plan = sffx.plan(AttentionUNet(), example_input=IMAGE, task=task)
    mid = ["mid.0 … mid.2", "mid.3 … mid.5"]
    assert names(plan) == ["enc1", "enc2", *mid, "up2 … gate2", "dec2", "up1 … gate1", "dec1"]


class _Product(nn.Module):
    """Two nets for one image, and the product of what they see."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Sequential(twice(3, 4), twice(4, 4)) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.one(x) * self.two(x)).mean((2, 3)))


def test_a_product_of_streams_with_several_layers_is_no_gate():
    plan = sffx.plan(_Product(), example_input=IMAGE)
    assert names(plan) == ["one.0", "one.1", "two.0", "two.1"]


@pytest.mark.parametrize("policy", ["residual", "batchnorm", "layer", "module", "stages(4)"])
def test_a_block_ends_before_its_value_is_enlarged_for_the_next_one(policy):
    # A head behind the concatenation would read 12 channels of 256 pixels, not 8 of 64.
    plan = sffx.plan(Interpolated(3, width=4), policy, IMAGE, task=sffx.tasks.Segmentation())
    outputs = [block.output for block in plan]
    assert "decoder_1_5" in outputs
    assert "cat_1" not in outputs
    assert all(block.num_parameters for block in plan)


def test_the_streams_of_an_hrnet_are_cut_together():
    plan = sffx.plan(HRNet(), example_input=IMAGE)
    assert names(plan)[2:] == ["first.0 … stage2", "third … stage3.0", "stage3.1"]
    assert cuts(plan)[2:] == [
        ("relu", "relu_1"),
        ("relu_2", "relu_3", "relu_4"),
        ("relu_5", "relu_6", "relu_7"),
    ]
    last = plan.blocks[-1]
    assert [output.name for output in last.scored] == ["relu_7", "relu_5", "relu_6"]
    assert [output.shape for output in last.scored] == [(12, 4, 4), (4, 16, 16), (8, 8, 8)]


def test_each_of_two_branches_has_blocks_of_its_own():
    plan = sffx.plan(TwoStreams(), example_input=VIDEO)
    assert names(plan) == [f"{stream}.{i}" for stream in ("frames", "flow") for i in range(3)]
    # The pool of the first stream runs beside the second one, but has nothing to learn.
    third = plan.blocks[3]
    assert third.cut == ("mean", "flow_0_2")
    assert [output.name for output in third.scored] == ["flow_0_2"]


MEETINGS = {
    "a sum": sum,
    "a mean": lambda logits: torch.stack(logits).mean(0),
    "a product": lambda logits: logits[0] * logits[1].sigmoid() + logits[2],
    "the largest": lambda logits: torch.stack(logits, 1).amax(1),
}


@pytest.mark.parametrize("meeting", MEETINGS)
@pytest.mark.parametrize("inputs", [1, 3])
def test_nets_that_meet_at_the_logits_end_in_the_classifier(inputs, meeting):
    example = (IMAGE,) * inputs
    plan = sffx.plan(Towers(inputs, MEETINGS[meeting]), example_input=example)
    nets = [{module.split(".")[1] for module in block.modules} for block in plan]
    assert all(len(each) == 1 for each in nets)
    assert set.union(*nets) == {"0", "1", "2"}
    last = [name for name in plan.classifier.modules if name.endswith((".2", ".3", ".4", ".5"))]
    assert last == [f"nets.{net}.{layer}" for net in range(3) for layer in (2, 3, 4, 5)]


@pytest.mark.parametrize("policy", ["batchnorm", "layer", "stages(3)"])
def test_each_policy_leaves_the_last_layer_of_each_stream_to_the_classifier(policy):
    plan = sffx.plan(Towers(3, sum), policy, (IMAGE,) * 3)
    last = {f"nets.{net}.5" for net in range(3)}
    assert last.issubset(plan.classifier.modules)
    assert all(block.num_parameters for block in plan)


def test_streams_of_several_inputs_end_in_a_block_where_they_meet():
    plan = sffx.plan(Fusion(), example_input=(IMAGE, torch.zeros(1, 5)))
    assert cuts(plan)[-1] == "cat"
    assert plan.classifier.modules == ("fuse.0", "fuse.1", "fuse.2")


def token_ids(*lengths: int) -> tuple[Tensor, ...]:
    return tuple(torch.randint(0, 20, (3, length)) for length in lengths)


def test_each_layer_of_an_encoder_and_a_decoder_is_a_block():
    """The decoder reads the encoder's output in each layer, and shares its embedding."""
    model = EncoderDecoder()
    net = sffx.transform(model, example_input=token_ids(6, 5), check=False)
    layers = [f"encoder.layers.{i}" for i in range(3)] + [f"decoder.layers.{i}" for i in range(4)]
    found = [
        {layer for layer in layers if layer in " ".join(b.parameters)} for b in net.plan.blocks
    ]
    assert [names for names in found if names] == [{layer} for layer in layers]
    shared = [block.target for block in net.plan if "encoder.embedding.weight" in block.parameters]
    assert shared == ["block_0"]
    assert sffx.check(model, net, token_ids(6, 5), raises=False).difference is None


def test_an_encoder_with_other_tokens_than_the_targets_is_in_the_first_block():
    model = EncoderDecoder(per_token=True)
    task = sffx.tasks.TokenClassification()
    net = sffx.transform(model, example_input=token_ids(6, 5), task=task, check=False)
    assert net.plan.blocks[0].name.startswith("encoder")
    assert "encoder.layers.2.down.weight" in net.plan.blocks[0].parameters
    assert len(net.plan) == 4
    assert sffx.check(model, net, token_ids(6, 5), raises=False).difference is None


def test_two_streams_that_go_on_as_a_pair():
    plan = sffx.plan(Pairs(), example_input=torch.zeros(1, 6, 3))
    assert names(plan) == ["inp", "pairs.0", "pairs.1", "pairs.2"]


def test_a_siamese_net_is_cut_across_both_images():
    images = {"one": torch.zeros(3, 3, 16, 16), "two": torch.zeros(3, 3, 16, 16)}
    plan = sffx.plan(Siamese(), example_input=images)
    layers = ("encoder.0.0", "encoder.0.1", "encoder.0.2")
    assert plan.blocks[0].modules == 2 * layers
    assert [len(block.scored) for block in plan] == [2, 2, 2, 1]
    assert any("other random numbers" in note for note in plan.notes)


class _Compared(nn.Module):
    """Runs four layers on each of two rows, and compares the results."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)]
        self.net = nn.Sequential(*layers)
        self.head = nn.Linear(8, 2)

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        return self.head((self.net(one) - self.net(two)).abs())


def test_streams_that_share_layers_are_compared_by_one_head():
    torch.manual_seed(0)
    rows = (
        torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]),
        torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]),
    )
    x = {"one": rows[0], "two": rows[1]}
    y = (rows[0] == rows[1]).long()[:, 0]  # no row tells it alone
    net = sffx.transform(_Compared(), example_input=x, check=False)
    assert len(net.plan.blocks[0].scored) == 2
    optimizer = torch.optim.Adam(sffx.parameter_groups(net.train(), 0.02))
    for _ in range(100):
        sffx.local_step(net, x, y, optimizer)
    assert sffx.evaluate(net, [(x, y)]).accuracy["block_0"] == 1


def test_a_goodness_that_parts_channels_has_a_head_for_each_stream():
    images = {"one": torch.zeros(3, 3, 16, 16), "two": torch.zeros(3, 3, 16, 16)}
    for goodness, kind in (("mlp(4)", SideBySide), ("cwc", StreamHeads)):
        net = sffx.transform(Siamese(), example_input=images, goodness=goodness, check=False)
        assert isinstance(net.head_1, kind)


def test_streams_of_several_lengths_are_compared_at_the_largest():
    head = SideBySide(nn.Identity(), channel_axis=2)
    short, long = torch.tensor([[[0.0], [2.0]]]), torch.zeros(1, 4, 1)
    joined = head(short, long)
    assert torch.equal(joined[..., 0], torch.tensor([[0.0, 0.5, 1.5, 2.0]]))
    assert torch.equal(joined[..., 1:], long)


class _Twins(nn.Module):
    """Residual blocks on two images, of which the last one holds most of the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(_Bottle(width)) for width in (3, 6)))
        self.head = nn.Linear(12, 3)

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        return self.head((self.blocks(one) - self.blocks(two)).mean((2, 3)))


class _Bottle(nn.Module):
    """A residual block of three layers that doubles the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, 2 * width, 1)
        self.shortcut = nn.Conv2d(width, 2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.up(F.relu(self.down(x))) + self.shortcut(x))


def test_a_residual_block_that_several_streams_share_stays_whole():
    plan = sffx.plan(_Twins(), example_input=(IMAGE, IMAGE))
    assert names(plan) == ["blocks.0.0", "blocks.1.0"]


def test_a_spiking_net_is_cut_across_all_steps_in_time():
    plan = sffx.plan(Spiking(), example_input=torch.zeros(3, 6))
    assert names(plan) == ["layers.0", "layers.1", "layers.2"]
    assert [len(block.outputs) for block in plan] == [3, 3, 1]


def test_a_loop_over_all_layers_is_not_cut():
    plan = sffx.plan(Spiking(feeds_back=True), example_input=torch.zeros(3, 6))
    assert names(plan) == ["layers.0 … layers.2"]
    assert any("uses of layers.0" in note for note in plan.notes)


@pytest.mark.parametrize("cell", [nn.GRUCell, nn.LSTMCell])
def test_unrolled_cells_learn_through_time_and_not_through_the_cells_behind(cell):
    """More steps than values may cross a cut elsewhere. The oracle detaches by hand."""
    torch.manual_seed(0)
    x, y = torch.randn(3, 14, 6), torch.arange(3)
    model = UnrolledCells(cell)
    net = sffx.transform(model, example_input=x, norm="none")
    assert names(net.plan) == ["cells.0", "cells.1"]
    assert [len(block.outputs) for block in net.plan] == [14, 1]
    assert [len(block.scored) for block in net.plan] == [1, 1]  # the last state holds the others
    sffx.local_loss(net, x, y).backward()

    expected = copy.deepcopy(model)
    values = list(x.unbind(1))
    for i, each in enumerate(expected.cells):
        state, given, values = None, values, []
        for value in given:
            state = each(value, state)
            values.append(state[0] if cell is nn.LSTMCell else state)
        head = net.get_submodule(f"head_{i}")
        F.cross_entropy(head(values[-1]), y).backward()
        values = [value.detach() for value in values]
    F.cross_entropy(expected.head(values[-1]), y).backward()
    learnt = {name.partition(".")[2]: each.grad for name, each in net.named_parameters()}
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(learnt[name], parameter.grad)


@pytest.mark.parametrize("make", [Siamese, Spiking])
def test_streams_that_share_layers_compute_what_the_model_computes(make):
    shapes = [(3, 3, 16, 16)] * 2 if make is Siamese else [(3, 6)]
    example = tuple(torch.randn(shape) for shape in shapes)
    model = make()
    net = sffx.transform(model, example_input=example, check=False)
    report = sffx.check(model, net, example, raises=False)
    assert report.difference is None
    assert "train mode, 4 samples" in report.errors


def test_a_large_stage_of_residual_blocks_is_cut_inside():
    model = nn.Sequential(
        *(CrossStage(3, 4), CrossStage(4, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(16, 4),
    )
    plan = sffx.plan(model, example_input=IMAGE)
    total = sum(p.numel() for p in model.parameters())
    assert names(plan)[0] == "0"
    assert names(plan)[-1] == "1.out"
    largest = max(p.numel() for p in model[1].out.parameters())
    assert all(block.num_parameters <= max(total / 3, largest + 16) for block in plan.all_blocks)


@pytest.mark.parametrize("width", [8, 64])
def test_a_large_dense_block_is_cut_before_its_transition(width):
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))
    model = nn.Sequential(Dense(3, 2, 4), Dense(4, 16, width), *head)
    plan = sffx.plan(model, example_input=IMAGE)
    assert names(plan) == ["0", "1.layers.0 … 1.layers.1", "1.transition"]
    assert sffx.check(model, sffx.transform(model, example_input=IMAGE, check=False), IMAGE)


def test_a_stream_that_is_folded_into_the_batch_is_cut_as_well():
    example = torch.randn(3, 5, 3, 2)
    model = Nested()
    net = sffx.transform(model, example_input=example, check=False)
    assert names(net.plan)[1:3] == ["first … units.0", "units.1"]
    third = net.plan.blocks[2]
    assert [output.is_folded for output in third.outputs] == [False, True]
    # The head of the third block reads sentences, so only the first one reads instances.
    assert [output.name for output in third.scored] == [third.output]
    assert any(note.startswith("block_0 read instances") for note in net.plan.notes)
    assert sffx.check(model, net, example, raises=False).difference is None


def test_single_values_are_preferred():
    plan = sffx.plan(Residual(), example_input=torch.zeros(1, 3, 8, 8))
    assert all(not block.beside for block in plan)


def test_values_that_cross_an_earlier_cut_may_be_left_out():
    expected = sffx.plan(UNet(), [("enc1_5",), ENCODER[:2], ENCODER], IMAGE)
    assert cuts(sffx.plan(UNet(), list(ENCODER), IMAGE)) == cuts(expected)
    assert cuts(sffx.plan(UNet(), [*reversed(ENCODER)], IMAGE)) == list(ENCODER)


def test_one_cut_across_several_values():
    plan = sffx.plan(UNet(), [ENCODER], IMAGE)
    (block,) = plan.blocks
    assert block.cut == ENCODER
    assert block.output == "enc3_5"
    # The skip connections lead to the output, so the head reads that alone.
    assert [output.name for output in block.scored] == ["enc3_5"]
    assert "crosses the cut after block_0, normed: enc1_5, enc2_5" in str(plan)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            ["enc2_5"],
            r"passes it by. Hint: a cut across all values there is \('enc1_5', 'enc2_5'\)",
        ),
        ([("enc2_5", "enc3_5")], "other values cross it as well"),
        ([("enc1_0", "enc1_5")], "nothing after it reads enc1_0"),
        ([("enc1_5", "nowhere")], "the traced graph has no node of this name"),
        ([("enc1_5", "enc2_0")], "it would part the BN layer enc2.1"),
        ([("enc1_5", "enc2_5", "x")], "does not dominate the output"),
    ],
)
def test_what_is_refused(policy, message):
    with pytest.raises(CutError, match=message):
        sffx.plan(UNet(), policy, IMAGE)


@pytest.mark.parametrize("make", [UNet, HRNet])
def test_a_record_of_the_cuts_cuts_the_same(make):
    plan = sffx.plan(make(), example_input=IMAGE)
    again = sffx.plan(make(), plan.record()["after"], IMAGE)
    assert [block.nodes for block in again.all_blocks] == [block.nodes for block in plan.all_blocks]


@pytest.mark.parametrize("policy", ["stages(3)", "batchnorm", "memory(1 MiB, 4)"])
def test_other_policies_cut_between_streams(policy):
    plan = sffx.plan(HRNet(), policy, IMAGE)
    assert any(len(block.outputs) > 1 for block in plan)


def test_heads_and_norms_are_made_for_each_stream():
    seen: list[tuple[str, tuple[int, ...]]] = []
    normed: list[str] = []

    def head(block: sffx.Block, num_classes: int) -> nn.Module:
        seen.append((block.output, block.shape))
        layers = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(block.channels, num_classes)]
        return nn.Sequential(*layers)

    def norm(block: sffx.Block) -> nn.Module:
        normed.append(block.output)
        return nn.GroupNorm(1, block.channels, affine=False)

    last = ("relu_5", "relu_6", "relu_7")
    net = sffx.transform(HRNet(), [last], IMAGE, goodness=head, norm=norm)
    assert seen == [("relu_7", (12, 4, 4)), ("relu_5", (4, 16, 16)), ("relu_6", (8, 8, 8))]
    assert normed == ["relu_7", "relu_5", "relu_6"]
    assert isinstance(net.head_0, StreamHeads)
    assert {"norm_0", "norm_0_1", "norm_0_2"} <= {name for name, _ in net.named_children()}


class _Scaled(nn.Module):
    """Returns the real tokens' sum of two values, times a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.factor * (y if mask is None else y * mask[:, :, None]).sum(1)


def test_the_goodness_of_several_streams_is_their_mean():
    heads = StreamHeads([_Scaled(1.0), _Scaled(3.0)], [False, True])
    y, other = torch.ones(2, 5, 3), torch.ones(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    # 5 tokens and 3 times the 2 or 1 real ones.
    expected = torch.tensor([[(5 + 6) / 2] * 3, [(5 + 3) / 2] * 3])
    assert torch.equal(heads(y, other, mask), expected)


def test_scores_of_pixels_are_brought_to_the_largest_stream():
    heads = StreamHeads([nn.Identity(), nn.Identity()], [False, False])
    small, large = torch.full((2, 3, 2, 2), 4.0), torch.zeros(2, 3, 4, 6)
    assert torch.equal(heads(small, large), torch.full((2, 3, 4, 6), 2.0))


class _Parallel(nn.Module):
    """Four rows of two layers side by side, as in an ASPP."""

    def __init__(self) -> None:
        super().__init__()
        row = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
        self.rows = nn.ModuleList(nn.Sequential(*copy.deepcopy(row)) for _ in range(4))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([row(x) for row in self.rows], 1).mean((2, 3)))


def test_modules_of_a_list_have_names_of_their_own():
    assert names(sffx.plan(_Parallel(), example_input=IMAGE)) == [f"rows.{i}" for i in range(4)]


class _Pyramid(nn.Module):
    """A decoder as in UPerNet: one row of layers, then single ones that hold most of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.lateral = nn.Conv2d(4, 8, 1)
        self.row = twice(4, 4)
        self.mix, self.smooth, self.fuse = (
            nn.Conv2d(width, 8, 3, padding=1) for width in (8, 8, 16)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        low = F.relu(self.low(x))
        high = F.relu(self.high(low))
        lateral = self.lateral(low)
        top = F.relu(self.mix(torch.cat([high, self.row(high)], 1)))
        smooth = F.relu(self.smooth(lateral + top))
        fused = F.relu(self.fuse(torch.cat([smooth, top], 1)))
        return self.head(fused.mean((2, 3)))


class _Laterals(_Pyramid):
    """An encoder with a residual block, and then single layers for each scale, as in an FPN."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = twice(3, 8), twice(8, 8)
        self.tops, self.lateral = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.smooth, self.fuse = twice(4, 8), twice(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(x)
        high = self.high(low)
        top = self.tops(high)
        both = self.smooth(self.lateral(low) + top) + self.fuse(top)
        return self.head(both.mean((2, 3)))


def test_a_single_layer_goes_with_the_larger_part_behind_it():
    # Across the laterals fewer bytes would go.
    plan = sffx.plan(_Laterals(), example_input=IMAGE)
    assert plan.blocks[1].name == "high"


def test_single_layers_behind_the_last_row_of_layers_are_blocks():
    plan = sffx.plan(_Pyramid(), example_input=IMAGE)
    assert names(plan)[-3:] == ["mix", "smooth", "fuse"]


class _Gated(nn.Module):
    """Four layers of a WaveNet: a gated convolution, a stream of skips beside the residual one."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.head = nn.Conv1d(3, 8, 1), nn.Linear(8, 4)
        for name in ("filters", "gates", "skips", "shortcuts"):
            layers = [nn.Conv1d(8, 8, 3, padding=1) for _ in range(4)]
            setattr(self, name, nn.ModuleList(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        total = torch.zeros(())
        for i in range(4):
            value = self.filters[i](x).tanh() * self.gates[i](x).sigmoid()
            total = total + self.skips[i](value)
            x = x + self.shortcuts[i](value)
        return self.head((total + x).mean(2))


def test_a_gate_stays_with_what_it_gates():
    plan = sffx.plan(_Gated(), example_input=torch.zeros(1, 3, 12))
    assert len(plan) > 4
    for block in plan.all_blocks:
        gates = [name for name in block.modules if name.startswith("gates")]
        filters = [name for name in block.modules if name.startswith("filters")]
        assert len(gates) == len(filters)


class _Experts(nn.Module):
    """A mixture of all experts, by a gate for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        layers = [nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(4)]
        self.experts = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x).softmax(-1)
        terms = [gates[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts)]
        return sum(terms[1:], terms[0])


class _AddedByTheModel(nn.Module):
    """Adds each of its units to the unit's input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.units = nn.ModuleList(_Experts() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for unit in self.units:
            x = x + unit(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize("policy", ["residual", "layer"])
def test_experts_of_a_unit_that_the_model_adds_to_its_input_are_not_parted(policy):
    plan = sffx.plan(_AddedByTheModel(), policy, torch.zeros(2, 6, 5))
    assert [block.name for block in plan] == ["embed", "units.0", "units.1"]
    assert not any(block.sides for block in plan)


class _Conditioned(nn.Module):
    """Residual blocks that a second input conditions; each takes its part out of a tuple, late."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.films = nn.Conv2d(3, 4, 1), nn.Linear(6, 12)
        self.blocks = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        films = torch.chunk(self.films(condition), 3, 1)
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            shift = films[i][:, :, None, None]
            x = x + (block(x) + shift).relu()
        return self.head(x.mean((2, 3)))


CONDITIONED = (torch.zeros(2, 3, 8, 8), torch.zeros(2, 6))


def test_a_tuple_crosses_no_cut_but_the_values_that_are_taken_out_of_it_do():
    plan = sffx.plan(_Conditioned(), example_input=CONDITIONED)
    assert names(plan) == ["films", "stem", "blocks.0", "blocks.1", "blocks.2"]
    assert len(plan.blocks[0].outputs) == 3
    # Behind it a part is beside the main value.
    assert all(block.shape == (4, 8, 8) for block in plan.blocks[1:])


def test_the_error_of_a_cut_beside_a_tuple_names_a_cut_that_can_be_made():
    _, _, block, *_ = sffx.plan(_Conditioned(), example_input=CONDITIONED)
    *_, output = block.cut
    with pytest.raises(CutError, match="a cut across all values there is") as error:
        sffx.plan(_Conditioned(), [output], CONDITIONED)
    named = str(error.value).partition("there is (")[2].partition(")")[0]
    cut = tuple(name.strip(" '") for name in named.split(","))
    assert len(sffx.plan(_Conditioned(), [cut], CONDITIONED)) == 1


def test_blocks_that_take_values_out_of_a_tuple_compute_what_the_model_computes():
    model = _Conditioned()
    sffx.check(model, sffx.transform(model, example_input=CONDITIONED, check=False))
