"""The ways to train of the benchmark, on a small network."""

import copy
import json

import pytest
import torch
from torch import nn

from tools.bench import __main__ as command
from tools.bench.counting import can_be_counted, count, fitting_parts, limit
from tools.bench.page import report, table
from tools.bench.parts import TIMED, measure, usable
from tools.bench.ways import WAYS
from tools.bench.workloads import SMALL, WORKLOADS, Workload


def convolutions(classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )


TOY = Workload("toy", convolutions, (3, 8, 8), 4, 8, 8, "batchnorm")


@pytest.fixture(scope="module")
def record():
    return measure(TOY, 2, ("BP", "local", "in backward"))


def test_every_way_that_can_be_counted_is_counted(record):
    assert set(record["counts"]) == {way for way in WAYS if can_be_counted(way)}
    for way, counts in record["counts"].items():
        assert counts["peak"] > counts["parameters"] > 0, way
        # Where the optimizer steps in between, there is no part without it.
        steps_in_between = way in ("step", "in backward", "checkpoint, in backward")
        assert ("operations" in counts) != steps_in_between


def test_what_saves_memory_does(record):
    counts = record["counts"]
    assert counts["local"]["activations"] < counts["BP"]["activations"]
    assert counts["checkpoint"]["activations"] < counts["BP"]["activations"]
    assert counts["in backward"]["gradients"] < counts["BP"]["gradients"]
    assert counts["step"]["gradients"] < counts["local"]["gradients"]
    assert record["limit"]["macs"] < counts["local"]["macs"]


def test_the_table_has_a_row_for_each_way(record):
    text = table(record)
    for way in record["counts"]:
        assert f"| {way}" in text
    page = report({"workloads": {"toy": {**record, "date": "today", "hardware": "a machine"}}})
    assert "### toy (memory at batch 8, time at 8)" in page


@pytest.mark.parametrize("way", ["checkpoint", "in backward", "checkpoint, in backward"])
def test_rivals_do_the_step_of_backpropagation(way):
    model = TOY.build().double()
    x, y = TOY.batch(6)
    x = x.double()
    reference = copy.deepcopy(model)
    made = WAYS["BP"].make(reference, 1)
    with torch.no_grad():
        rival = WAYS[way].prepare(model.float(), TOY).double()
    other = WAYS[way].make(rival, 1)
    for _ in range(2):
        made.step(x, y)
        other.step(x, y)
    for one, two in zip(reference.parameters(), rival.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_accumulation_fits_its_budget():
    model = TOY.build()
    whole = count("accumulation", model, TOY)["activations"]
    assert fitting_parts(model, TOY, whole) == 1
    assert fitting_parts(model, TOY, whole - 1) == 2
    assert fitting_parts(model, TOY, whole / 2) > 1


@pytest.mark.parametrize("workload", [*WORKLOADS, *SMALL], ids=lambda each: each.name)
def test_workloads_fit_their_models(workload):
    with torch.device("meta"):
        model = workload.make(workload.classes)
        x = torch.zeros(2, *workload.shape)
        assert model(x).shape == (2, workload.classes)


def test_ways_that_need_a_package_are_left_out_without_it():
    assert "BP" in usable(TIMED)
    with_package = usable(["eight bits"])
    try:
        import torchao  # noqa: F401
    except ImportError:
        assert with_package == []


def test_the_limit_has_no_heads():
    model = TOY.build()
    kept = count("kept", WAYS["kept"].prepare(model, TOY), TOY)
    assert limit(model, TOY)["macs"] < kept["macs"]


def test_parts_are_kept_in_the_record(tmp_path, monkeypatch, capsys):
    (tmp_path / "record.json").write_text(
        json.dumps({"old": {"date": "", "hardware": "", "found": 1}})
    )
    monkeypatch.setattr(command, "WORKLOADS", (TOY,))
    arguments = ["bench", "--out", str(tmp_path), "--rounds", "0", "--parts", "workloads"]
    monkeypatch.setattr("sys.argv", arguments)
    command.main()
    kept = json.loads((tmp_path / "record.json").read_text())
    assert set(kept) == {"old", "workloads"}
    assert "### toy" in (tmp_path / "table.md").read_text()


def test_counting_only_leaves_out_what_is_timed_only(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(command, "save", lambda record, path: measured.extend(record))
    monkeypatch.setattr(command, "WORKLOADS", ())
    monkeypatch.setattr(command, "WORKLOADS", (TOY,))
    monkeypatch.setattr(command, "measure", lambda *_: {})
    for part in ("small", "depth", "classes", "batches", *command.TIMED_ONLY):
        monkeypatch.setattr(command, part, lambda *_: None)
    monkeypatch.setattr(command, "report", lambda record: "")
    monkeypatch.setattr(command, "plot", lambda record, path: None)
    monkeypatch.setattr("sys.argv", ["bench", "--out", str(tmp_path), "--rounds", "0"])
    command.main()
    assert set(measured) == set(command.PARTS) - set(command.TIMED_ONLY)


@pytest.mark.parametrize(
    ("parts", "batch", "shown"),
    [(16, 8, "16 parts, timed with 4"), (4, 16, "4 parts"), (2, 1, "2 parts, timed with 1")],
)
def test_the_table_says_into_how_many_parts_a_batch_was_divided(record, parts, batch, shown):
    times = {"BP": 1.0, "accumulation": 1.1}
    text = table({**record, "parts": parts, "time_batch": batch, "time": times})
    assert f"| accumulation ({shown}) | 1.10 |" in text
