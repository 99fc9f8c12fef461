from __future__ import annotations

import copy
import functools
import gc
import random
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import sffx
from sffx.compiler.trace.flags import TrainingFlag
from sffx.compiler.trace.trace import trace
from sffx.errors import InputError, TraceError
from tests.toys import (
    Chain,
    DataBranch,
    LayerDrop,
    ModeDropout,
    Residual,
    TwoBranches,
    TwoInputs,
    around,
)


def test_the_callers_model_is_untouched():
    model = Residual().train()
    model.block1.bn1.eval()  # a mode of its own, as of a frozen BN
    model.stem.register_forward_hook(lambda *_: None)
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    identities = [id(p) for p in model.parameters()]
    children = [name for name, _ in model.named_modules()]

    net = sffx.transform(model)
    sffx.sff_loss(net(torch.randn(4, 3, 8, 8)), torch.tensor([0, 1, 2, 3])).backward()

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [id(p) for p in model.parameters()] == identities
    assert [name for name, _ in model.named_modules()] == children
    assert all(p.grad is None for p in model.parameters())
    assert len(model.stem._forward_hooks) == 1


def test_a_frozen_bn_stays_in_eval_mode():
    model = Residual().train()
    model.block1.bn1.eval()
    net = sffx.transform(model)
    assert not net.block_1.block1.bn1.training
    assert net.block_1.block1.bn2.training
    assert net.training


def test_training_flags_follow_the_mode_of_their_owner():
    net = sffx.transform(ModeDropout(), "layer", norm="none")
    x = torch.randn(64, 6)
    model = net.origin.model
    for training in (True, False, True):
        net.train(training), model.train(training)
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        net.readout.mode = "classifier"
        found = net(x)[-1] if training else net(x)
        assert torch.equal(found, expected)
    assert sum(isinstance(m, TrainingFlag) for m in net.modules()) == 1


class _TrainBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * 2
        return self.inner(x)


def test_a_branch_on_the_mode_makes_a_leaf_that_keeps_both_branches():
    model = around(_TrainBranch())
    net = sffx.transform(model, "layer", norm="none")
    assert [(leaf.qualname, leaf.reason) for leaf in net.plan.leaves] == [
        ("2", "branches on self.training")
    ]
    x = torch.randn(5, 6)
    net.readout.mode = "classifier"
    assert torch.equal(net.train()(x)[-1], model.train()(x))
    assert torch.equal(net.eval()(x), model.eval()(x))


