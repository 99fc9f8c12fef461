from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
from sffx.compiler.analyse import Analysis, analyse
from sffx.compiler.trace.trace import trace
from sffx.errors import CutError
from tests.toys import Chain, Residual, Rounding, SharedBias, SharedWeight, TwoBranches, TwoInputs


def analysed(model: nn.Module, *example: Tensor) -> Analysis:
    return analyse(trace(model, example or None))


@pytest.mark.parametrize(
    ("model", "example", "candidates"),
    [
        # _0 feeds the BN _1; _7 is the logits, and nothing with parameters comes after _5 but it.
        (Chain(), torch.zeros(1, 3, 8, 8), ["_1", "_2", "_3", "_4", "_5", "_6"]),
        (
            Residual(),
            torch.zeros(1, 3, 8, 8),
            ["stem_1", "stem_2", "add", "block1_relu_1", "add_1", "block2_relu_1", "mean", "drop"],
        ),
        (TwoBranches(), torch.zeros(1, 3, 8, 8), ["stem", "relu", "cat", "mean"]),
        (SharedWeight(), torch.zeros(1, 6), ["first", "relu", "shared_1", "relu_2"]),
        (Rounding(), torch.zeros(1, 6), ["before", "relu", "mul", "round_1", "after", "relu_1"]),
        (SharedBias(), torch.zeros(1, 6), ["first", "add", "relu", "second", "add_1", "relu_1"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_candidates(model, example, candidates):
    assert list(analysed(model, example).candidates) == candidates


def test_two_inputs_meet_before_the_first_candidate():
    assert analysed(TwoInputs(), torch.zeros(1, 6), torch.zeros(1, 5)).candidates == (
        "add",
        "relu",
        "joint",
        "relu_1",
    )


def test_paths_from_several_inputs_are_no_join_and_paths_from_one_input_are():
    class OneInput(TwoInputs):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x, x[:, 1:])

    assert analysed(TwoInputs(), torch.zeros(1, 6), torch.zeros(1, 5)).join("add") == ""
    assert analysed(OneInput(), torch.zeros(1, 6)).join("add") == "sum"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("stem_0", r"would part the BN layer stem\.1 from the layer that feeds it"),
        ("block1_conv1", "does not dominate the output"),
        ("head", "nothing after it has a parameter"),
        ("block1_relu", "does not dominate the output"),
        ("layer9", r"no node of this name"),
        ("block_1_relu_1", r"no node of this name\. Hint: did you mean 'block1_relu_1'"),
    ],
)
def test_a_node_that_is_no_candidate_says_why(name, reason):
    with pytest.raises(CutError, match=rf"no cut can lie after node '{name}': .*{reason}"):
        analysed(Residual()).require([name])


def test_a_shared_layer_is_never_parted():
    with pytest.raises(
        CutError, match=r"no cut can lie after node 'relu_1': shared is used on both sides of it"
    ):
        analysed(SharedWeight()).require(["relu_1"])


def test_cuts_come_in_the_order_of_the_spine_and_once():
    assert analysed(Residual()).require(["block2_relu_1", "stem_2", "stem_2"]) == (
        "stem_2",
        "block2_relu_1",
    )


class _Functional(nn.Module):
    """Everything is a function or a parameter; there are no layers."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.matrix = (
            nn.Parameter(torch.randn(4, 3, 3, 3)),
            nn.Parameter(torch.randn(5, 4)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.conv2d(x, self.kernel)).amax((2, 3)), self.matrix)


def test_functions_with_parameters_are_layers():
    analysis = analysed(_Functional(), torch.zeros(1, 3, 8, 8))
    assert analysis.candidates == ("conv2d", "relu", "amax")
    assert [step.weighted for step in analysis.steps] == [True, False, False, True]


class _WriteBehind(nn.Module):
    """Writes in place through an alias, and reads the written value by its old name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y.view(-1).mul_(2)
        return self.second(y)


def test_a_hidden_write_orders_the_graph():
    analysis = analysed(_WriteBehind())
    assert "mul_" in analysis.nodes
    assert ("mul_", "second") in analysis.graph.edges


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)).requires_grad_(False),
            "has no trainable parameters",
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(6, 4)), "has no node to cut at"),
        (nn.Sequential(nn.Flatten(), nn.Softmax(-1)), "does not depend on a parameter"),
    ],
)
def test_models_with_nothing_to_cut(model, message):
    with pytest.raises(CutError, match=message):
        analysed(model, torch.zeros(1, 6)).require([])


