"""A net of three blocks with batch norm and a classifier, on (B, 1, 8, 8)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

import sffx
from tests.toys import kept

CLASSES = 3


@kept
def cut(objective: Any = "sff", **options: Any) -> fx.GraphModule:
    """Cut a model with batch norm, so that running statistics would give a frozen block away."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((1, 6), (6, 6), (6, 9)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    model = nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(9, CLASSES)
    )
    x = torch.zeros(1, 1, 8, 8)
    return sffx.transform(model, "layer", x, objective=objective, **options).train()
