"""The golden lists: where each policy cuts, checked by eye against the models' sources."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from itertools import combinations, pairwise

import pytest
import torch
import torchvision
from torch import Tensor, nn

import sffx
from sffx.blocks import Options
from sffx.compiler.analyse import Analysis, analyse
from sffx.compiler.batch_first import add_batch_first_views
from sffx.compiler.partition import partition
from sffx.compiler.policies import NO_RESIDUAL_BLOCK, Cuts, select
from sffx.compiler.trace.trace import trace
from sffx.errors import CutError, InputError
from sffx.policies import AnyPolicy, policy_named
from tests import written_norms
from tests.stream_models import Sum, residual
from tests.toys import Chain, Residual, SharedWeight

STEM = "conv1 … maxpool"


def names(plan: sffx.BlockPlan) -> list[str]:
    return [block.name for block in plan]


@cache
def torchvision_analysis(name: str) -> Analysis:
    """Return the analysis of a model without weights. To trace it takes longer than to cut it."""
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(**options)
    traced = trace(model)
    add_batch_first_views(traced)
    return analyse(traced)


def torchvision_plan(name: str, policy: AnyPolicy = "residual") -> sffx.BlockPlan:
    """Return what `sffx.plan` does, without tracing the model again."""
    analysis, options = torchvision_analysis(name), Options()
    written, choose = policy_named(policy)
    return partition(analysis, select(analysis, choose, options), options, policy=written)


def nested(template: str, first: int, sizes: list[int]) -> list[str]:
    """Return the names of numbered modules in numbered stages.

    Args:
        template: of a name, with the numbers of the stage and of the module.
        first: the number of the first stage.
        sizes: how many modules each stage holds; they count from 0.
    """
    names = []
    for stage, size in enumerate(sizes, start=first):
        names += [template.format(stage, module) for module in range(size)]
    return names


# name: the blocks, and why. Written down from the models' sources, not from the output.
GOLDEN = {
    # Stem, then each BasicBlock with the ReLU behind its sum.
    "resnet18": [STEM, *nested("layer{}.{}", 1, [2, 2, 2, 2])],
    "resnet50": [STEM, *nested("layer{}.{}", 1, [3, 4, 6, 3])],
    # Stem, each InvertedResidual, the last convolution. A strided one is a block as well, though it
    # has no shortcut.
    "mobilenet_v3_small": [f"features.{i}" for i in range(13)],
    "mobilenet_v3_large": [f"features.{i}" for i in range(17)],
    # Stem, 16 MBConv, last convolution.
    "efficientnet_b0": [
        "features.0",
        *nested("features.{}.{}", 1, [1, 2, 2, 3, 3, 4, 1]),
        "features.8",
    ],
    # Patch embedding with class token and position, 12 encoder blocks. The norm after them has no
    # layer to train and is the classifier's.
    "vit_b_16": [
        "conv_proj … encoder.dropout",
        *(f"encoder.layers.encoder_layer_{i}" for i in range(12)),
    ],
    # Stem, 18 CNBlocks, and the three downsampling layers between the stages, which have weights of
    # their own as a stem has.
    "convnext_tiny": [
        "features.0",
        *(f"features.1.{i}" for i in range(3)),
        "features.2",
        *(f"features.3.{i}" for i in range(3)),
        "features.4",
        *(f"features.5.{i}" for i in range(9)),
        "features.6",
        *(f"features.7.{i}" for i in range(3)),
    ],
    # Patch embedding, 12 transformer blocks, three patch mergings.
    "swin_t": [
        "features.0",
        *(f"features.1.{i}" for i in range(2)),
        "features.2",
        *(f"features.3.{i}" for i in range(2)),
        "features.4",
        *(f"features.5.{i}" for i in range(6)),
        "features.6",
        *(f"features.7.{i}" for i in range(2)),
    ],
    # Inside a dense block every layer reads all earlier ones, so it is one block. The BN behind it
    # belongs to the layer that feeds it. The convolution and the pool of a transition lie between
    # dense blocks and have weights.
    "densenet121": [
        "features.conv0 … features.pool0",
        "features.denseblock1 … features.transition1.relu",
        "features.transition1.conv … features.transition1.pool",
        "features.denseblock2 … features.transition2.relu",
        "features.transition2.conv … features.transition2.pool",
        "features.denseblock3 … features.transition3.relu",
        "features.transition3.conv … features.transition3.pool",
        "features.denseblock4 … features.norm5",
    ],
    # Inception modules join parallel convolutions by concatenation; the convolutions before them
    # are the stem. A pool between modules opens the next block. The auxiliary classifiers are no
    # part of the logits.
    "googlenet": [
        "conv1 … maxpool2",
        "inception3a",
        "inception3b",
        "maxpool3 … inception4a",
        "inception4b",
        "inception4c",
        "inception4d",
        "inception4e",
        "maxpool4 … inception5a",
        "inception5b",
    ],
    "inception_v3": [
        "Conv2d_1a_3x3 … maxpool2",
        *(
            f"Mixed_{name}"
            for name in ["5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"]
        ),
    ],
    # No joins, so BN groups: a convolution with BN, ReLU and, where one follows, the pool.
    "vgg11_bn": [
        "features.0 … features.3",
        "features.4 … features.7",
        "features.8 … features.10",
        "features.11 … features.14",
        "features.15 … features.17",
        "features.18 … features.21",
        "features.22 … features.24",
        "features.25 … features.28",
        # The linear layers hold most of the parameters.
        "avgpool … classifier.1",
        "classifier.2 … classifier.4",
    ],
    # Fire modules join two convolutions by concatenation. The last convolution is the classifier:
    # it has a channel for each class.
    "squeezenet1_0": [
        "features.0 … features.2",
        "features.3",
        "features.4",
        "features.5",
        "features.6 … features.7",
        "features.8",
        "features.9",
        "features.10",
        "features.11 … features.12",
    ],
    # Stem, 16 units with the channel shuffle that ends each, last convolution.
    "shufflenet_v2_x1_0": [STEM, *nested("stage{}.{}", 2, [4, 8, 4]), "conv5"],
    # Stem, and in each of the 11 layers the convolution (MBConv), the window attention and the grid
    # attention, each with sums of its own. The stem's second convolution feeds the BN that opens
    # the first MBConv, and goes with it.
    "maxvit_t": [
        "stem.0",
        "stem.1 … blocks.0.layers.0.layers.MBconv",
        *(
            f"{layer}.layers.{part}"
            for layer in nested("blocks.{}.layers.{}", 0, [2, 2, 5, 2])
            for part in ("MBconv", "window_attention", "grid_attention")
        ),
    ],
}
GOLDEN["maxvit_t"].remove("blocks.0.layers.0.layers.MBconv")  # which the stem goes with


@pytest.mark.parametrize("name", GOLDEN)
def test_residual_policy(name):
    assert names(torchvision_plan(name)) == GOLDEN[name]


def test_vgg_batchnorm_gives_its_eight_groups():
    plan = torchvision_plan("vgg11_bn", "batchnorm")
    assert names(plan) == GOLDEN["vgg11_bn"][:8]
    assert plan.classifier.modules == ("avgpool", *(f"classifier.{i}" for i in range(7)))


def test_a_model_without_residual_blocks_says_that_it_falls_back():
    assert torchvision_plan("vgg11_bn").notes == (
        "the model has no residual block, so it is cut into BN groups",
    )
    assert torchvision_plan("resnet18").notes == ()


@pytest.mark.parametrize(
    ("width", "blocks"),
    # Their share of the parameters is 23, 38 and 97 %.
    [(2, 1), (4, 3), (64, 3)],
)
def test_linear_layers_that_hold_much_of_a_model_are_cut_from_each_other(width, blocks):
    convolution = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten()]
    linear = [nn.Linear(32, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*convolution, *linear, nn.Linear(width, 4))
    expected = ["0 … 1", "2 … 4", "5 … 6"][:blocks]
    assert names(sffx.plan(model, example_input=torch.zeros(1, 3, 4, 4))) == expected


def test_one_linear_layer_with_a_third_of_a_model_stays_with_the_classifier():
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5), nn.ReLU()]
    plan = sffx.plan(nn.Sequential(*layers, nn.Linear(5, 4)), "residual", torch.zeros(1, 3, 4, 4))
    assert names(plan) == ["0 … 1"]


def test_a_stem_of_layers_with_a_third_of_a_model_is_cut_from_layer_to_layer():
    stem = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    model = nn.Sequential(
        *(*stem, residual(8), residual(8)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )
    plan = sffx.plan(model, example_input=torch.zeros(1, 3, 8, 8))
    assert names(plan) == ["0 … 1", "2 … 3", "4", "5"]


def test_a_layer_is_not_cut_from_what_has_no_weight_matrix():
    """A patch embedding that holds most of a model, and the norm behind it, are one block."""
    model = nn.Sequential(
        nn.Linear(200, 8), nn.LayerNorm(8), nn.ReLU(), nn.Flatten(), nn.Linear(40, 4)
    )
    plan = sffx.plan(model, example_input=torch.zeros(1, 5, 200))
    assert names(plan) == ["0 … 2"]


@pytest.mark.parametrize(
    ("policy", "cuts"),
    [
        # It falls back to BN groups. The convolution without BN is one: its value is not flat.
        ("residual", ["_3", "_5"]),
        ("batchnorm", ["_3", "_5"]),
        ("layer", ["_2", "_5"]),
        (["_3"], ["_3"]),
        (lambda analysis: [analysis.candidates[0]], ["_1"]),
    ],
    ids=["residual", "batchnorm", "layer", "nodes", "callable"],
)
def test_policies_on_a_chain(policy, cuts):
    assert [block.output for block in sffx.plan(Chain(), policy, torch.zeros(1, 3, 8, 8))] == cuts


def first(analysis):
    return [analysis.candidates[0]]


def first_with_options(analysis, options):
    assert options == Options(kernel_size=3)
    return (name for name in analysis.candidates[:1])


def first_by_name(analysis, options=None):
    assert options == Options(kernel_size=3)
    return [analysis.candidates[0]]


def first_by_default(analysis, index=0):
    return [analysis.candidates[index]]


def first_with_a_note(analysis):
    return Cuts((analysis.candidates[0],), ("the first one",))


def nowhere():
    return []


class First:
    def __call__(self, analysis, options):
        return first_with_options(analysis, options)


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        (first, "first"),
        (first_with_options, "first_with_options"),
        (first_by_name, "first_by_name"),
        (first_by_default, "first_by_default"),
        (first_with_a_note, "first_with_a_note"),
        (First(), "First"),
        (partial(first_by_default, index=0), "partial"),
        (lambda *arguments: [arguments[0].candidates[0]], "<lambda>"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_policies_of_ones_own(policy, name):
    plan = sffx.plan(Chain(), policy, torch.zeros(1, 3, 8, 8), kernel_size=3)
    assert [block.output for block in plan] == ["_1"]
    assert plan.policy == name
    assert plan.notes == (("the first one",) if policy is first_with_a_note else ())


@pytest.mark.parametrize(
    ("notes", "expected"), [("a sentence", ("a sentence",)), (None, ()), (["a", "b"], ("a", "b"))]
)
def test_notes_of_a_policy_are_sentences_of_the_plan(notes, expected):
    plan = sffx.plan(Chain(), lambda analysis: Cuts(["_1"], notes), torch.zeros(1, 3, 8, 8))
    assert plan.notes == expected


def test_stages_of_a_single_layer_are_refused_as_by_any_policy():
    messages = set()
    for policy in ("stages(1)", "residual", "layer"):
        with pytest.raises(CutError, match="the model has no node to cut at") as refused:
            sffx.plan(nn.Linear(6, 3), policy, torch.zeros(2, 6))
        messages.add(str(refused.value))
    assert len(messages) == 1


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (nowhere, r"the policy takes \(\)\. Hint: .* \(analysis\) or \(analysis, options\)"),
        (lambda a, b, c: [], r"the policy takes \(a, b, c\)"),
        (lambda analysis, *, depth: [], r"the policy takes \(analysis, \*, depth\)"),
        (lambda analysis: "_1", r"the policy returned a str\. Hint: return the names"),
        (lambda analysis: None, r"the policy returned a NoneType"),
        (lambda analysis: Cuts("_1"), r"the policy returned a str"),
        (lambda analysis: Cuts(["_1"], [3]), r"a note of the policy is 3, of type int\. Hint"),
        (lambda analysis: Cuts(["_1"], 0.5), r"a note of the policy is 0\.5, of type float"),
        (sffx.policies.stages, r"policy is the function stages itself, .* Hint: stages\(n\)"),
        (sffx.policies.module, r"policy is the function module itself, .* Hint: module\(depth\)"),
        (sffx.policies.memory, r"Hint: memory\(budget, batch_size\)"),
        (lambda analysis: ["_1", 3], r"3 is no place of a cut\. Hint: a policy is a name"),
        (lambda analysis: [("_1", None)], r"\('_1', None\) is no place of a cut"),
        (lambda analysis: [()], r"\(\) is no place of a cut"),
        ([1], r"1 is no place of a cut"),
        (b"x", r"120 is no place of a cut"),
        ({1, 2}, r"1 is no place of a cut"),
        (range(3), r"0 is no place of a cut"),
    ],
)
def test_policies_of_ones_own_that_cannot_be_used(policy, message):
    with pytest.raises(InputError, match=message):
        sffx.plan(Chain(), policy, torch.zeros(1, 3, 8, 8))


IMAGES = torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize("given", [IMAGES, (IMAGES,), {"x": IMAGES}])
def test_an_input_in_the_place_of_the_policy_is_said(given):
    message = r"the second argument is a (Tensor|tuple|dict), but it is the policy\. Hint: .*input"
    with pytest.raises(InputError, match=message):
        sffx.transform(Chain(), given)


def test_layer_policy_makes_a_block_of_every_layer():
    plan = torchvision_plan("vgg11_bn", "layer")
    assert len(plan) == 10  # eight convolutions and two of the three linear layers
    assert plan.classifier.modules == ("classifier.5", "classifier.6")


def test_layer_policy_keeps_a_shared_layer_whole():
    assert [block.output for block in sffx.plan(SharedWeight(), "layer")] == ["relu", "relu_2"]


class _InlineResidual(nn.Module):
    """Residual sums written in the model's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = torch.relu(x + layer(x))
        return self.head(x)


