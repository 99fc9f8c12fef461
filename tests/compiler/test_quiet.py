"""Cutting a model prints nothing, though sizes that fail are tried on the way."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import torch, sffx
from torch import nn

class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.positions = nn.Parameter(torch.zeros(1, 8, 4, 4))
        self.layers = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x) + self.positions
        if x.shape[2] > 2:
            x = 2 * x
        return self.head(self.layers(x).mean((2, 3)))

sffx.transform(Positions(), "layer", torch.zeros(1, 3, 16, 16))
sffx.plan(Positions(), "layer", torch.zeros(1, 3, 16, 16))
"""


def test_nothing_is_printed():
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=200
    )
    assert done.stdout == ""
    assert done.stderr == ""
