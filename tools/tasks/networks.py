"""Networks of the experiments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def convolutions(inputs: int, outputs: int) -> nn.Sequential:
    """Return two 3 x 3 convolutions with BN and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """Three encoder and two decoder stages with skips.

    Args:
        num_classes: J.
        width: channels of the first stage.
    """

    def __init__(self, num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.encoder_0 = convolutions(3, width)
        self.encoder_1 = convolutions(width, 2 * width)
        self.encoder_2 = convolutions(2 * width, 4 * width)
        self.decoder_1 = convolutions(6 * width, 2 * width)
        self.decoder_0 = convolutions(3 * width, width)
        self.output = nn.Conv2d(width, num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        first = self.encoder_0(image)
        second = self.encoder_1(F.max_pool2d(first, 2))
        third = self.encoder_2(F.max_pool2d(second, 2))
        up = F.interpolate(third, size=second.shape[2:])
        up = self.decoder_1(torch.cat([up, second], dim=1))
        up = F.interpolate(up, size=first.shape[2:])
        return self.output(self.decoder_0(torch.cat([up, first], dim=1)))


def lraspp(num_classes: int) -> nn.Module:
    """Return torchvision's LR-ASPP on MobileNetV3-large, from scratch.

    Its BN momentum of 0.01 lags where an epoch has few steps, so it is 0.1 here, for all methods.
    """
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=num_classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return model


class Layer(nn.Module):
    """A layer of a transformer that sees no later tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.attention(self.norm_1(x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """A language model of characters.

    Args:
        vocabulary: V.
        width: of a token's vector.
        layers: their number.
        length: of the longest text.
    """

    def __init__(self, vocabulary: int, width: int = 128, layers: int = 4, length: int = 128):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.layers = nn.Sequential(*(Layer(width, 4) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places[: ids.shape[1]]
        return self.output(self.norm(self.layers(x)))


def perceptron(inputs: int, width: int = 64) -> nn.Module:
    """Return three hidden layers with ReLU, and one number."""
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 1),
    )