def test_sums_in_the_models_own_forward_are_blocks_each():
    assert [block.output for block in sffx.plan(_InlineResidual())] == [
        "layers_0",
        "relu",
        "relu_1",
    ]


def test_the_classifier_begins_with_the_pool():
    plan = torchvision_plan("mobilenet_v3_small")
    assert plan.classifier.modules == (
        "avgpool",
        "classifier.0",
        "classifier.1",
        "classifier.2",
        "classifier.3",
    )


def test_the_plan_does_not_depend_on_the_size_of_the_input():
    small = sffx.plan(
        torchvision.models.mobilenet_v3_small(), example_input=torch.zeros(1, 3, 32, 32)
    )
    assert [block.output for block in small] == [
        block.output for block in torchvision_plan("mobilenet_v3_small")
    ]


STRUCTURED = {
    # The modules one level down. The BN and the pool behind conv1 go with it. The pool before fc is
    # the classifier's.
    ("resnet18", "module(1)"): [STEM, "layer1", "layer2", "layer3", "layer4"],
    # Two levels down lie the BasicBlocks, and the stem is higher up.
    ("resnet18", "module"): GOLDEN["resnet18"],
    # The encoder, which adds the positions, is one level down; its blocks are three. A module
    # without weights goes with the one before.
    ("vit_b_16", "module(1)"): ["conv_proj", "encoder"],
    ("vit_b_16", "module(3)"): [
        "conv_proj … encoder.dropout",
        *(f"encoder.layers.encoder_layer_{i}" for i in range(11)),
        "encoder.layers.encoder_layer_11 … encoder.ln",
    ],
    # Its stages, and the downsampling between them.
    ("convnext_tiny", "module"): [f"features.{i}" for i in range(8)],
    # A transition begins with the BN that the dense block before it feeds.
    ("densenet121", "module"): GOLDEN["densenet121"],
    # A BasicBlock costs the same in every stage, but for the first one of a stage and the stem.
    ("resnet18", "stages(4)"): ["conv1 … layer1", "layer2", "layer3", "layer4"],
    ("resnet18", "stages(2)"): ["conv1 … layer2", "layer3 … layer4"],
    ("vgg11_bn", "stages(2)"): ["features.0 … features.14", "features.15 … features.28"],
    ("vgg11_bn", "stages(8)"): GOLDEN["vgg11_bn"][:8],
    ("vit_b_16", "stages(1)"): ["conv_proj … encoder"],
    # All 12 blocks cost the same, in three parts of four. The norm behind them goes with the last.
    ("vit_b_16", "stages(3)"): [
        "conv_proj … encoder.layers.encoder_layer_3",
        "encoder.layers.encoder_layer_4 … encoder.layers.encoder_layer_7",
        "encoder.layers.encoder_layer_8 … encoder.ln",
    ],
}


