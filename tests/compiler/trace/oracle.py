"""The oracle of these tests: a model that is cut without norms computes what the original does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

import sffx


class Applies(nn.Module):
    """A layer, and a function of its module and output in the place of code in a forward."""

    def __init__(self, code: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.code = code

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, self.inner(x))


def cut_without_norms(
    model: nn.Module, policy: Any = "layer", example: Any = None
) -> fx.GraphModule:
    """Return a cut model whose scores in eval mode are the logits of the original."""
    net = sffx.transform(model, policy, example, norm="none")
    net.readout.mode = "classifier"
    return net


def logits(net: fx.GraphModule, x: Tensor) -> Tensor:
    return net(x)[-1] if net.training else net(x)


def assert_same_logits(net: fx.GraphModule, model: nn.Module, *inputs: Tensor) -> None:
    """Compare to the bit; by default at several batch sizes of a model on (B, 6)."""
    for x in inputs or [torch.randn(batch, 6) for batch in (1, 2, 7)]:
        assert torch.equal(logits(net, x), model(x))


def leaf_names(net: fx.GraphModule) -> list[str]:
    return [leaf.qualname for leaf in net.plan.leaves]
