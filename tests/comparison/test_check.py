"""`sffx.check` passes what is right, and names the place of what is not."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import sffx
from sffx.comparison.check import quick_check
from sffx.comparison.guard import checked
from sffx.errors import CheckError, InputError
from tests.toys import Chain, Residual, SharedWeight, Tokens, TwoBranches, TwoInputs

IMAGE = torch.zeros(1, 3, 8, 8)
TOKENS = {
    "input_ids": torch.zeros(1, 6, dtype=torch.int64),
    "attention_mask": torch.ones(1, 6, dtype=torch.int64),
}


class Layers(nn.Module):
    """Two layers and a classifier, with places to break: on (B, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.b(self.a(x).relu()).relu()))


class Tied(nn.Module):
    """One layer under two names: on (B, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.c = self.b

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.c(self.b(self.a(x).relu()).relu()).relu())


class Centred(nn.Module):
    """Subtracts a buffer: on (B, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("centre", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(x).relu() - self.centre).relu())


def cut(model: nn.Module, x: Any, policy: Any = "layer") -> fx.GraphModule:
    return sffx.transform(model, policy, x, check=False)


def difference(model: nn.Module, net: fx.GraphModule, x: Any = None) -> sffx.CheckReport:
    with pytest.raises(CheckError) as caught:
        sffx.check(model, net, x)
    found = caught.value.report.difference
    assert str(found) == str(caught.value)
    assert "Hint: " in str(found)
    return found


def replaced(net: fx.GraphModule, block: str, old: str, new: str) -> None:
    """Break a block: replace code in its forward."""
    part = net.get_submodule(block)
    code = part.code
    assert old in code, code
    scope: dict[str, Any] = dict(part.forward.__func__.__globals__)
    exec(code.replace(old, new), scope)
    part.__dict__["forward"] = scope["forward"].__get__(part)


# What is right passes.


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Chain(), IMAGE),
        (Residual(), IMAGE),
        (TwoBranches(), IMAGE),
        (SharedWeight(), torch.zeros(1, 6)),
        (TwoInputs(), (torch.zeros(1, 6), torch.zeros(1, 5))),
        (Tokens(), TOKENS),
        (Layers(), torch.zeros(1, 6)),
        (Tied(), torch.zeros(1, 6)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("policy", ["residual", "layer"])
def test_what_is_right_passes(model, x, policy):
    net = sffx.transform(model, policy, x, check=True)
    report = sffx.check(model, net)
    assert report.passed
    assert max(report.errors.values()) < 1e-5
    assert {"train mode, 4 samples", "eval mode, 3 samples, no_grad"} <= set(report.errors)
    assert not [name for name in report.skipped if name != "other sizes"]


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("name", "size"), [("mobilenet_v3_small", 32), ("resnet18", 32), ("googlenet", 64)]
)
def test_real_models_pass(name, size):
    torchvision = pytest.importorskip("torchvision")
    options = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, num_classes=10, weights=None, **options)
    net = cut(model, torch.zeros(1, 3, size, size), "residual")
    report = sffx.check(model, net)
    assert sum("(3, " in each for each in report.errors) == 2


