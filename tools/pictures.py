"""Draw the pictures that the README shows: python tools/pictures.py"""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision

import sffx
from sffx.draw.render import draw

PICTURES = Path(__file__).parent.parent / "examples" / "pictures"
MODELS = {
    "resnet18": "residual",
    "mobilenet_v3_small": "residual",
    "vit_b_16": "residual",
    "densenet121": "residual",
    "vgg11_bn": "batchnorm",
}

if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    for name, policy in MODELS.items():
        with torch.device("meta"):
            model = torchvision.models.get_model(name)
        print(draw(sffx.plan(model, policy), PICTURES / f"{name}.png"))