class _Auxiliary(nn.Module):
    """Returns a second output in train mode, as GoogLeNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aux, self.head = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = F.relu(self.body(x))
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


def test_auxiliary_outputs_are_left_out_and_that_is_said():
    traced = trace(_Auxiliary())
    assert "aux" not in {node.target for node in traced.graph.nodes}
    assert traced.notes == ("left out, since the logits do not depend on them: aux",)


def test_a_branch_on_data_makes_a_leaf():
    model = around(DataBranch())
    net = sffx.transform(model, "layer", norm="none").eval()
    (leaf,) = net.plan.leaves
    assert leaf.qualname == "2"
    assert leaf.kind == "DataBranch"
    assert leaf.share == pytest.approx(42 / 112)
    assert "toys.py" in leaf.reason
    net.readout.mode = "classifier"
    x = torch.randn(5, 6)
    assert torch.equal(net(x), model.eval()(x))


def test_a_branch_on_random_numbers_makes_a_leaf():
    plan = sffx.plan(around(LayerDrop()), "layer")
    assert [leaf.qualname for leaf in plan.leaves] == ["2"]


def test_all_modules_of_an_untraceable_class_become_leaves_at_once():
    model = nn.Sequential(nn.Linear(6, 6), *(DataBranch() for _ in range(12)), nn.Linear(6, 4))
    assert len(trace(model).leaves) == 12


class _UntraceableRoot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.inner(x)
        return -self.inner(x)


def test_an_untraceable_forward_names_the_class_the_line_and_the_way_out():
    with pytest.raises(
        TraceError,
        match=r"_UntraceableRoot cannot be traced: .*test_trace\.py:\d+, in forward\)\. Hint: .* move this code",
    ):
        trace(_UntraceableRoot())


class _ModeDependentRoot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * 2 if self.training else x)


def test_a_root_that_branches_on_the_mode_is_refused():
    with pytest.raises(
        TraceError,
        match=r"differently in train and eval mode.*Hint: move the branch into a submodule",
    ):
        trace(_ModeDependentRoot())


class _Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        x = self.inner(x) * scale
        return self.head(x if mask is None else x * mask)


@pytest.mark.parametrize(
    ("example", "names"),
    [
        (torch.zeros(1, 6), ["x"]),
        (None, ["x"]),
        ({"x": torch.zeros(1, 6), "mask": torch.ones(1, 6)}, ["x", "mask"]),
        ((torch.zeros(1, 6), None, 3.0), ["x"]),
    ],
)
def test_optional_arguments_are_inputs_only_when_given(example, names):
    assert [i.name for i in trace(_Optional(), example).inputs] == names


def test_several_inputs_by_position_and_by_name():
    image, text = torch.zeros(1, 6), torch.zeros(1, 5)
    for example in ((image, text), {"text": text, "image": image}):
        assert [(i.name, i.shape) for i in trace(TwoInputs(), example).inputs] == [
            ("image", (6,)),
            ("text", (5,)),
        ]


@pytest.mark.parametrize(
    ("model", "shape", "dtype"),
    [
        (Chain(), (3, 8, 8), "float32"),
        (
            nn.Sequential(
                nn.Conv1d(2, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)
            ),
            (2, 128),
            "float32",
        ),
        (
            nn.Sequential(
                nn.Conv3d(1, 4, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)
            ),
            (1, 16, 112, 112),
            "float32",
        ),
        (nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3)).double(), (20,), "float64"),
    ],
)
def test_the_input_is_inferred_from_the_first_layer(model, shape, dtype):
    (found,) = trace(model).inputs
    assert (found.shape, found.dtype) == (shape, dtype)


def test_integer_inputs_know_how_many_values_there_are():
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Flatten(), nn.Linear(8 * 16, 3))
    (found,) = trace(model).inputs
    assert (found.shape, found.dtype, found.high) == ((16,), "int64", 50)


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (
            TwoInputs(),
            None,
            r"TwoInputs\.forward takes 2 inputs \(image, text\).*Hint: pass example_input=\(",
        ),
        (
            Chain(),
            torch.zeros(1, 5, 8, 8),
            r"does not run on example_input \(input \(1, 5, 8, 8\)\)",
        ),
        (Chain(), {"y": torch.zeros(1)}, r"example_input does not fit Chain\.forward"),
        (Chain(), "no tensor", r"example_input holds no tensor, got str"),
        (Chain(), torch.zeros(()), r"a tensor without axes"),
        (
            nn.Sequential(nn.Flatten()),
            None,
            r"cannot be inferred: its first layer is of no known kind",
        ),
        (Chain, None, r"model is a type, not a torch\.nn\.Module"),
    ],
)
def test_inputs_that_cannot_be_used(model, example, message):
    with pytest.raises(InputError, match=message):
        trace(model, example)


def test_an_output_that_is_no_logits_is_refused():
    with pytest.raises(
        TraceError,
        match=r"returns a tensor of shape \(B, 4, 8, 8\), but logits are of shape \(B, J\)\. Hint: sffx cuts classifiers",
    ):
        trace(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), torch.zeros(1, 3, 8, 8))


def test_shapes_stay_symbolic():
    class Reshaping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            b, c, h, w = self.conv(x).shape
            tokens = self.conv(x).reshape(b, c, h * w).transpose(1, 2)
            return self.head(tokens.mean(1)) + (len(tokens.shape) - 3)

    model = Reshaping().eval()
    net = sffx.transform(
        model, lambda analysis: [analysis.candidates[0]], torch.zeros(1, 3, 4, 4), norm="none"
    )
    net.readout.mode = "classifier"
    for shape in ((2, 3, 4, 4), (5, 3, 6, 7)):
        x = torch.randn(shape)
        assert torch.equal(net(x), model(x))


class _Reads(nn.Module):
    """Reads the batch size as a number, or branches on what its input is, or opens a region."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.inner, self.form = nn.Linear(6, 6), form

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "len":
            return self.inner(x).view(len(x), -1)
        if self.form == "float":
            return self.inner(x) / float(x.shape[0])
        if self.form == "loop":
            return torch.stack([self.inner(x[i]) for i in range(x.shape[0])])
        if self.form == "no_grad":
            with torch.no_grad():
                return self.inner(x)
        if self.form == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x).float()
        return self.inner(x * 10) if isinstance(x, Tensor) else self.inner(x)


