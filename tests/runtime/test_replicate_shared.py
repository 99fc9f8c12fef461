"""Replicas whose heads read a copy of the output layer, against one process on the whole batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

import sffx
from sffx.learning.shared_output import EVERY
from tests.runtime.pipeline.processes import run

STEPS = EVERY + 5


def cut() -> fx.GraphModule:
    torch.manual_seed(0)
    layers = [nn.Embedding(9, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 9)]
    ids = torch.zeros(2, 4, dtype=torch.int64)
    task = sffx.tasks.LanguageModel()
    model = nn.Sequential(*layers).double()
    return sffx.transform(model, "layer", ids, task=task, goodness="shared")


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 9, (4, 5), generator=generator) for _ in range(STEPS)]


def train(rank: int) -> tuple[dict[str, Any], dict[str, float]]:
    net = cut()
    sffx.replicate(net)
    optimizer = torch.optim.SGD(sffx.parameter_groups(net, lr=0.1))
    halves = [batch[2 * rank : 2 * rank + 2] for batch in batches()]
    for ids in halves:
        sffx.local_step(net, ids, ids, optimizer)
    pairs = [(ids, ids) for ids in halves]
    loss = sffx.evaluate(net, pairs, group=dist.group.WORLD).loss
    return net.state_dict(), loss


def test_replicas_read_the_output_layer_as_one_process_does(tmp_path):
    net = cut()
    optimizer = torch.optim.SGD(sffx.parameter_groups(net, lr=0.1))
    for ids in batches():
        sffx.local_step(net, ids, ids, optimizer)
    loss = sffx.evaluate(net, [(ids, ids) for ids in batches()]).loss
    for found in run(train, 2, tmp_path):
        torch.testing.assert_close(found[0], net.state_dict(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[1], loss, rtol=1e-12, atol=1e-12)
