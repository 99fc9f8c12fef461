"""A classifier may be a function of weights in the model's own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx


class _Layers(nn.Module):
    """Three layers and a function of features and a weight, (4, 8): on (B, 6)."""

    def __init__(self, score: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.fc = nn.Linear(8, 4, bias=False)
        self.score = score

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.b(self.a(x).relu()).relu()).relu()
        return self.score(x, self.fc.weight)


@pytest.mark.parametrize(
    "score",
    [
        F.linear,
        lambda x, w: F.linear(F.normalize(x), F.normalize(w)),
        lambda x, w: x @ w.T,
        lambda x, w: torch.mm(x, w.t() / w.shape[1] ** 0.5),
        lambda x, w: torch.einsum("bi,ij->bj", x, torch.cat([w[:2], w[2:]]).T),
        lambda x, w: -torch.cdist(x, w),
    ],
)
@pytest.mark.parametrize("policy", ["residual", "layer"])
def test_what_is_made_of_weights_is_a_weight(score, policy):
    model = _Layers(score)
    net = sffx.transform(model, policy, torch.randn(4, 6), norm="none", check=True)
    assert len(net.plan) == 3
    assert net.plan.classifier.parameters == ("fc.weight",)


class _Mapped(_Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.b(self.a(x).relu()).relu()).relu()
        return torch.vmap(lambda row: x @ row)(self.fc.weight).T


def test_a_mapped_function_of_a_weight_is_a_layer():
    net = sffx.transform(_Mapped(None), "layer", torch.randn(4, 6), norm="none", check=True)
    assert net.plan.classifier.parameters == ("fc.weight",)


def test_a_product_of_features_is_no_layer_with_a_weight():
    model = _Layers(lambda x, w: x @ (x[:, :4].T @ x).T + 0 * w.sum())
    assert len(sffx.plan(model, "layer", torch.randn(4, 6))) == 2