@pytest.mark.parametrize("form", ["len", "float", "loop", "no_grad", "autocast"])
def test_what_a_graph_cannot_hold_makes_a_leaf(form):
    model = around(_Reads(form))
    net = sffx.transform(model, "layer", norm="none").train()
    assert [leaf.qualname for leaf in net.plan.leaves] == ["2"]
    net.readout.mode = "classifier"
    for batch in (1, 2, 7):
        x = torch.randn(batch, 6)
        assert torch.equal(net(x)[-1], model(x))


def test_a_tensor_is_a_tensor_during_the_trace():
    model = around(_Reads("isinstance"))
    net = sffx.transform(model, "layer", norm="none").eval()
    assert not net.plan.leaves
    net.readout.mode = "classifier"
    x = torch.randn(3, 6)
    assert torch.equal(net(x), model.eval()(x))


class _Applies(nn.Module):
    """A layer, and a function of its module and output that a forward could have in its place."""

    def __init__(self, code: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.code = nn.Linear(6, 6), code

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, self.inner(x))


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: x + torch.arange(6),
        lambda m, x: x + torch.arange(x.shape[1], device=x.device),
        lambda m, x: x + torch.ones(x.shape[0], 1, dtype=x.dtype),
        lambda m, x: x + torch.ones(*x.shape),
        lambda m, x: x * torch.tensor(x.shape[0]),
        lambda m, x: x.clamp(min=torch.finfo(x.dtype).min),
        lambda m, x: nn.ReLU()(x),
        lambda m, x: x * 2 if x.shape[0] > 0 else x,
        lambda m, x: x * 2 if x.shape == (x.shape[0], 6) else x,
        lambda m, x: x * 2 if x.numel() == x.shape[0] * 6 else x,
    ],
)
def test_what_a_forward_makes_on_the_spot_is_traced(code):
    model = around(_Applies(code))
    net = sffx.transform(model, "layer", norm="none").train()
    assert not net.plan.leaves
    net.readout.mode = "classifier"
    for batch in (1, 2, 7):
        x = torch.randn(batch, 6)
        assert torch.equal(net(x)[-1], model(x))


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: x * 2 if x.shape[0] == 1 else x,
        lambda m, x: x * 2 if x.size(0) in (1, 2) else x,
        lambda m, x: x * 2 if x.size(0) % 2 else x,
        lambda m, x: x * 2 if x.size(0) // 2 > 1 else x,
        lambda m, x: x * 2 if x.numel() < 40 else x,
        lambda m, x: x * min(x.shape[0], 3),
        lambda m, x: x * int(x.shape[0] + 1),
        lambda m, x: x.view(int(x.numel()) // 6, 6),
    ],
)
def test_a_branch_on_the_batch_size_or_a_number_made_from_it_makes_a_leaf(code):
    model = around(_Applies(code))
    net = sffx.transform(model, "layer", norm="none").train()
    assert [leaf.qualname for leaf in net.plan.leaves] == ["2"]
    assert "batch size" in net.plan.leaves[0].reason
    net.readout.mode = "classifier"
    for batch in (1, 2, 7):
        x = torch.randn(batch, 6)
        assert torch.equal(net(x)[-1], model(x))


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(()).item()])
def test_random_numbers_drawn_on_the_side_make_a_leaf(draw):
    model = around(_Applies(lambda m, x: x * draw()))
    states = random.getstate(), np.random.get_state()[2], torch.get_rng_state().sum()
    assert [leaf.qualname for leaf in trace(model).leaves] == ["2"]
    assert (random.getstate(), np.random.get_state()[2], torch.get_rng_state().sum()) == states


def test_torchs_factories_are_as_before_after_a_trace():
    before = torch.zeros, torch.tensor, torch.finfo
    trace(Residual())
    with pytest.raises(TraceError):
        trace(_UntraceableRoot())
    assert (torch.zeros, torch.tensor, torch.finfo) == before


@dataclass
class _Record:
    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: object = None


