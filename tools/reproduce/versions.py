"""What a record was made with, and when."""

from __future__ import annotations

import platform
from datetime import date

import torch
import torchvision


def versions() -> dict[str, str]:
    return {
        "date": str(date.today()),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
