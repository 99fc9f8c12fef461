"""The paper's networks for small and large images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torchvision.models import get_model, mobilenet_v3_large, mobilenet_v3_small, resnet18
from torchvision.models.resnet import BasicBlock, ResNet

from sffx.learning.norms import LengthNorm

WIDTHS = (20, 40, 80, 80)

# Larger images go through the network's own stem.
SMALL = 64


class ConvNet(nn.Sequential):
    """CNNB and CNN of section 3: four 3 x 3 convolutions and a linear classifier.

    Each convolution has a ReLU and a pool, with BN or without. Takes (B, 3, H, W), H and W
    multiples of 16, and returns (B, J).
    """

    def __init__(self, num_classes: int, size: int, batchnorm: bool) -> None:
        super().__init__()
        for i, (before, after) in enumerate(pairwise((3, *WIDTHS))):
            layers: list[nn.Module] = [nn.Conv2d(before, after, 3, padding=1)]
            if batchnorm:
                layers.append(nn.BatchNorm2d(after))
            layers += [nn.ReLU(inplace=True), nn.MaxPool2d(2)]
            self.add_module(f"layer{i}", nn.Sequential(*layers))
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(WIDTHS[-1] * (size // 16) ** 2, num_classes)


def _cnn(num_classes: int, size: int) -> nn.Module:
    return ConvNet(num_classes, size, batchnorm=False)


def _wide_kernels(num_classes: int, size: int) -> nn.Module:
    """Return three convolutions for grey images, whose kernels see a good part of a wave."""
    layers: list[nn.Module] = []
    for before, after, kernel in ((1, 16, 7), (16, 32, 5), (32, 32, 5)):
        convolution = nn.Conv2d(before, after, kernel, padding=kernel // 2)
        layers.append(nn.Sequential(convolution, nn.ReLU(inplace=True), nn.MaxPool2d(2)))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * (size // 8) ** 2, num_classes))


def _cnnb(num_classes: int, size: int) -> nn.Module:
    return ConvNet(num_classes, size, batchnorm=True)


def _with_small_stem(model: nn.Module, name: str) -> nn.Module:
    """Give the first convolution stride 1, as the paper does for images of 32 x 32."""
    first: Any = model.get_submodule(name)
    has_bias = first.bias is not None
    model.set_submodule(name, nn.Conv2d(3, first.out_channels, 3, padding=1, bias=has_bias))
    return model


def _resnet18(num_classes: int, size: int) -> nn.Module:
    model = resnet18(num_classes=num_classes)
    if size > SMALL:
        return model
    model.set_submodule("maxpool", nn.Identity())
    return _with_small_stem(model, "conv1")


class _NarrowResNet(ResNet):
    """A ResNet with a quarter of the channels."""

    def _make_layer(
        self,
        block: type[nn.Module],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        if planes == 64:  # the first layer reads the narrow stem
            self.inplanes = 16
        return super()._make_layer(block, planes // 4, blocks, stride, dilate)


class Perceptron(nn.Sequential):
    """Linear layers with ReLU. Takes (B, 1, H, W) and returns (B, J).

    Args:
        num_classes: J.
        size: H and W.
        widths: units of each layer.
        normalised: whether the input is brought to unit mean square, as Forward-Forward has it.
    """

    def __init__(
        self, num_classes: int, size: int, widths: tuple[int, ...], normalised: bool
    ) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        if normalised:
            self.norm = LengthNorm()
        for i, (before, after) in enumerate(pairwise((size**2, *widths))):
            self.add_module(f"layer{i}", nn.Sequential(nn.Linear(before, after), nn.ReLU()))
        self.classifier = nn.Linear(widths[-1], num_classes)


def _perceptron(*widths: int, normalised: bool = True) -> Callable[[int, int], nn.Module]:
    def make(num_classes: int, size: int) -> nn.Module:
        return Perceptron(num_classes, size, widths, normalised)

    return make


class CFSE(nn.Sequential):
    """Blocks that extract and separate features by channel (arXiv 2312.12668, figure 1).

    A layer is a 3 x 3 convolution, ReLU and BN, and every second layer has a pool before its BN.
    Every second layer separates: its convolution has a group for each class, or superclass. The
    layer before it extracts, and has one group. The classifier is the softmax layer of the paper.
    Takes (B, C, H, W) and returns (B, J).

    Args:
        num_classes: J.
        size: height and width of the images.
        channels: C, of the images.
        widths: channels of each layer, multiples of the number of classes from the second one on.
        superclasses: how many each layer tells apart, J where None.
    """

    def __init__(
        self,
        num_classes: int,
        size: int,
        channels: int,
        widths: tuple[int, ...] = (20, 80, 240, 480),
        superclasses: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        separated = superclasses or (num_classes,) * len(widths)
        for i, (before, after) in enumerate(pairwise((channels, *widths))):
            separates = i % 2 == 1
            groups = separated[i] if separates else 1
            layers = [nn.Conv2d(before, after, 3, padding=1, groups=groups), nn.ReLU()]
            if separates:
                layers.append(nn.MaxPool2d(2))
                size //= 2
            layers.append(nn.BatchNorm2d(after, eps=1e-4))
            self.add_module(f"layer{i}", nn.Sequential(*layers))
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(widths[-1] * size**2, num_classes)


def _cfse(num_classes: int, size: int) -> nn.Module:
    if num_classes != 100:
        return CFSE(num_classes, size, channels=3)
    widths = (60, 120, 240, 400, 800, 1600)
    return CFSE(num_classes, size, 3, widths, (20, 20, 20, 20, 100, 100))


def _grey_cfse(num_classes: int, size: int) -> nn.Module:
    return CFSE(num_classes, size, channels=1)


def _narrow_grey_cfse(num_classes: int, size: int) -> nn.Module:
    return CFSE(num_classes, size, channels=1, widths=(20, 40, 120, 240))


def narrow_resnet18(num_classes: int, size: int) -> nn.Module:
    """Return a ResNet18 with a quarter of the channels, a stem of stride 1, and no pool.

    It is for images of 32 x 32 on a small machine.
    """
    model = _NarrowResNet(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    model.bn1 = nn.BatchNorm2d(16)
    model.maxpool = nn.Identity()
    model.fc = nn.Linear(128, num_classes)
    return model


def _mobilenet_large(num_classes: int, size: int) -> nn.Module:
    model = mobilenet_v3_large(num_classes=num_classes)
    return model if size > SMALL else _with_small_stem(model, "features.0.0")


def _mobilenet_small(num_classes: int, size: int) -> nn.Module:
    model = mobilenet_v3_small(num_classes=num_classes)
    return model if size > SMALL else _with_small_stem(model, "features.0.0")


# Each makes a network from the number of classes and the size of the images.
NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "CNN": _cnn,
    "CNN 7 x 7, grey": _wide_kernels,
    "CNNB": _cnnb,
    "ResNet18": _resnet18,
    "ResNet18/4": narrow_resnet18,
    "MobileNetV3-large": _mobilenet_large,
    "MobileNetV3-small": _mobilenet_small,
    "CFSE": _cfse,
    "CFSE, grey": _grey_cfse,
    "CFSE/2, grey": _narrow_grey_cfse,
    "MLP 3 x 1000": _perceptron(1000, 1000, 1000),
    "MLP 4 x 2000": _perceptron(2000, 2000, 2000, 2000),
    "MLP 2 x 2000": _perceptron(2000, 2000, normalised=False),
    "MLP 2 x 500": _perceptron(500, 500),
}


TORCHVISION = {
    "ResNet18": "resnet18",
    "MobileNetV3-large": "mobilenet_v3_large",
    "MobileNetV3-small": "mobilenet_v3_small",
}


def torchvision_weights(network: str) -> dict[str, torch.Tensor]:
    """Return weights that torchvision trained on ImageNet; they are downloaded where need be."""
    return get_model(TORCHVISION[network], weights="DEFAULT").state_dict()


def transfer(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Load the weights of a trained network of the same kind, except for the last layer's.

    The last layer belongs to the classes that the network was trained for.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    last = linear[-1]
    state = model.state_dict()
    for name, weight in weights.items():
        if name.rpartition(".")[0] != last:
            state[name] = weight
    model.load_state_dict(state)


def build(network: str, num_classes: int, size: int, momentum: float | None = None) -> nn.Module:
    """Build a network.

    Args:
        network: a name in `NETWORKS`.
        num_classes: J.
        size: height and width of the images.
        momentum: of its batch norms; None keeps the network's own.
    """
    model = NETWORKS[network](num_classes, size)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and momentum is not None:
            module.momentum = momentum
    return model


def classifier_of(model: nn.Module) -> nn.Module:
    """Return the layers that are the classifier in the cut model too."""
    if isinstance(model, nn.Sequential):
        return model[-1]
    return model.get_submodule("fc" if hasattr(model, "fc") else "classifier")


def example(size: int, channels: int = 3) -> torch.Tensor:
    return torch.zeros(1, channels, size, size)