class _ModeNumber(nn.Module):
    """Reads its mode for a number, as attention does for its dropout, or for what it computes."""

    def __init__(self, form: str = "number") -> None:
        super().__init__()
        self.inner, self.form = nn.Linear(6, 6), form

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.inner(x), 0.5 if self.training else 0.0, training=True)
        return x * 2 if self.training and self.form == "branch" else x


def test_a_number_that_goes_by_the_mode_stays_a_choice():
    model = nn.Sequential(nn.Linear(6, 6), _ModeNumber(), _ModeNumber(), nn.Linear(6, 4))
    net = sffx.transform(model, "layer", norm="none")
    assert not net.plan.leaves
    net.readout.mode = "classifier"
    x = torch.randn(64, 6)
    for whole, first, second in (
        (True, True, True),
        (False, False, False),
        (True, False, True),
        (False, False, True),
    ):
        for root in (model, *net.children()):
            modules = dict(root.train(whole).named_modules())
            for qualname, training in (("1", first), ("2", second)):
                modules.get(qualname, nn.Identity()).train(training)
        net.training = whole
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        assert torch.equal(net(x)[-1] if whole else net(x), expected)


def test_a_branch_beside_a_number_still_makes_a_leaf():
    assert [leaf.qualname for leaf in trace(around(_ModeNumber("branch"))).leaves] == ["2"]


class _SetsItsWindow(nn.Module):
    """Sets an attribute by the size of its input and reads it in the next forward, as transformers' Swin does with its windows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.window = nn.Linear(6, 6), 10

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] <= self.window:
            self.window = x.shape[1]
        return self.inner(x) * self.window


@pytest.mark.parametrize(
    "other", [_ModeNumber(), DataBranch()], ids=["traced in both modes", "traced again for a leaf"]
)
def test_what_a_forward_sets_does_not_outlive_an_attempt_to_trace_it(other):
    model = nn.Sequential(nn.Linear(6, 6), _SetsItsWindow(), other, nn.Linear(6, 4))
    net = sffx.transform(model, "layer", norm="none").eval()
    assert "1" not in [leaf.qualname for leaf in net.plan.leaves]
    assert model[1].window == 10
    net.readout.mode = "classifier"
    x = torch.randn(5, 6)
    assert torch.equal(net(x), model.eval()(x))


class _Decorated(nn.Module):
    """A forward behind a decorator, with arguments that only `**kwargs` takes, which returns a record with a thing no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(
        self, x: Tensor, scale: float = 1.0, *, bias: Tensor | None = None, **kwargs: Tensor
    ) -> _Record:
        x = F.relu(self.inner(x)) * scale + (0 if bias is None else bias) + kwargs.get("shift", 0)
        return _Record(logits=self.head(x), cache=object())

    plain_forward = forward

    @functools.wraps(plain_forward)
    def forward(self, *args: Any, **kwargs: Any) -> _Record:
        return self.plain_forward(*args, **kwargs)


def test_a_decorated_forward_takes_its_arguments_by_name_and_returns_a_record():
    model = _Decorated()
    inputs = {name: torch.randn(5, 6) for name in ("x", "bias", "shift")}
    net = sffx.transform(model, "layer", {**inputs, "scale": 2.0}, norm="none").eval()
    assert [i.name for i in net.plan.inputs] == ["x", "bias", "shift"]
    net.readout.mode = "classifier"
    assert torch.equal(net(**inputs), model(**inputs, scale=2.0).logits)


class _BranchInside(nn.Module):
    """A branch on what the module itself computed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return h if h.sum() > 0 else h * 2


@pytest.mark.parametrize("kind", ["module", "sequential"])
def test_a_branch_on_computed_values_makes_a_leaf(kind):
    class Gate(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            h = super().forward(x)
            return h if h.sum() > 0 else h * 2

    model = around(_BranchInside() if kind == "module" else Gate(nn.Linear(6, 6)))
    net = sffx.transform(model, "layer", norm="none").eval()
    assert [leaf.qualname for leaf in net.plan.leaves] == ["2"]
    net.readout.mode = "classifier"
    x = torch.randn(3, 6)
    assert torch.equal(net(x), model.eval()(x))


def test_a_model_that_cannot_be_copied_says_why():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    model.kept = model[0].weight * 2
    with pytest.raises(
        TraceError,
        match=r"Sequential cannot be copied: .*Hint: it keeps a tensor that is computed from parameters",
    ):
        trace(model)


def test_under_inference_mode_as_outside():
    model = Residual()
    with torch.inference_mode():
        net = sffx.transform(model)
    sffx.local_loss(net.train(), torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])).backward()


class _AddsInPlace(nn.Module):
    """Keeps a second name of a value that it writes to by `+=`, which fx by itself would trace as a new value."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.first, self.head, self.form = nn.Linear(6, 6), nn.Linear(6, 4), form

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        kept = (
            h
            if self.form == "name"
            else h[:, :3]
            if self.form == "view"
            else F.dropout(h, 0.5, self.training)
        )
        count = x.shape[0]
        count *= 2  # a number, which has no in-place form
        kept += count
        return self.head(h + kept if self.form != "view" else h)


