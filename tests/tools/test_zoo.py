"""A small sample of the zoo, verified as `python -m tools.zoo` does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.compiler.trace.trace import trace
from tools.zoo import install
from tools.zoo.entries import ZOOS, Entry, build, entries, fitting_input, package
from tools.zoo.records import Record, new_record
from tools.zoo.sweep import MEMORY, note_failure
from tools.zoo.table import table
from tools.zoo.verify import Unverified, check_refusal, poor_parts, verify_model

# One architecture of each family is compared in tests/test_api.py, transformers as well in
# tests/compiler/test_structures.py.
SAMPLE = ("resnet18", "shufflenet_v2_x0_5")


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "entry",
    [
        Entry("torchvision", "lraspp_mobilenet_v3_large", "segmentation"),
        *(Entry("torchvision", name) for name in SAMPLE),
    ],
    ids=lambda entry: entry.name,
)
@pytest.mark.filterwarnings("ignore")
def test_torchvision(entry):
    torch.manual_seed(0)
    model = build(entry)
    record = new_record(entry)
    net = verify_model(model, fitting_input(entry, model), record)
    assert record.reason == ""
    assert record.leaves == []
    assert len(net.plan) >= 2


@pytest.mark.parametrize(
    ("group", "name"),
    [("detection", "fasterrcnn_mobilenet_v3_large_320_fpn")],
)
def test_no_classifier_is_refused_with_a_way_out(group, name):
    entry = Entry("torchvision", name, group)
    record = new_record(entry)
    check_refusal(build(entry), record)
    assert "self.backbone" in record.notes[0]


class _Opaque(nn.Module):
    """Layers that no trace looks into, since the data decide how often they run."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x) if x.sum() > 0 else x


def test_blocks_and_leaves_with_more_than_a_third_are_poor():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), _Opaque(), nn.ReLU(), nn.Linear(6, 4))
    poor = poor_parts(sffx.plan(model, "layer", torch.randn(2, 6)), model)
    assert poor == ["block_1 (2 … 3): 55%", "leaf 2 (_Opaque): 55%"]


def test_one_large_layer_is_not_poor_since_no_cut_divides_it():
    model = nn.Sequential(nn.Linear(6, 60), nn.ReLU(), nn.Linear(60, 6), nn.ReLU(), nn.Linear(6, 4))
    assert poor_parts(sffx.plan(model, "layer", torch.randn(2, 6)), model) == []


class _TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 60), nn.ReLU(), nn.Linear(60, 6))
        self.weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_a_large_layer_with_two_names_is_one_layer():
    model = nn.Sequential(nn.Linear(6, 6), _TwoNames(), nn.Linear(6, 4))
    plan = sffx.plan(model, ["_0", "_1_layers_2"], torch.randn(2, 6))
    assert plan.blocks[1].parameters[0] == "1.layers.0.weight"
    assert poor_parts(plan, model) == []


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x).relu())


@pytest.mark.parametrize(("blocks", "poor"), [(1, []), (2, ["block_1 (1 … 2): 78%"])])
def test_one_residual_block_is_not_poor_but_several_in_one_block_are(blocks, poor):
    middle = [_Residual() for _ in range(blocks)]
    model = nn.Sequential(nn.Linear(6, 6), *middle, nn.Linear(6, 4))
    cuts = [node.name for node in trace(model, torch.randn(2, 6)).graph.nodes]
    after = ["_0", [name for name in cuts if name.startswith("add")][-1]]
    assert poor_parts(sffx.plan(model, after, torch.randn(2, 6)), model) == poor


def _record(outcome: str, **more: Any) -> Record:
    reason = "" if outcome == "verified" else "a reason"
    return Record("monai", "net", "classification", reason, outcome, date="2026-11-28", **more)


def test_the_table_counts_what_ran():
    records = [
        _record("verified", poor=[], blocks=3),
        _record("verified", poor=["block_0 (a): 50%"], blocks=3),
        _record("refused"),
        _record("wrong"),
        _record("idle"),
    ]
    assert "| monai | 4 | 2 (50.0%) | 1 (25.0%) | 1 | 1 | – |" in table(records)


def test_a_zoo_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(install, "is_installed", lambda zoo: False)
    with pytest.raises(install.NotInstalled, match=r"--zoo monai --install .*pip install"):
        install.require("monai")


@pytest.mark.parametrize("zoo", ZOOS)
def test_each_zoo_lists_its_models_without_its_package(zoo):
    listed = entries(zoo)
    assert len(listed) == len({entry.path for entry in listed}) > 0
    assert package(zoo).REQUIRES


@pytest.mark.parametrize(
    ("failure", "outcome", "reason"),
    [
        (Unverified("a leaf differs"), "wrong", "a leaf differs"),
        (sffx.errors.CutError("no cut. Hint: one"), "refused", "CutError: no cut. Hint: one"),
        (sffx.errors.CutError("no cut"), "wrong", "CutError: no cut"),
        (KeyError("x"), "wrong", "KeyError: 'x'"),
    ],
)
def test_a_failure_is_wrong_unless_a_hint_helps(failure, outcome, reason):
    record = new_record(Entry("torchvision", "resnet18"))
    note_failure(failure, record)
    assert (record.outcome, record.reason) == (outcome, reason)


def test_a_model_that_does_not_fit_has_not_been_tried():
    record = new_record(Entry("torchvision", "resnet18"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    note_failure(caught.value, record)
    assert record.outcome == "idle"
    assert f"{MEMORY // 2**30} GiB" in record.reason


def test_a_model_of_one_image_size_is_built_for_a_small_one():
    entry = Entry("timm", "levit_conv_128s", "levit")  # made for 224 x 224
    x = fitting_input(entry, build(entry))["x"]
    assert x.shape[1:] == (3, 96, 96)