@pytest.mark.parametrize(("name", "policy"), STRUCTURED)
def test_structured_policies(name, policy):
    assert names(torchvision_plan(name, policy)) == STRUCTURED[name, policy]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_stages_are_balanced_as_well_as_any_other_choice(n):
    """The oracle tries every choice."""
    squares = lambda plan: sum(block.macs**2 for block in plan)  # noqa: E731
    analysis = torchvision_analysis("mobilenet_v3_small")
    *places, last = sffx.policies.batchnorm(analysis, Options()).after
    chosen = sffx.policies.stages(n)(analysis, Options()).after
    macs = {step.node: analysis.macs(step) for step in analysis.steps}
    order = list(macs)

    def cost(cuts: tuple[str, ...]) -> int:
        ends = [-1, *(order.index(cut) for cut in cuts)]
        return sum(sum(macs[name] for name in order[a + 1 : b + 1]) ** 2 for a, b in pairwise(ends))

    assert cost(chosen) == min(cost((*some, last)) for some in combinations(places, n - 1))
    plan = torchvision_plan("mobilenet_v3_small", f"stages({n})")
    assert squares(plan) == pytest.approx(cost(chosen), rel=1e-6)


def test_policies_with_parameters_can_be_written_or_called():
    for written, called in [
        ("stages(2)", sffx.policies.stages(2)),
        ("module", sffx.policies.module()),
        (" module( 2 )", "module(depth=2)"),
    ]:
        one = torchvision_plan("resnet18", written)
        other = torchvision_plan("resnet18", called)
        assert one.blocks == other.blocks
    assert sffx.plan(Residual(), sffx.policies.stages(2)).policy == "stages(2)"


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        ("stages", InputError, r"policy 'stages': .*missing 1 required.*'stages\(n\)'"),
        ("stages(0)", InputError, r"n is 0\. Hint: pass a positive integer"),
        ("stages(two)", InputError, r"n is 'two'"),
        (
            "stages(9)",
            CutError,
            r"stages\(9\) asks for more feature blocks than the 3 BN groups of the model\. "
            r"Hint: n <= 3",
        ),
        (
            "stage(3)",
            InputError,
            r"there is no policy 'stage\(3\)'\. Hint: did you mean 'stages'\?",
        ),
        ("stages(3", InputError, r"there is no policy 'stages\(3'"),
        ("module(-1)", InputError, r"depth is -1"),
        ("memory(2 GiB)", InputError, r"missing 1 required positional argument: 'batch_size'"),
        (
            "memory(much, 64)",
            InputError,
            r"the budget 'much' cannot be read\. Hint: '2 GiB', '500 MB', or a number of bytes",
        ),
        ("memory(2 GiB, 64, batch=3)", InputError, r"unexpected keyword argument 'batch'"),
    ],
)
def test_parameters_that_cannot_be_used(policy, error, message):
    with pytest.raises(error, match=message):
        sffx.plan(Residual(), policy)


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        (
            "residul",
            InputError,
            r"there is no policy 'residul'\. Hint: did you mean 'residual'\? "
            r"the policies are 'residual', 'batchnorm', 'layer'",
        ),
        (3, InputError, "policy is a int"),
        (["block1_conv1"], CutError, "does not dominate the output"),
        ([], CutError, "found no block besides the classifier"),
        (lambda analysis: ["nowhere"], CutError, "no node of this name"),
    ],
)
def test_policies_that_cannot_be_used(policy, error, message):
    with pytest.raises(error, match=message):
        sffx.plan(Residual(), policy)


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LSTM(8, 16, batch_first=True), nn.GRU(16, 12, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.first(x)
        x, _ = self.second(x)
        return self.head(x[:, -1])


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 16), nn.Linear(16, 4)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x)).mean(1))