@pytest.mark.parametrize("form", ["name", "view", "dropout"])
def test_an_addition_in_place_reaches_the_other_names_of_the_value(form):
    model = _AddsInPlace(form).eval()
    traced = trace(model, torch.zeros(1, 6))
    x = torch.randn(3, 6)
    assert torch.equal(fx.GraphModule(traced.root, traced.graph).eval()(x), model(x))


class _NoMask(nn.Module):
    """A leaf that returns a value and, as its second output, no mask."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = DataBranch()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return (self.inner.inner(x) if x.sum() > 0 else self.inner(x)), None


class _ReadsMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = _NoMask(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, mask = self.embed(x)
        x = F.relu(x)
        return self.head(x if mask is None else x.masked_fill(mask, 0.0))


def test_none_among_the_outputs_of_a_leaf_is_none():
    traced = trace(_ReadsMask())
    assert [leaf.qualname for leaf in traced.leaves] == ["embed"]
    assert "masked_fill" not in {node.target for node in traced.graph.nodes}


class _Detector(nn.Module):
    """Asks for targets in train mode, as torchvision's detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.boxes = Residual(), nn.Linear(4, 4)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        assert targets is not None, "targets should not be none"
        return self.boxes(self.backbone(images))


def test_a_detector_is_told_to_transform_its_backbone():
    message = (
        r"_Detector does not run on example_input \(images \(1, 3, 8, 8\)\): AssertionError: targets should not be none"
        r".* \(.*test_trace\.py:\d+, in forward\)\. Hint: sffx cuts classifiers\..*\(here self\.backbone, a Residual\)"
    )
    with pytest.raises(InputError, match=message):
        trace(_Detector(), torch.zeros(1, 3, 8, 8))


def test_a_traced_model_does_not_stay():
    torch.overrides.get_ignored_functions.cache_clear()  # as in a process that has not traced yet
    torch.overrides._get_tensor_methods.cache_clear()
    torch.overrides._get_overridable_functions.cache_clear()
    model = TwoBranches()
    gone = weakref.ref(trace(model).root)
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert kept() is None


def test_threads_trace_one_after_the_other():
    zeros, model = torch.zeros, Chain()
    names = [node.name for node in trace(model).graph.nodes]
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: trace(model), range(6)):
            assert [node.name for node in found.graph.nodes] == names
    assert torch.zeros is zeros


