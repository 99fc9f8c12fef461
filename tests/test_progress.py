"""Long work says how far it is; short work says nothing."""

from __future__ import annotations

import logging
import time

import pytest
import torch

import sffx
from sffx import progress
from sffx.cli import viz
from tests.toys import Chain


@pytest.fixture
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)


def test_short_work_says_nothing(caplog):
    caplog.set_level(logging.INFO, "sffx")
    assert list(progress.reported([1, 2], "numbers")) == [1, 2]
    assert not caplog.messages


@pytest.mark.usefixtures("_always")
def test_long_work_says_how_far_it_is(caplog):
    caplog.set_level(logging.INFO, "sffx")
    assert list(progress.reported([1, 2], "numbers", 2)) == [1, 2]
    assert list(progress.reported(iter([1]), "others")) == [1]
    said = [message.partition(" in ")[0] for message in caplog.messages]
    assert said == ["numbers: 1 of 2", "numbers: 2 of 2", "others: 1"]


@pytest.fixture
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.02)


@pytest.mark.usefixtures("_often")
def test_one_piece_of_work_says_that_it_runs_and_stops_when_it_ends(caplog):
    caplog.set_level(logging.INFO, "sffx")

    @progress.running("cooking")
    def cook() -> None:
        while not caplog.messages:
            time.sleep(0.01)
        raise KeyError

    with pytest.raises(KeyError):
        cook()
    time.sleep(0.03)  # a message that was about to be logged
    said = len(caplog.messages)
    time.sleep(0.1)
    assert len(caplog.messages) == said
    assert set(caplog.messages) == {"cooking: 0 s so far"}


@pytest.mark.usefixtures("_often")
def test_work_around_other_work_is_silent_while_that_speaks(caplog):
    caplog.set_level(logging.INFO, "sffx")
    with progress.running("cooking"):
        for _ in progress.reported(range(40), "eggs"):
            time.sleep(0.003)
            # The watcher may wake late on a busy machine, so it hears of the last message.
            progress._last_message = time.monotonic()
    assert caplog.messages
    assert all(message.startswith("eggs: ") for message in caplog.messages)


@pytest.mark.usefixtures("_often")
def test_exports_quantisation_and_calibration_say_how_far_they_are(caplog, tmp_path):
    caplog.set_level(logging.INFO, "sffx")
    net = sffx.transform(Chain(), "stages(2)", torch.zeros(1, 3, 8, 8)).eval()
    loader = [(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))] * 3

    def slow():
        for batch in loader:
            time.sleep(0.05)
            yield batch

    calls = {
        "exporting to ONNX: ": lambda: sffx.export_onnx(net, tmp_path / "net.onnx"),
        "exporting by torch.export: ": lambda: sffx.export_program(net, tmp_path / "net.pt2"),
        "blocks exported: 1 of 2 in ": lambda: sffx.export_early_exit(net, tmp_path / "exit"),
        "batches: 2 in ": lambda: sffx.EarlyExit(net).calibrate(slow()),
        "batches: 1 in ": lambda: sffx.quantize_onnx(
            tmp_path / "net.onnx", tmp_path / "small.onnx", slow()
        ),
        "comparing the model with the cut one: ": lambda: sffx.check(sffx.extract(net), net),
    }
    for expected, call in calls.items():
        caplog.clear()
        call()
        assert any(message.startswith(expected) for message in caplog.messages), expected


def test_quantisation_leaves_the_root_logger_as_it_was(tmp_path, capfd):
    net = sffx.transform(Chain(), "stages(2)", torch.zeros(1, 3, 8, 8)).eval()
    before = logging.root.handlers[:], logging.root.filters[:], logging.root.manager.disable
    sffx.export_onnx(net, tmp_path / "net.onnx")
    loader = [(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))]
    sffx.quantize_onnx(tmp_path / "net.onnx", tmp_path / "small.onnx", loader)
    assert (logging.root.handlers, logging.root.filters, logging.root.manager.disable) == before
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("_always")
def test_evaluation_and_the_search_for_a_budget_say_how_far_they_are(caplog):
    caplog.set_level(logging.INFO, "sffx")
    net = sffx.transform(Chain(), "memory(1 GiB, 4)", torch.zeros(1, 3, 8, 8))
    sffx.evaluate(net, [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))] * 3)
    text = "\n".join(caplog.messages)
    assert "memory of blocks counted: 2" in text
    assert "batches: 3 of 3" in text


@pytest.mark.usefixtures("_always")
def test_the_commands_show_it_on_stderr(capsys, tmp_path):
    before = list(progress.LOGGER.handlers), progress.LOGGER.level
    arguments = ["plan", "torchvision.models:alexnet", "--policy", "memory(4 GiB, 2)"]
    assert viz.main(arguments) == 0
    assert "sffx: memory of blocks counted: " in capsys.readouterr().err
    assert (list(progress.LOGGER.handlers), progress.LOGGER.level) == before
