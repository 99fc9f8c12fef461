"""Shorter models in the place of torchvision's, for tests of code that only uses a model.

They have the same kinds of layers and fewer of them. An export to ONNX takes seconds for each dozen
of layers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torchvision
from torch import nn
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from torchvision.models.resnet import BasicBlock, ResNet


def resnet18(**options: Any) -> nn.Module:
    """Return a ResNet with one block instead of two in three of its four stages."""
    return ResNet(BasicBlock, [1, 1, 2, 1], **options)


def mobilenet_v3_small(**options: Any) -> nn.Module:
    """Return a MobileNet with three inverted residuals instead of eleven."""
    setting = [
        InvertedResidualConfig(16, 3, 16, 16, True, "RE", 2, 1, 1.0),
        InvertedResidualConfig(16, 3, 72, 24, False, "RE", 2, 1, 1.0),
        InvertedResidualConfig(24, 5, 96, 24, True, "HS", 1, 1, 1.0),
    ]
    return MobileNetV3(setting, last_channel=64, **options)


def use(patch: pytest.MonkeyPatch) -> None:
    """Put the shorter models in the place of torchvision's."""
    shorter = {"resnet18": resnet18, "mobilenet_v3_small": mobilenet_v3_small}
    get_model = torchvision.models.get_model

    def get_shorter(name: str, **options: Any) -> nn.Module:
        return shorter[name](**options) if name in shorter else get_model(name, **options)

    for name, build in shorter.items():
        patch.setattr(torchvision.models, name, build)
    patch.setattr(torchvision.models, "get_model", get_shorter)
