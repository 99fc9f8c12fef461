"""Two processes on half a batch each, under DistributedDataParallel.

They get the gradients of one process on the whole batch.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel

import sffx
from tests.processes import leave, spawn

PROCESSES, BATCH, CLASSES = 2, 8, 4


class Residual(nn.Module):
    """A convolution with a shortcut around it.

    There is no BN, since its statistics would be those of each process's own samples.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv(x))


def cut_model(seed: int) -> fx.GraphModule:
    torch.manual_seed(seed)
    layers = (
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        Residual(6),
        Residual(6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, CLASSES),
    )
    return sffx.transform(
        nn.Sequential(*layers).double(), example_input=torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    )


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(BATCH, 3, 8, 8, dtype=torch.float64, generator=generator), torch.randint(
        0, CLASSES, (BATCH,), generator=generator
    )


def train_one_step(rank: int, folder: str) -> None:
    """Run by each process: a step on its share of the batch; what it has then is left in a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES
    )
    # Each process starts from weights of its own, which DDP must replace by those of the first.
    model = DistributedDataParallel(sffx.LocalLoss(cut_model(seed=rank)))
    x, y = (part.chunk(PROCESSES)[rank] for part in batch())
    loss = model(x, y)
    loss.backward()
    torch.save(
        (loss.detach(), {name: p.grad for name, p in model.module.net.named_parameters()}),
        f"{folder}/{rank}.pt",
    )
    leave()


def test_two_processes_get_the_gradients_of_one(tmp_path: Path) -> None:
    spawn(train_one_step, PROCESSES, str(tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES)]

    net = cut_model(seed=0)
    loss = sffx.local_loss(net, *batch())
    loss.backward()
    expected = {name: p.grad for name, p in net.named_parameters()}

    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in expected.values())
    torch.testing.assert_close(
        torch.stack([one for one, _ in found]).mean(), loss.detach(), rtol=1e-12, atol=0
    )
    for _, gradients in found:
        torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-13)
