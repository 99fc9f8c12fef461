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


def test_a_comparison_with_one_outcome_at_all_batch_sizes_is_a_number():
    code = lambda m, x: x * (2 + int(x.shape[0] == -1) + int(x.shape[0] > 0))  # noqa: E731
    model = around(Applies(code)).eval()
    net = cut_without_norms(model)
    assert not net.plan.leaves
    assert_same_logits(net, model, torch.randn(3, 6), torch.randn(1, 6))


def test_a_comparison_that_the_batch_decides_is_no_number():
    code = lambda m, x: x * (2 + int(x.shape[0] == 1))  # noqa: E731
    net = cut_without_norms(around(Applies(code)))
    assert len(net.plan.leaves) == 1


def test_no_tensor_can_be_called_during_the_trace():
    """`default(x, make)` of many packages calls what can be called."""

    def forward(module: Applies, x: Tensor) -> Tensor:
        return x() if callable(x) else x * 2

    model = around(Applies(forward)).eval()
    net = cut_without_norms(model)
    assert not net.plan.leaves
    assert_same_logits(net, model, torch.randn(3, 6))
    assert callable(torch.fx.Proxy(torch.fx.Graph().placeholder("x")))  # after it as before


def test_a_tensor_is_a_tensor_during_the_trace():
    scaled_if_tensor = Applies(lambda m, x: x * 10 if isinstance(x, Tensor) else x)
    model = around(scaled_if_tensor).eval()
    net = cut_without_norms(model)
    assert not net.plan.leaves
    assert_same_logits(net, model, torch.randn(3, 6))