class FailsInBackward(nn.Module):
    """Writes on what autograd has kept, so that the backward pass raises."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b, self.head = (
            *(nn.Linear(6, 8), nn.BatchNorm1d(8)),
            *(nn.Linear(8, 8), nn.Linear(8, 4)),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.a(x)).exp()
        y += 1
        return self.head(self.b(y).relu())


def test_a_run_in_which_the_model_fails_leaves_no_difference():
    """The forward has updated a batch norm before the backward pass fails."""
    model = FailsInBackward()
    net = cut(model, torch.zeros(1, 6))
    report = sffx.check(model, net)
    assert "modified by an inplace operation" in report.skipped["train mode, 4 samples"]
    assert report.errors["eval mode, 4 samples"] < 1e-5


def test_zeroed_heads_and_tiny_outputs_hide_nothing():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=4)
    assert not model.heads.head.weight.any()
    net = cut(model, torch.zeros(1, 3, 16, 16), "residual")
    assert not sffx.check(model, net).skipped.keys() & {"values"}
    model.encoder.layers[1].ln_1.eps = 1.0
    found = difference(model, net)
    assert found.module.startswith("encoder.layers.encoder_layer_1")


def test_nothing_of_the_caller_is_touched():
    model = Residual().train()
    model.stem.eval()
    net = cut(model, IMAGE)
    net.head_0.eval()
    before = copy.deepcopy((model.state_dict(), net.state_dict()))
    modes = [module.training for module in (*model.modules(), *net.modules())]
    torch.manual_seed(3)
    random.seed(3)
    draws = torch.get_rng_state(), random.getstate()
    sffx.check(model, net)
    assert torch.equal(draws[0], torch.get_rng_state())
    assert draws[1] == random.getstate()
    assert modes == [module.training for module in (*model.modules(), *net.modules())]
    for old, new in zip(before, (model.state_dict(), net.state_dict()), strict=True):
        for name, value in old.items():
            assert torch.equal(value, new[name]), name
    assert all(p.grad is None for p in (*model.parameters(), *net.parameters()))


def test_a_trained_net_is_compared_with_what_is_extracted_from_it():
    model = Residual()
    net = cut(model, IMAGE)
    with torch.no_grad():
        net.block_1.get_submodule("block1.conv1").weight += 0.1
    found = difference(model, net)
    assert found.where == "extract(net)"
    assert found.module == "block1.conv1"
    assert "check(sffx.extract(net), net)" in found.hint
    assert sffx.check(sffx.extract(net), net).passed


# What is wrong is found, with its place.


def test_another_weight_in_the_values():
    model = Layers()
    net = cut(model, torch.zeros(1, 6))
    # Another weight than the parameter of that name.
    replaced(net, "block_1", "self.b(", "(lambda x: 1.01 * self.b(x))(")
    report = sffx.check(model, net, raises=False)
    assert not report.passed
    assert "DIFFERENT" in str(report)
    assert "<table>" in report._repr_html_()
    assert 1e-4 < report.difference.error < 1


def test_a_node_that_was_changed_is_named():
    model = Residual()
    net = cut(model, IMAGE, "residual")
    graph = net.block_1.graph
    node = next(node for node in graph.nodes if node.target == "block1.bn2")
    with graph.inserting_after(node):
        added = graph.call_function(torch.mul, (node, 1.001))
    node.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
    net.block_1.recompile()
    found = difference(model, net)
    assert (found.block, found.node, found.module) == ("block_1", added.name, "")
    assert not found.only_elsewhere


def test_a_layer_that_was_changed_is_named():
    model = Residual()
    net = cut(model, IMAGE, "residual")
    net.block_2.get_submodule("block2.bn1").eps = 0.1
    found = difference(model, net)
    assert (found.block, found.module) == ("block_2", "block2.conv2")
    assert found.where == "train mode, 4 samples"


def test_an_operation_in_place_that_spoils_a_gradient():
    model = Layers()
    net = cut(model, torch.zeros(1, 6))
    graph = net.block_1.graph
    node = list(graph.nodes)[-2]
    with graph.inserting_after(node):
        graph.call_method("mul_", (node, 1.0))
    net.block_1.recompile()
    found = difference(model, net)
    assert "modified by an inplace operation" in found.problem
    assert found.where == "the backward pass, train mode, 4 samples"
    assert found.block == "block_1"


def test_a_gradient_that_is_cut_off():
    model = Layers()
    net = cut(model, torch.zeros(1, 6))
    graph = net.block_1.graph
    output = next(iter(reversed(graph.nodes)))
    value = output.args[0]
    with graph.inserting_before(output):
        output.args = (graph.call_method("detach", (value,)),)
    net.block_1.recompile()
    found = difference(model, net)
    assert found.where == "gradients, train mode, 4 samples"
    assert found.module in ("a", "b")


def test_a_dropped_update_of_a_buffer(monkeypatch):
    model = Centred()
    net = cut(model, torch.zeros(1, 6))
    forward = Centred.forward

    def updating(self: nn.Module, x: Tensor) -> Tensor:
        logits = forward(self, x)
        self.centre += 1
        return logits

    monkeypatch.setattr(Centred, "forward", updating)
    found = difference(model, net)
    assert found.where == "train mode, the same once more"
    assert found.node == "centre"


def test_a_buffer_that_nobody_reads(monkeypatch):
    model = Centred()
    model.register_buffer("calls", torch.zeros(()))
    net = cut(model, torch.zeros(1, 6))
    forward = Centred.forward

    def counting(self: nn.Module, x: Tensor) -> Tensor:
        self.calls += 1
        return forward(self, x)

    monkeypatch.setattr(Centred, "forward", counting)
    found = difference(model, net)
    assert found.where == "the buffers after these calls"
    assert "'calls'" in found.problem


@pytest.mark.parametrize("training", [True, False])
def test_a_dropout_in_the_wrong_mode(training):
    model = Layers()
    net = cut(model, torch.zeros(1, 6))
    drop = next(module for module in net.modules() if isinstance(module, nn.Dropout))
    drop.train = lambda mode=True: drop
    drop.training = training
    found = difference(model, net)
    assert found.module == "drop"
    assert "the mode of 'drop'" in found.problem


def test_a_batch_size_that_was_frozen():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).relu()
            return self.fc(self.b(y + torch.ones(x.shape[0], 1)).relu())

    model = Flat()
    net = cut(model, torch.zeros(1, 6))
    for block in net.plan.all_blocks:
        part = net.get_submodule(block.target)
        for node in part.graph.nodes:
            if node.target is torch.ones:
                node.args = (4, 1)
        part.recompile()
    found = difference(model, net)
    assert found.where == "train mode, 3 samples"
    assert "RuntimeError" in found.problem
    assert found.block == "block_0"


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(x).relu()).relu().mean((2, 3)))


def pads_at_other_sizes(self: nn.Module, x: Tensor) -> Tensor:
    extra = -x.shape[-1] % 8
    return plain_forward(self, F.pad(x, (0, extra)) if extra else x)


plain_forward = Padded.forward


def test_a_branch_on_the_image_size_that_was_frozen(monkeypatch):
    model = Padded()
    net = cut(model, IMAGE)
    monkeypatch.setattr(Padded, "forward", pads_at_other_sizes)
    found = difference(model, net)
    assert found.only_elsewhere
    assert "x (3, 11, 13)" in found.where
    assert (found.block, found.module) == ("block_0", "a")


def test_a_lost_hook():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    net = cut(model, torch.zeros(1, 6))
    model[2].register_forward_hook(lambda *_: None)
    found = difference(model, net)
    assert found.only_elsewhere
    assert found.module == "2"


class _Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).relu()


def test_hooks_of_many_layers_are_noted_by_name():
    model = nn.Sequential(*[_Hooked() for _ in range(6)], nn.Linear(6, 4))
    net = cut(model, torch.zeros(1, 6))
    assert any(note.startswith("hooks of * ran") for note in net.plan.notes)
    assert sffx.check(model, net, torch.randn(3, 6), raises=False).difference is None


def test_scores_along_another_axis_than_the_batch():
    model = Layers()
    net = cut(model, torch.zeros(1, 6))
    net.head_0.forward = lambda x: torch.zeros(61, 4)
    found = difference(model, net)
    assert found.where == "the scores of 4 samples"
    assert found.block == "block_0"


def test_what_follows_the_logits_was_left_out(monkeypatch):
    model = Layers()
    net = cut(model, torch.zeros(1, 6))

    def scaled(self: nn.Module, x: Tensor) -> Tensor:
        return 2 * nn.Module.__call__(self, x)

    monkeypatch.setattr(Layers, "__call__", scaled)
    found = difference(model, net)
    assert (found.block, found.node, found.module) == ("classifier", "fc", "fc")


def test_a_constant_that_is_written_in_place():
    class Summing(Layers):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).relu()
            total = torch.zeros(8)
            total = total + y.detach().mean(0)
            return self.fc(self.b(y + total).relu())

    model = Summing()
    net = cut(model, torch.zeros(1, 6))
    for block in net.plan.all_blocks:
        part = net.get_submodule(block.target)
        for node in part.graph.nodes:
            if any(str(arg.target).startswith("_sffx_constant") for arg in node.all_input_nodes):
                node.op, node.target = "call_method", "add_"
        part.recompile()
    found = difference(model, net)
    assert found.where == "train mode, the same once more"


# Arguments, and what transform does with it.


def test_arguments_that_the_net_does_not_take():
    class Scaled(Layers):
        def forward(self, x: Tensor, scale: float) -> Tensor:
            return super().forward(x * scale)

    model, x = Scaled(), {"x": torch.zeros(1, 6), "scale": 2.0}
    net = cut(model, x)
    assert sffx.check(model, net).passed
    assert sffx.check(model, net, x).passed
    with pytest.raises(InputError, match=r"scale is 3\.0, but the model was cut for 2\.0"):
        sffx.check(model, net, {**x, "scale": 3.0})


def test_what_is_no_cut_model_is_refused():
    with pytest.raises(InputError, match="not a cut model"):
        sffx.check(Layers(), Layers())


def test_transform_raises_on_a_small_model_that_went_wrong(monkeypatch):
    model = Layers()

    def wrong(net: fx.GraphModule) -> None:
        node = next(node for node in net.block_0.graph.nodes if "relu" in node.name)
        with net.block_0.graph.inserting_after(node):
            added = net.block_0.graph.call_function(torch.neg, (node,))
        node.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
        net.block_0.recompile()

    monkeypatch.setattr("sffx.api.save_memory", wrong)
    x = torch.zeros(1, 6)
    for check in ("auto", True):
        with pytest.raises(CheckError, match="part at node 'neg' of block_0"):
            sffx.transform(model, "layer", x, check=check)
    assert len(sffx.transform(model, "layer", x, check=False).plan) == 2


def test_transform_notes_what_differs_at_other_sizes(monkeypatch):
    model = Padded()
    traced = copy.deepcopy(model)
    net = cut(traced, IMAGE)
    before = len(net.plan.notes)
    monkeypatch.setattr(Padded, "forward", pads_at_other_sizes)
    noted = checked(model, net, True)
    assert noted is net  # the object that was verified
    assert any("x (3, 11, 13)" in note for note in net.plan.notes)
    assert len(net.plan.notes) == before + 2
    assert copy.deepcopy(net).plan == net.plan


class Encoder(nn.Module):
    """torch's own encoder, with padding: on (B, T) twice."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.embed, self.fc = nn.Embedding(11, 8), nn.Linear(8, 4)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        tokens = self.encoder(self.embed(ids), src_key_padding_mask=keep == 0)
        return self.fc(tokens.mean(1))