class Constants(nn.Module):
    """Computes with tensors that are plain attributes, no buffers."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.embed, self.mix, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.table = torch.linspace(-1, 1, 60).view(10, 6)
        self.tables = [self.table, {"half": 0.5 * self.table}]

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        found = {
            "sliced": lambda: self.table[: x.shape[1]],
            "scaled": lambda: (0.5 * self.table)[:5],
            "in a list": lambda: self.tables[0][:5],
            "in a dict": lambda: self.tables[1]["half"][:5],
            "as it is": lambda: self.table[:5].exp(),
        }
        return self.out(self.mix(torch.relu(x + found[self.way]())).mean(1))


@pytest.mark.parametrize("way", ["sliced", "scaled", "in a list", "in a dict", "as it is"])
def test_constants_have_values(way):
    torch.manual_seed(0)
    model, x = Constants(way), torch.randn(7, 5, 4)
    net = sffx.transform(model, "layer", x, norm="none").train()
    assert all(
        type(tensor) in (Tensor, nn.Parameter) for tensor in (*net.parameters(), *net.buffers())
    )
    assert torch.equal(net(x)[-1], model(x))


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class ByFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return Rounded.apply(3 * self.conv(x))


class ByScript(ByFunction):
    def forward(self, x: Tensor) -> Tensor:
        return SCRIPT(self.conv(x))


class Checkpointed(ByFunction):
    reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.conv, x, use_reentrant=self.reentrant) + x


class CheckpointedOtherwise(Checkpointed):
    reentrant = False


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    SCRIPT = torch.jit.trace(lambda x: x * torch.tanh(F.softplus(x)), torch.zeros(2, 8, 3, 3))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ByFunction, "calls the autograd function Rounded"),
        (ByScript, "calls the script"),
        (Checkpointed, ""),
        (CheckpointedOtherwise, ""),
    ],
)
def test_what_would_take_a_proxy_for_a_tensor_ends_in_a_leaf_or_is_left_out(kind, reason):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        kind(),
        nn.Conv2d(8, 8, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(288, 3),
    )
    x = torch.randn(4, 3, 8, 8)
    net = sffx.transform(model, ["_4"], x, norm="none").train()
    assert torch.equal(net(x)[-1], model(x))
    assert [leaf.qualname for leaf in net.plan.leaves] == (["2"] if reason else [])
    assert all(reason in leaf.reason for leaf in net.plan.leaves)
    assert ("gradient checkpointing in the model is left out" in net.plan.notes) == (not reason)
    assert torch.equal(Rounded.apply(torch.tensor(0.6)), torch.tensor(1.0))  # torch's own is back


class AssignsBuffer(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.linear = way, nn.Linear(6, 6)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.way == "in training":
            if self.training:
                self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        elif self.way == "data":
            self.mean.data = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        else:
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        return torch.relu(y - self.mean)


@pytest.mark.parametrize("way", ["always", "in training", "data"])
def test_a_module_that_assigns_its_buffer_becomes_a_leaf(way):
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(6, 6), AssignsBuffer(way), AssignsBuffer(way), nn.Linear(6, 3)),
        torch.randn(8, 6),
    )
    net = sffx.transform(model, "layer", x, norm="none").train()
    for _ in range(3):
        assert torch.equal(net(x)[-1], model(x))
    assert torch.equal(sffx.extract(net)[1].mean, model[1].mean)
    assert [leaf.qualname for leaf in net.plan.leaves] == ["1", "2"]


def test_a_model_that_assigns_its_own_buffer_is_refused():
    with pytest.raises(
        TraceError,
        match=r"assigns its buffer 'mean'.*Hint: write into the buffer, self\.mean\.copy_",
    ):
        sffx.transform(AssignsBuffer("always"), example_input=torch.zeros(2, 6))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (
            lambda model: torch.compile(model, backend="eager"),
            r"model is compiled\. Hint: pass the plain one, model\._orig_mod",
        ),
        (nn.DataParallel, r"wrapped in DataParallel\. Hint: pass model\.module"),
        (
            lambda model: torch.jit.trace(model, torch.zeros(2, 3, 8, 8)),
            r"whose code cannot be traced\. Hint: pass the module",
        ),
        (
            lambda model: nn.Sequential(nn.LazyConv2d(8, 3), model),
            r"'0\.weight' has no shape yet.*Hint: run the model once",
        ),
    ],
)
def test_what_is_wrapped_round_a_model_is_named(wrap, message):
    with pytest.raises(InputError, match=message):
        sffx.transform(wrap(Chain()), example_input=torch.zeros(2, 3, 8, 8))


class TwoOutputs(nn.Module):
    def __init__(self, as_mapping: bool) -> None:
        super().__init__()
        self.as_mapping = as_mapping
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        embedding = self.b(torch.relu(self.a(x)))
        logits = self.c(embedding)
        return (
            {"embedding": embedding, "scores": logits} if self.as_mapping else (embedding, logits)
        )


@pytest.mark.parametrize("as_mapping", [False, True])
def test_the_logits_among_several_outputs_are_told_by_the_number_of_classes(as_mapping):
    model, x = TwoOutputs(as_mapping), torch.randn(4, 6)
    with pytest.raises(
        TraceError,
        match=r"could be its logits, of shapes \(B, 5\), \(B, 3\)\. Hint: pass num_classes",
    ):
        sffx.plan(model, "layer", x)
    with pytest.raises(TraceError, match=r"none with num_classes=4"):
        sffx.plan(model, "layer", x, num_classes=4)
    assert sffx.plan(model, "layer", x, num_classes=3).num_classes == 3
