"""The place where an exporter stopped is one in the user's model."""

from __future__ import annotations

import re

import pytest
import torch
from torch import fx, nn

import sffx
from sffx.export.explain import explanation


class Inner(nn.Module):
    """A leaf, since it enters a region that a graph cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Linear(6, 6)

    def forward(self, x):
        with torch.autocast("cpu"):
            pass
        return self.deep(x)


@pytest.mark.parametrize(
    ("paths", "place"),
    [
        (["", "block_0.0", "block_0.0.deep"], r"\(node 'sum_1' in module '0.deep'\)"),
        (["", "block_0.0", "_module_of_the_exporter"], r"\(node 'sum_1' in module '0'\)"),
        (["_module_of_the_exporter"], r"\(node 'sum_1'\)"),
    ],
)
def test_modules_of_the_exporter_are_not_named(paths, place):
    model = nn.Sequential(Inner(), nn.ReLU(), nn.Linear(6, 4))
    net = sffx.transform(model, "layer", torch.zeros(1, 6), check=False)
    node = fx.Graph().placeholder("sum_1")
    node.meta["nn_module_stack"] = {str(i): (path, nn.Module) for i, path in enumerate(paths)}

    def translate(node):
        raise RuntimeError(f"Error when translating node %{node.name}: unknown")

    with pytest.raises(RuntimeError) as raised:
        translate(node)
    assert re.search(place, explanation(raised.value, net))