MLP = (
    nn.Linear(20, 32),
    nn.ReLU(),
    nn.Linear(32, 24),
    nn.BatchNorm1d(24),
    nn.ReLU(),
    nn.Dropout(0.1),
    nn.Linear(24, 4),
)
SIGNAL = (
    nn.Conv1d(2, 8, 3),
    nn.BatchNorm1d(8),
    nn.ReLU(),
    nn.Conv1d(8, 6, 3),
    nn.ReLU(),
    nn.AdaptiveAvgPool1d(1),
    nn.Flatten(),
    nn.Linear(6, 3),
)


@pytest.mark.parametrize(
    ("model", "example", "blocks"),
    [
        (_Recurrent(), torch.zeros(1, 7, 8), [("first", (7, 16), 2), ("second", (7, 12), 2)]),
        (
            _Encoder(),
            None,
            [("embedding", (16, 16), 2), *((f"encoder.layers.{i}", (16, 16), 2) for i in range(3))],
        ),
        (nn.Sequential(*MLP), None, [("0 … 1", (32,), 1), ("2 … 4", (24,), 1)]),
        (nn.Sequential(*SIGNAL), None, [("0 … 2", (8, 126), 1), ("3 … 4", (6, 124), 1)]),
    ],
    ids=["recurrent", "encoder", "MLP", "signal"],
)
def test_models_of_a_users_own(model, example, blocks):
    net = sffx.transform(model, "batchnorm", example).train()
    assert [(block.name, block.shape, block.channel_axis) for block in net.plan] == blocks
    assert not net.plan.leaves
    (given,) = net.plan.inputs
    x = (
        torch.randint(0, given.high, (6, *given.shape))
        if given.high
        else torch.randn(6, *given.shape)
    )
    sffx.local_loss(net, x, torch.tensor([0, 1, 2, 0, 1, 2])).backward()
    assert all(p.grad is not None for p in net.parameters())


