"""Classifiers of vit-pytorch, in small configurations."""

from __future__ import annotations

import torch
from torch import nn

from tools.zoo.entries import CLASSES, SAMPLES, Inputs, Model

REQUIRES = ("vit-pytorch", "einops")


SMALL = {
    "image_size": 32,
    "patch_size": 8,
    "num_classes": CLASSES,
    "dim": 32,
    "depth": 4,
    "heads": 2,
    "mlp_dim": 64,
}


def _images() -> Inputs:
    return {"x": torch.randn(SAMPLES, 3, 32, 32)}


def _vit() -> nn.Module:
    from vit_pytorch import ViT

    return ViT(**SMALL)


MODELS = {"vit": Model(_vit, _images)}
