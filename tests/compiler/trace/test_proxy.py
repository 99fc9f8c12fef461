from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.compiler.trace.oracle import Applies, assert_same_logits, cut_without_norms
from tests.toys import around


class _Reshaping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = self.conv(x).shape
        tokens = self.conv(x).reshape(b, c, h * w).transpose(1, 2)
        return self.head(tokens.mean(1)) + (len(tokens.shape) - 3)


def test_shapes_stay_symbolic():
    model = _Reshaping().eval()
    first = lambda analysis: [analysis.candidates[0]]  # noqa: E731
    net = cut_without_norms(model, first, torch.zeros(1, 3, 4, 4))
    assert_same_logits(net, model, torch.randn(2, 3, 4, 4), torch.randn(5, 3, 6, 7))


def test_a_tensor_is_a_tensor_during_the_trace():
    scaled_if_tensor = Applies(lambda m, x: x * 10 if isinstance(x, Tensor) else x)
    model = around(scaled_if_tensor).eval()
    net = cut_without_norms(model)
    assert not net.plan.leaves
    assert_same_logits(net, model, torch.randn(3, 6))
