"""A small sample of the zoo, verified as `tools/zoo.py` does it."""

from __future__ import annotations

import pytest
import torch

from tools.zoo.entries import Entry, build, fitting_input
from tools.zoo.records import new_record
from tools.zoo.verify import check_refusal, verify_model

SAMPLE = (
    "resnet18",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "vit_b_32",
    "mnasnet0_5",
    "regnet_y_400mf",
)


@pytest.mark.parametrize(
    "entry",
    [
        *(Entry("torchvision", name) for name in SAMPLE),
        Entry("torchvision", "lraspp_mobilenet_v3_large", "segmentation"),
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