class _SharedResidual(nn.Module):
    """One residual layer, used over and over, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last, self.head = (
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = x + self.shared(x)
        return self.head(x + self.last(x))


def test_a_residual_layer_used_over_and_over_is_one_block():
    assert names(sffx.plan(_SharedResidual(), "residual", torch.zeros(1, 6))) == [
        "first",
        "shared",
        "last",
    ]


class _Gains(nn.Module):
    """Filters with a gain for each channel, which are no layer, behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.gains, self.norm = nn.Parameter(torch.ones(12)), nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x.flatten(1) * self.gains))


def test_a_model_without_groups_is_cut_before_its_classifier():
    plan = sffx.plan(_Gains(), example_input=torch.zeros(3, 3, 4))
    assert [block.output for block in plan] == ["norm"]
    assert NO_RESIDUAL_BLOCK in plan.notes


NORMS = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(2, channels),
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    **{norm.__name__: norm for norm in written_norms.NORMS},
}


@pytest.mark.parametrize("policy", ["residual", "batchnorm", "layer"])
@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_right_behind_a_layer_belongs_to_it(kind, policy):
    norm = NORMS[kind]
    stages = [
        nn.Sequential(nn.Conv2d(inputs, 4, 3, padding=1), norm(4), nn.LeakyReLU())
        for inputs in (3, 4, 4)
    ]
    middle = Sum(stages[1])  # a residual block, behind which the last stage is the tail
    tail = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    model = nn.Sequential(stages[0], middle, stages[2], *tail)
    plan = sffx.plan(model, policy, torch.zeros(1, 3, 8, 8))
    assert [block.name for block in plan] == ["0", "1", "2"]


