"""Self-attention against `torch.nn.MultiheadAttention`."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from sffx.kernels.activation import private_gradients
from sffx.kernels.attention import self_attention


def test_the_last_layer_of_attention_is_read_and_not_called_as_in_torch():
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 5, 8)
    attention.out_proj.register_forward_hook(lambda module, args, out: out + 1)
    torch.testing.assert_close(
        self_attention(x, attention), attention(x, x, x, need_weights=False)[0]
    )


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("private", [False, True])
def test_self_attention_is_that_of_torch(has_norm, bias, private):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, bias=bias, batch_first=True).double()
    norm = nn.LayerNorm(8).double() if has_norm else None
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    with private_gradients() if private else nullcontext():
        found = self_attention(x, attention, norm=norm)
    y = norm(x) if norm is not None else x
    expected = attention(y, y, y, need_weights=False)[0]
    torch.testing.assert_close(found, expected)
    wanted = [x, *attention.parameters(), *(norm.parameters() if has_norm else ())]
    gradients = torch.autograd.grad(found.square().sum(), wanted)
    for a, b in zip(gradients, torch.autograd.grad(expected.square().sum(), wanted), strict=True):
        torch.testing.assert_close(a, b)


def test_self_attention_drops_as_torch_does():
    attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    x = torch.randn(3, 5, 8)
    torch.manual_seed(0)
    found = self_attention(x, attention)
    torch.manual_seed(0)
    torch.testing.assert_close(found, attention(x, x, x, need_weights=False)[0])
    attention.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            self_attention(x, attention), attention(x, x, x, need_weights=False)[0]
        )


@pytest.mark.parametrize("shape", [(3, 5, 8), (1, 5, 8), (3, 1, 8), (4, 4, 8)])
@pytest.mark.parametrize("has_norm", [False, True])
def test_a_dropout_behind_it_drops_as_behind_torch(shape, has_norm):
    attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    norm = nn.LayerNorm(8) if has_norm else None
    x = torch.randn(shape, requires_grad=True)
    y = norm(x) if norm is not None else x
    for seed in range(3):
        torch.manual_seed(seed)
        found = nn.functional.dropout(self_attention(x, attention, norm=norm), 0.5)
        torch.manual_seed(seed)
        expected = nn.functional.dropout(attention(y, y, y, need_weights=False)[0], 0.5)
        torch.testing.assert_close(found, expected)


def test_the_result_is_laid_out_as_that_of_torch():
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 5, 8)
    found = self_attention(x, attention)
    assert found.stride() == attention(x, x, x, need_weights=False)[0].stride()
