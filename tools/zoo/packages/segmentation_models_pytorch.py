"""Models of segmentation: U-Nets, pyramids and DeepLabs on several encoders."""

from __future__ import annotations

from torch import nn

from tools.zoo.entries import CLASSES, Entry, Inputs
from tools.zoo.images import first_fitting

REQUIRES = ("segmentation-models-pytorch",)

# By architecture, the encoders. "tu-" is a model of timm.
_ENCODERS = {
    "Unet": ("resnet18", "mobilenet_v2", "tu-hrnet_w18_small"),
    "DeepLabV3Plus": ("resnet18", "mobilenet_v2"),
    "FPN": ("resnet18", "mobilenet_v2"),
    "Linknet": ("resnet18", "mobilenet_v2"),
    "UnetPlusPlus": ("resnet18",),
    "MAnet": ("resnet18",),
    "PSPNet": ("resnet18",),
    "DeepLabV3": ("resnet18",),
    "PAN": ("resnet18",),
    "UPerNet": ("resnet18",),
    "Segformer": ("mit_b0",),
}

_SIDES = (64, 96, 128, 256)


def entries() -> list[Entry]:
    listed = []
    for architecture, encoders in _ENCODERS.items():
        for encoder in encoders:
            name = f"{architecture}-{encoder}"
            listed.append(Entry("segmentation-models-pytorch", name, "segmentation"))
    return listed


def build(entry: Entry) -> nn.Module:
    import segmentation_models_pytorch as models

    architecture, encoder = entry.name.split("-", 1)
    model: nn.Module = getattr(models, architecture)(encoder, encoder_weights=None, classes=CLASSES)
    return model


def fitting_input(entry: Entry, model: nn.Module) -> Inputs:
    """Return random images of the smallest size that the model runs on."""
    return first_fitting(model, [(3, side, side) for side in _SIDES])