class _Layouts(nn.Module):
    """A convolution, then tokens, then channels last, then flat."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix, self.last, self.head = (
            nn.Conv2d(3, 8, 1),
            nn.Linear(8, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)  # (B, 8, 4, 4)
        x = F.relu(x.flatten(2))  # (B, 8, 16)
        x = x.transpose(1, 2)  # (B, 16, 8)
        x = self.mix(x)  # (B, 16, 6)
        x = self.last(x.unflatten(1, (4, 4)))  # (B, 4, 4, 6)
        return self.head(x.mean((1, 2)))


def test_the_channel_axis_is_followed_through_layouts():
    analysis = analysed(_Layouts(), torch.zeros(1, 3, 4, 4))
    axes = {name: analysis.channel_axes[name] for name in analysis.candidates}
    assert axes == {
        "conv": 1,
        "flatten": 1,
        "relu": 1,
        "transpose": 2,
        "mix": 2,
        "unflatten": 3,
        "last": 3,
        "mean": 1,
    }


def test_channels_as_many_as_positions_are_not_confused():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.ReLU(),
        nn.Flatten(2),
        nn.Linear(4, 4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    axes = analysed(model, torch.zeros(1, 3, 2, 2)).channel_axes
    assert (axes["_1"], axes["_2"], axes["_3"], axes["_4"]) == (1, 1, 2, 2)


class _PreActivation(nn.Module):
    """The stem feeds a BN and, past it, a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.conv, self.head = (
            nn.Conv2d(3, 4, 1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 1),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.conv(F.relu(self.norm(x)))).mean((2, 3)))


def test_bn_is_not_parted_from_its_layer_by_a_shortcut_or_by_dropout():
    assert analysed(_PreActivation(), torch.zeros(1, 3, 4, 4)).candidates == ("add", "mean")
    layers = (
        nn.Conv2d(3, 4, 1),
        nn.Dropout(),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    assert analysed(nn.Sequential(*layers), torch.zeros(1, 3, 4, 4)).candidates == (
        "_2",
        "_3",
        "_4",
    )


@pytest.mark.parametrize("shortcut_first", [True, False])
def test_a_layer_on_a_transposed_value_does_not_move_the_channels(shortcut_first):
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.tokens, self.head = nn.Linear(6, 8), nn.Linear(7, 7), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            mixed = self.tokens(h.transpose(1, 2)).transpose(1, 2)
            return self.head((h + mixed if shortcut_first else mixed + h).mean(1))

    assert analysed(Mixer(), torch.zeros(1, 7, 6)).channel_axes["add"] == 2


class _Positions(nn.Module):
    """Looks at its input's dtype and shape alone, without gradient, as rotary positions do."""

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        with torch.no_grad():
            # A batch size as a plain number makes the module a leaf.
            samples = operator.index(x.shape[0])
            return at.to(x.dtype)[None, :, None].expand(samples, -1, x.shape[2])


class _Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.positions = _Positions()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        positions = self.positions(x, torch.arange(x.shape[1]))
        x = F.relu(self.second(x) + positions)
        x = x * positions
        return self.head(x.mean(1))


def test_a_value_without_gradient_is_no_path_around_a_cut():
    analysis = analysed(_Rotary(), torch.zeros(1, 5, 6))
    assert analysis.candidates == ("first", "relu", "second", "add", "relu_1", "mul", "mean")
    assert (
        analysis.step_of["arange"] == analysis.step_of["positions"] == analysis.step_of["relu"]
    )  # read before the norm


class _LateMask(nn.Module):
    """Compares an early value with what a later layer says of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        early = F.relu(self.first(x))
        late = F.relu(self.second(early))
        mask = early > late.argmax(1, keepdim=True)
        return self.head(late * mask)


def test_a_mask_of_an_early_and_a_late_value_is_not_parted():
    # Behind a cut after `relu` its value is normalised, and before that cut there is no argmax.
    model, x = _LateMask(), torch.randn(5, 6)
    with pytest.raises(CutError, match="argmax is needed before it, but reads relu_1 behind it"):
        analysed(model, x).require(["relu"])
    net = sffx.transform(model, "layer", x, norm="none")
    assert net.plan.blocks[0].output == "mul"
    assert torch.equal(net(x)[-1], model(x))


class _Unbound(nn.Module):
    """Keys and values in one tensor, taken apart, as in attention over a reduced grid."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs, self.head = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        keys, values = self.pairs(x).unbind(1)
        return self.head((keys * values).mean(1))


def test_channel_axes_survive_a_stack_that_is_taken_apart():
    analysis = analyse(trace(_Unbound(), torch.zeros(1, 2, 5, 6)))
    assert analysis.channel_axes["mul"] == 2


class _RotaryBlocks(nn.Module):
    """Computes positions once, which its first block is the first to read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = (
            nn.Linear(6, 8),
            nn.ModuleList(_Turned() for _ in range(3)),
            nn.Linear(8, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(8, device=x.device).cos()
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, positions)
        return self.head(x)


class _Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.inner(x * positions)


def test_what_is_computed_once_does_not_widen_the_block_that_reads_it_first():
    analysis = analyse(trace(_RotaryBlocks()))
    assert [step.scope for step in analysis.steps if step.join] == [
        "blocks.0",
        "blocks.1",
        "blocks.2",
    ]


@pytest.mark.parametrize("shape", [(6, 4, 4), (4, 4), (4,)])
def test_a_layer_norm_over_several_axes_leaves_the_channels_where_they_were(shape):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.LayerNorm(shape),
        nn.ReLU(),
        nn.Conv2d(6, 6, 4),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    axis = 1 if len(shape) > 1 else 3
    assert analysed(model, torch.zeros(1, 3, 4, 4)).channel_axes["_1"] == axis


def test_tokens_as_many_as_channels_have_their_channels_last():
    model = nn.Sequential(
        nn.Linear(5, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 6), nn.Flatten(), nn.Linear(36, 3)
    )
    assert analysed(model, torch.zeros(1, 6, 5)).channel_axes["_1"] == 2
