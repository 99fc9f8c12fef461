"""Cutting a model prints nothing, though sizes that fail are tried on the way."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sffx
from sffx.compiler.fake import failures_unlogged


def fail_on_fakes() -> None:
    """Run an operation that fails, which torch logs with a traceback."""
    with FakeTensorMode(), pytest.raises(RuntimeError):
        torch.zeros(2, 3) @ torch.zeros(2, 3)


class Trying(nn.Module):
    """Fails on fake tensors while it is traced, and goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fail_on_fakes()
        return self.layers(x)


def test_failures_are_logged_outside_and_not_inside(caplog):
    with caplog.at_level(logging.ERROR):
        with failures_unlogged():
            fail_on_fakes()
        assert not caplog.records
        fail_on_fakes()
        assert "failed while attempting" in caplog.text


def test_cutting_logs_no_failures(caplog):
    with caplog.at_level(logging.ERROR):
        sffx.plan(Trying(), "layer", torch.zeros(1, 6))
        sffx.transform(Trying(), "layer", torch.zeros(1, 6))
    assert not caplog.records
