"""Long work says how far it is; short work says nothing."""

from __future__ import annotations

import logging

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
