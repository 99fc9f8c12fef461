"""The counted peak of a training step, for the tests of predictions and of budgets."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

import sffx
from sffx.memory.count import count_memory


def counted(net: nn.Module, batch_size: int, mode: FakeTensorMode | None) -> int:
    """Count the second step with AdamW, on fake tensors where there is a mode."""
    if mode is not None:
        with FakeCopyMode(mode):
            return counted_in(copy.deepcopy(net), batch_size, mode)
    return counted_in(copy.deepcopy(net), batch_size, torch.enable_grad())


def counted_in(net: nn.Module, batch_size: int, context: object) -> int:
    with context:
        x = tuple(
            torch.ones((batch_size, *i.shape)).to(getattr(torch, i.dtype)) for i in net.plan.inputs
        )
        y = torch.zeros(batch_size, dtype=torch.int64)
        optimizer = torch.optim.AdamW(
            sffx.parameter_groups(net.train(), lr=1e-3, classifier_lr=1e-3)
        )

        def step() -> None:
            sffx.local_loss(net, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        return count_memory(step, model=net, optimizer=optimizer).peak