def test_what_torch_does_otherwise_without_gradients_is_noted():
    ids = torch.ones(1, 7, dtype=torch.int64)
    net = sffx.transform(Encoder(), "layer", {"ids": ids, "keep": ids})
    assert any("no_grad" in note and "nested tensors" in note for note in net.plan.notes)
    report = sffx.check(sffx.extract(net), net)
    assert "eval mode, 4 samples, no_grad" in report.skipped


def test_the_quick_check_is_a_part_of_the_whole():
    model = Residual()
    net = cut(model, IMAGE)
    quick = set(quick_check(model, net).errors)
    assert quick <= set(sffx.check(model, net).errors)


def test_outputs_of_nan_are_said_to_compare_nothing():
    class Rooted(Layers):
        def forward(self, x: Tensor) -> Tensor:
            return (
                self.fc(self.b(self.a(x).relu()).relu()) + x.sum(1, keepdim=True).abs().neg().log()
            )

    model, x = Rooted(), torch.randn(4, 6)
    net = sffx.transform(model, policy="layer", example_input=x, check=False)
    skipped = sffx.check(model, net).skipped
    assert any("are nan" in reason for reason in skipped.values())
    net = sffx.transform(model, policy="layer", example_input=x)
    assert any("are nan" in note for note in net.plan.notes)


