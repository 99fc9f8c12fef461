"""Attention over any number of axes has a form in ONNX. The oracle is the model itself."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx


class Attentions(nn.Module):
    """Residual layers of attention over three axes, masked and causal, and over five."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 24) for _ in range(3))
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 4)

    def attend(self, index: int, x: Tensor) -> Tensor:
        q, k, v = self.layers[index](x).chunk(3, dim=-1)
        below = torch.ones(x.shape[1], x.shape[1]).tril().bool()
        if index == 0:
            mask = (q @ k.transpose(1, 2) > 0) | below
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if index == 1:
            return F.scaled_dot_product_attention(
                query=q, key=k, value=v, is_causal=True, scale=0.3
            )
        q, k, v = (each.unflatten(-1, (2, 2, 2)).permute(0, 2, 3, 1, 4) for each in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, below).permute(0, 3, 1, 2, 4).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for index in range(3):
            x = x + self.attend(index, x)
        return self.head(x.mean(1))


def test_attention_over_three_and_five_axes_is_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Attentions().eval()
    x = torch.randn(3, 7, 6)
    net = sffx.transform(model, "residual", x, norm="none")
    path = sffx.export_onnx(net, tmp_path / "net.onnx", "classifier")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.as_tensor(found), model(x), rtol=1e-5, atol=1e-6)
