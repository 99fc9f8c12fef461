"""Hooks on the parts of a model: what they keep, and the gradients that they are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.errors import TraceError
from tests.compiler.trace.oracle import assert_same_logits, cut_without_norms, leaf_names


class _Taps(nn.Module):
    """Reads features that hooks on inner layers keep: on (B, 6)."""

    def __init__(self, *layers: str) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.b = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8 * len(layers), 4)
        self.features: dict[str, Tensor] = {}
        self.names = {self.get_submodule(name): name for name in layers}
        for layer in self.names:
            layer.register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self.features[self.names[layer]] = output

    def forward(self, x: Tensor) -> Tensor:
        self.b(self.a(x))
        return self.head(torch.cat(list(self.features.values()), 1))


@pytest.mark.parametrize("layers", [("a.2", "b.2"), ("a.0", "b"), ("a.1", "b.1")])
def test_a_forward_reads_what_hooks_keep(layers):
    torch.manual_seed(0)
    model, x = _Taps(*layers), torch.randn(5, 6)
    net = cut_without_norms(model, "layer", x)
    for module in (model, net):
        module.train()
    assert_same_logits(net, model, x, x[:3])
    for module in (model, net):
        module.eval()
    assert_same_logits(net, model, x)
    assert_same_logits(sffx.extract(net), model, x)
    assert leaf_names(net) == []
    (note,) = [each for each in net.plan.notes if each.startswith("hooks of")]
    assert all(name in note for name in layers)


class _Unbatched(nn.Module):
    """A layer with a branch on values."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


def test_a_layer_whose_hook_is_read_and_that_no_trace_holds_is_named():
    model = _Taps("a.2", "b.2")
    model.b[2] = _Unbatched()
    model.names[model.b[2]] = "b.2"
    model.b[2].register_forward_hook(model._keep)
    message = r"reads what a hook of b\.2, a _Unbatched, may have kept.*branch depends on"
    with pytest.raises(TraceError, match=message):
        sffx.plan(model, "layer", torch.randn(5, 6))


class _Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.b = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)))


def _gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model(x).square().sum().backward()
    return [parameter.grad for parameter in model.b.parameters()]


def _doubled(module: nn.Module, *gradients: Any) -> Any:
    # The first layer of a block computes no gradient of its input.
    return tuple(None if each is None else 2 * each for each in gradients[0])


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_module_with_a_backward_hook_is_a_leaf(hook):
    torch.manual_seed(0)
    model, x = _Halves(), torch.randn(5, 6)
    getattr(model.b, hook)(_doubled)
    net = sffx.transform(model, ["a_1"], x, norm="none", check=True)
    assert leaf_names(net) == ["b"]
    assert net.plan.leaves[0].reason == "has a backward hook"
    net(x)[-1].square().sum().backward()
    found = [parameter.grad for parameter in net.classifier.parameters()][
        : len(list(model.b.parameters()))
    ]
    assert found
    for gradient, expected in zip(found, _gradients(model, x), strict=True):
        torch.testing.assert_close(gradient, expected)
