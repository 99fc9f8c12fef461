"""The paper's networks for small and large images."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import nn
from torchvision.models import get_model, mobilenet_v3_large, mobilenet_v3_small, resnet18
from torchvision.models.resnet import BasicBlock, ResNet

WIDTHS = (20, 40, 80, 80)


class ConvNet(nn.Sequential):
    """Four 3 x 3 convolutions, each with ReLU and a pool, with BN or without, and a linear classifier: CNNB and CNN of section 3.

    Takes (B, 3, H, W), H and W multiples of 16; returns (B, J).
    """

    def __init__(self, num_classes: int, size: int, batchnorm: bool) -> None:
        super().__init__()
        for i, (before, after) in enumerate(pairwise((3, *WIDTHS))):
            layers: list[nn.Module] = [nn.Conv2d(before, after, 3, padding=1)]
            layers += [nn.BatchNorm2d(after)] if batchnorm else []
            self.add_module(
                f"layer{i}", nn.Sequential(*layers, nn.ReLU(inplace=True), nn.MaxPool2d(2))
            )
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(WIDTHS[-1] * (size // 16) ** 2, num_classes)


def _small_stem(model: nn.Module, name: str, like: nn.Conv2d) -> nn.Module:
    """Put a first convolution of stride 1 in the place of one of stride 2, as the paper does for images of 32 x 32."""
    model.set_submodule(
        name, nn.Conv2d(3, like.out_channels, 3, padding=1, bias=like.bias is not None)
    )
    return model


def _resnet18(num_classes: int, size: int) -> nn.Module:
    model = resnet18(num_classes=num_classes)
    if size > 64:
        return model
    model.set_submodule("maxpool", nn.Identity())
    return _small_stem(model, "conv1", model.conv1)


def narrow_resnet18(num_classes: int, size: int) -> nn.Module:
    """ResNet18 with a quarter of the channels, a stem of stride 1 and no pool, for images of 32 x 32 on a small machine."""

    class Narrow(ResNet):
        def _make_layer(
            self,
            block: type[nn.Module],
            planes: int,
            blocks: int,
            stride: int = 1,
            dilate: bool = False,
        ) -> nn.Sequential:
            self.inplanes = 16 if planes == 64 else self.inplanes
            return super()._make_layer(block, planes // 4, blocks, stride, dilate)

    model = Narrow(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
    model.conv1, model.bn1, model.maxpool = (
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.Identity(),
    )
    model.fc = nn.Linear(128, num_classes)
    return model


def _mobilenet(make, num_classes: int, size: int) -> nn.Module:
    model = make(num_classes=num_classes)
    return model if size > 64 else _small_stem(model, "features.0.0", model.features[0][0])


NETWORKS = {
    "CNN": lambda classes, size: ConvNet(classes, size, batchnorm=False),
    "CNNB": lambda classes, size: ConvNet(classes, size, batchnorm=True),
    "ResNet18": _resnet18,
    "ResNet18/4": narrow_resnet18,
    "MobileNetV3-large": lambda classes, size: _mobilenet(mobilenet_v3_large, classes, size),
    "MobileNetV3-small": lambda classes, size: _mobilenet(mobilenet_v3_small, classes, size),
}


TORCHVISION = {
    "ResNet18": "resnet18",
    "MobileNetV3-large": "mobilenet_v3_large",
    "MobileNetV3-small": "mobilenet_v3_small",
}


def torchvision_weights(network: str) -> dict[str, torch.Tensor]:
    """Download, where need be, what torchvision trained on ImageNet."""
    return get_model(TORCHVISION[network], weights="DEFAULT").state_dict()


def transfer(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Load the weights of a trained network of the same kind, but for the last layer, which is that of its classes."""
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    model.load_state_dict(
        {
            **model.state_dict(),
            **{name: w for name, w in weights.items() if name.rpartition(".")[0] != last},
        }
    )


def build(network: str, num_classes: int, size: int, momentum: float | None = None) -> nn.Module:
    """Build a network for images of size x size; `momentum` is that of its batch norms, None for the network's own."""
    model = NETWORKS[network](num_classes, size)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and momentum is not None:
            module.momentum = momentum
    return model


def classifier_of(model: nn.Module) -> nn.Module:
    """Return the layers that are the classifier in the cut model too."""
    return model.fc if hasattr(model, "fc") else model.classifier


def example(size: int) -> torch.Tensor:
    return torch.zeros(1, 3, size, size)
