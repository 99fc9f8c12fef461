"""Backbones of kornia with a linear layer behind them, and its classifier TinyViT."""

from __future__ import annotations

from torch import Tensor, nn

from tools.zoo.entries import CLASSES, Model, random_inputs

REQUIRES = ("kornia", "kornia-rs")


class MeanOfTokens(nn.Module):
    """The mean of tokens (B, T, C) over T."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def _vit() -> nn.Module:
    from kornia.models.vit import VisionTransformer

    backbone = VisionTransformer(
        image_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, dropout_rate=0.1
    )
    return nn.Sequential(backbone, MeanOfTokens(), nn.Linear(32, CLASSES))


def _tiny_vit() -> nn.Module:
    from kornia.models.tiny_vit import TinyViT

    model: nn.Module = TinyViT(
        img_size=64,
        num_classes=CLASSES,
        embed_dims=(16, 32, 48, 64),
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 3, 4),
        window_sizes=(4, 4, 4, 2),
    )
    return model


def _mobile_vit() -> nn.Module:
    from kornia.models.vit_mobile import MobileViT

    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(MobileViT("xxs"), pool, nn.Flatten(), nn.Linear(320, CLASSES))


MODELS = {
    "vit": Model(_vit, random_inputs(x=(3, 32, 32))),
    "tiny_vit": Model(_tiny_vit, random_inputs(x=(3, 64, 64))),
    "mobile_vit_xxs": Model(_mobile_vit, random_inputs(x=(3, 256, 256))),
}
