"""Images of the smallest size that a model runs on."""

from __future__ import annotations

import torch
from torch import nn

from tools.zoo.entries import SAMPLES, Inputs

IMAGES = (64, 96, 128, 160, 192, 224, 240, 256, 288, 299, 320, 384, 448, 512, 56)
CLIPS = ((4, 32), (8, 64), (16, 64), (16, 112), (16, 224))


class NoInput(Exception):
    """The model runs on none of the inputs that were tried."""


def first_fitting(model: nn.Module, sizes: list[tuple[int, ...]]) -> Inputs:
    """Return random inputs of the first size of a sample that the model runs on.

    Raises:
        NoInput: the model runs on no size.
    """
    failure: Exception | None = None
    for size in sizes:
        x = torch.randn(SAMPLES, *size)
        try:
            with torch.no_grad():
                model.train()(x)
                model.eval()(x)
        except Exception as cause:
            failure = cause
        else:
            return {"x": x}
    raise NoInput(f"no input size is accepted, the last failed with {failure}")