def test_a_model_of_positive_numbers_is_compared_on_them():
    class Logarithms(Layers):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.log())

    model, x = Logarithms(), torch.rand(4, 6)
    net = sffx.transform(model, policy="layer", example_input=x)
    assert not net.plan.notes
    report = sffx.check(model, net)
    assert "values" not in " ".join(report.skipped)
    # It is compared in earnest: with another weight it differs.
    with torch.no_grad():
        net.get_parameter("block_0.a.weight").mul_(2)
    assert sffx.check(model, net, raises=False).difference is not None


def test_a_model_may_write_on_its_input():
    class Writes(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    model = Writes(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    net = sffx.transform(model, "layer", torch.zeros(2, 6))
    assert sffx.check(model, net).difference is None


class _BranchesOnSum(nn.Module):
    """A leaf, whose branch hangs on rounding where its input is layer-normed."""

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        self.layer, self.threshold = nn.Linear(8, 8), threshold

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.sum(1, keepdim=True) > self.threshold, self.layer(x), -self.layer(x))


@pytest.mark.parametrize("seed", range(4))
def test_scores_that_hang_on_rounding_are_no_difference(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), _BranchesOnSum(), nn.ReLU(), nn.Linear(8, 4))
    net = cut(model, torch.zeros(1, 6))
    assert sffx.check(model, net).difference is None


def test_scores_that_hang_on_other_samples_are_a_difference():
    torch.manual_seed(0)
    model = Layers()
    net = cut(model, torch.zeros(1, 6))
    head = net.head_0.forward
    # As a branch does, but the first sample decides for all.
    net.head_0.forward = lambda x: head(torch.where(x[:1, :1] > 0, x, -x * 2))
    found = difference(model, net)
    assert found.where == "the scores of 4 samples"
    assert "depend on the others" in found.problem


@pytest.mark.parametrize(
    "example",
    [[1, 2], "text", torch.zeros(2, 8), torch.zeros(2, 6, 1), torch.zeros(2, 6, dtype=torch.int64)],
)
def test_an_example_unlike_that_of_the_cut_is_refused(example):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    net = sffx.transform(model, "layer", torch.zeros(2, 6), check=False)
    with pytest.raises(
        sffx.InputError, match=r"was cut for \(B, 6\) of torch.float32.*Hint: pass what transform"
    ):
        sffx.check(model, net, example)
