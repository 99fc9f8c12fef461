"""The models of timm, so that each class of module that it has is verified in some model.

There are three lists:

- the smallest architectures of each module of timm,
- a sample: the first 60 of the other names, sorted and shuffled by `random.Random(0)`, that have
  fewer than 30 million parameters,
- of all 1,371 names, the smallest for each set of module classes that the other lists do not have.
  Seven sets are left out, since their smallest model has more than 300 million parameters, and
  those of three encoders (`..._enc`), which return features and no scores.

Two names with the same set of classes differ in widths, depths and options.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tools.zoo.entries import CLASSES, Entry, Inputs
from tools.zoo.images import IMAGES, first_fitting

REQUIRES = ("timm",)

# Image sizes at which models with a fixed size are built, the smallest first.
_SMALL = (96, 128, 192)

_LISTS = ("timm_families.txt", "timm_sample.txt", "timm_classes.txt")


def entries() -> list[Entry]:
    listed = []
    for file in _LISTS:
        for line in (Path(__file__).parent / file).read_text().splitlines():
            if line and not line.startswith("#"):
                module, name = line.split()
                listed.append(Entry("timm", name, module))
    return listed


def build(entry: Entry) -> nn.Module:
    """Return the model; if it is made for one image size, for the smallest that it can be made for.

    At its own size, which may be 512, a model takes ten times the time and memory.
    """
    import timm

    cfg = timm.models.get_pretrained_cfg(entry.name)
    if cfg is not None and cfg.fixed_input_size:
        for side in _SMALL:
            model = _small(entry.name, side)
            if model is not None:
                return model
    return timm.create_model(entry.name, pretrained=False, num_classes=CLASSES)


def _small(name: str, side: int) -> nn.Module | None:
    """Return a model for images of a size; None if it cannot be made for them."""
    import timm

    try:
        model = timm.create_model(name, pretrained=False, num_classes=CLASSES, img_size=side)
        with torch.no_grad():
            model.eval()(torch.zeros(2, 3, side, side))
    except Exception:  # each family has its own ways to refuse a size
        return None
    return model.train()


def fitting_input(entry: Entry, model: nn.Module) -> Inputs:
    """Return random images of the smallest size that the model runs on, its own size last."""
    own = getattr(model, "default_cfg", {}).get("input_size", (3, IMAGES[0], IMAGES[0]))
    channels = own[0]
    return first_fitting(model, [*((channels, side, side) for side in IMAGES), tuple(own)])
