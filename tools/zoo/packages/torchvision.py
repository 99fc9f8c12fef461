"""The classifiers and segmentations of torchvision, and its detectors, which must be refused."""

from __future__ import annotations

from typing import Any

from torch import nn

from tools.zoo.entries import CLASSES, Entry, Inputs
from tools.zoo.images import CLIPS, IMAGES, first_fitting

REQUIRES = ("torchvision",)


def entries() -> list[Entry]:
    from torchvision import models

    parts = {
        "classification": models,
        "video": models.video,
        "quantizable": models.quantization,
        "detection": models.detection,
        "segmentation": models.segmentation,
        "optical_flow": models.optical_flow,
    }
    listed = []
    for group, part in parts.items():
        for name in models.list_models(module=part):
            listed.append(Entry("torchvision", name, group))
    return listed


def build(entry: Entry) -> nn.Module:
    from torchvision import models

    options: dict[str, Any] = {} if entry.refused else {"num_classes": CLASSES}
    if entry.group in ("detection", "segmentation"):
        options["weights_backbone"] = None
    if entry.name.startswith("vit_"):
        options["image_size"] = 4 * int(entry.name[-2:])  # 16 patches
    return models.get_model(entry.name, weights=None, **options)


def fitting_input(entry: Entry, model: nn.Module) -> Inputs:
    """Return random images, or clips, of the smallest size that the model runs on."""
    if entry.group == "video":
        return first_fitting(model, [(3, frames, side, side) for frames, side in CLIPS])
    return first_fitting(model, [(3, side, side) for side in IMAGES])