@pytest.mark.parametrize("norm", written_norms.NORMS)
@pytest.mark.parametrize("layer", written_norms.CONVOLUTIONS)
def test_what_a_norm_is_made_of_does_not_tell_where_a_layer_ends(layer, norm):
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 8), (8, 6)):
        layers += [layer(inputs, outputs, 3, padding=1), norm(outputs), nn.PReLU(outputs)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    x = torch.randn(4, 3, 8, 8)
    net = sffx.transform(model, "layer", x, check=True)
    assert [block.name for block in net.plan] == ["0 … 2", "3 … 5"]
    assert sffx.local_loss(net.train(), x, torch.arange(4) % 3).isfinite()


class _Halves(nn.Module):
    """Makes one value of the two halves of the channels: maxout, or a gate."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(*x.chunk(2, 1))


class _Maxout(nn.Module):
    """Takes the largest of each two channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, 2)).amax(2)


NARROWING = {
    "glu": lambda: nn.GLU(1),
    "gate": lambda: _Halves(torch.mul),
    "halves": lambda: _Halves(torch.maximum),
    "maxout": _Maxout,
}


@pytest.mark.parametrize("policy", ["residual", "batchnorm", "layer"])
@pytest.mark.parametrize("layer", ["linear", "convolution"])
@pytest.mark.parametrize("kind", NARROWING)
def test_an_activation_with_fewer_channels_belongs_to_its_layer(kind, layer, policy):
    stages: list[nn.Module] = []
    is_flat = layer == "linear"
    for inputs in (3, 6, 6):
        own = nn.Linear(inputs, 12) if is_flat else nn.Conv2d(inputs, 12, 3, padding=1)
        stages.append(nn.Sequential(own, NARROWING[kind](), nn.Hardtanh()))
    pool = [] if is_flat else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*stages, *pool, nn.Linear(6, 4))
    example = torch.zeros(1, 3) if is_flat else torch.zeros(1, 3, 8, 8)
    plan = sffx.plan(model, policy, example)
    assert [block.name for block in plan] == ["0", "1", "2"]
    assert [block.channels for block in plan] == [6, 6, 6]


class _Dense(nn.Module):
    """Each layer reads a weighted sum of all values before, as in DenseFormer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(4))
        self.shares = nn.ParameterList(nn.Parameter(torch.ones(i + 1)) for i in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for layer, shares in zip(self.layers, self.shares, strict=True):
            mean = torch.einsum("k,kbc->bc", shares, torch.stack(values))
            values.append(layer(mean))
        return self.head(values[-1])


def test_a_stack_of_flat_values_does_not_begin_the_classifier():
    plan = sffx.plan(_Dense(), example_input=torch.zeros(1, 8))
    assert [block.name for block in plan] == [f"layers.{i}" for i in range(4)]


def test_what_prepares_the_input_does_not_begin_the_classifier():
    layers = nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    model = nn.Sequential(nn.PReLU(3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), *layers)
    plan = sffx.plan(model, "batchnorm", torch.zeros(1, 3, 4, 4))
    assert [block.output for block in plan] == ["_4", "_6"]
