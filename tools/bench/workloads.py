"""What is trained in the benchmark: six workloads of torchvision's models, and small networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torchvision
from torch import Tensor, nn

from examples import digits
from tools.reproduce.networks import build


class Transformer(nn.Module):
    """Two layers of a transformer on 32 tokens of 64 channels, and a classifier on their mean."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        for i in range(2):
            layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
            self.add_module(f"layer{i}", layer)
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (B, J), of tokens, (B, T, 64)."""
        for i in range(2):
            x = self.get_submodule(f"layer{i}")(x)
        return self.fc(x.mean(1))


@dataclass(frozen=True)
class Workload:
    """A model at a size.

    Attributes:
        name: in the record.
        make: makes the model from J.
        shape: of one sample.
        classes: J.
        count_batch: the batch size at which memory is counted.
        time_batch: the batch size at which time is measured.
        policy: where the model is cut.
        kernel_size: of the paper's heads.
    """

    name: str
    make: Callable[[int], nn.Module] = field(repr=False)
    shape: tuple[int, ...]
    classes: int
    count_batch: int
    time_batch: int
    policy: str = "residual"
    kernel_size: int = 1

    @property
    def example(self) -> Tensor:
        return torch.zeros(1, *self.shape)

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make(self.classes).train()

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Draw samples and labels."""
        return torch.randn(size, *self.shape), torch.randint(0, self.classes, (size,))


def of_torchvision(
    model: str, size: int, classes: int, count_batch: int, time_batch: int
) -> Workload:
    """Return a workload of one of torchvision's models, size x size."""

    def make(num_classes: int) -> nn.Module:
        return getattr(torchvision.models, model)(num_classes=num_classes)

    name = f"{model}, {size} x {size}, J = {classes}"
    return Workload(name, make, (3, size, size), classes, count_batch, time_batch)


WORKLOADS = (
    of_torchvision("resnet18", 32, 10, 128, 128),
    of_torchvision("resnet18", 32, 100, 128, 128),
    of_torchvision("resnet18", 224, 1000, 64, 16),
    of_torchvision("resnet50", 224, 1000, 64, 16),
    of_torchvision("mobilenet_v3_large", 224, 10, 64, 32),
    of_torchvision("vit_b_16", 224, 100, 16, 8),
)


def _of_demo(task: digits.Task) -> Workload:
    name = f"demo, {task.name}"
    shape = (3, task.size, task.size)
    batch = digits.BATCH
    return Workload(
        name, lambda _: task.make(), shape, 10, batch, batch, kernel_size=task.kernel_size
    )


def _of_paper(name: str, size: int, channels: int, policy: str) -> Workload:
    def make(classes: int) -> nn.Module:
        return build(name, classes, size)

    return Workload(name, make, (channels, size, size), 10, 128, 128, policy)


SMALL = (
    _of_paper("CNNB", 32, 3, "batchnorm"),
    _of_paper("ResNet18/4", 32, 3, "residual"),
    _of_paper("MLP 3 x 1000", 28, 1, "layer"),
    Workload("transformer of two layers", Transformer, (32, 64), 10, 128, 128),
    *map(_of_demo, digits.TASKS),
)
