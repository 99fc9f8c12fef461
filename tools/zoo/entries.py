"""The models of the zoos: what an entry is, and which zoos there are."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

RESULTS = Path(__file__).parent.parent / "results" / "zoo"

CLASSES = 10
SAMPLES = 3

# Groups of models that have no task, and must be refused with a helpful error.
REFUSED_GROUPS = ("detection", "optical_flow")

# Each zoo, by the name that `pip` knows it by, and its module in `tools.zoo.packages`.
ZOOS = {
    "torchvision": "torchvision",
    "timm": "timm",
    "transformers": "transformers",
    "vit-pytorch": "vit_pytorch",
    "x-transformers": "x_transformers",
    "monai": "monai",
    "ultralytics": "ultralytics",
    "spikingjelly": "spikingjelly",
    "snntorch": "snntorch",
    "pytorchcv": "pytorchcv",
    "tsai": "tsai",
    "braindecode": "braindecode",
    "kornia": "kornia",
    "rtdl-revisiting-models": "rtdl_revisiting_models",
    "segmentation-models-pytorch": "segmentation_models_pytorch",
    "torch-geometric": "torch_geometric",
}

# What `requests` needs as well, for a package that imports it.
REQUESTS = ("requests", "urllib3", "certifi", "charset-normalizer")

# The arguments of a call by keyword; "x" alone is passed by position.
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One model of a zoo.

    Attributes:
        zoo: the package that it comes from.
        name: in that package; unique in the zoo.
        group: the kind that the table lists it under, which tells the task. Models of
            `REFUSED_GROUPS` have none, and must be refused with a helpful error.
    """

    zoo: str
    name: str
    group: str = "classification"

    @property
    def path(self) -> Path:
        return RESULTS / self.zoo / f"{self.name}.json"

    @property
    def refused(self) -> bool:
        return self.group in REFUSED_GROUPS


@dataclass(frozen=True)
class Model:
    """A model of a package that lists its models in a table.

    Attributes:
        build: makes the classifier, small, with `CLASSES` classes and random weights. It imports
            the package.
        inputs: makes the arguments of a call, for `SAMPLES` samples.
        group: as in `Entry`.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    group: str = "classification"


def model_of(
    module: str, class_name: str, options: dict[str, Any], inputs: Callable[[], Inputs]
) -> Model:
    """Return the entry of a class of a package, which is imported when a model is built."""

    def build() -> nn.Module:
        model: nn.Module = getattr(importlib.import_module(module), class_name)(**options)
        return model

    return Model(build, inputs)


def random_inputs(**shapes: tuple[int, ...]) -> Callable[[], Inputs]:
    """Return a maker of random floats; each argument has the shape of one sample."""

    def make() -> Inputs:
        return {name: torch.randn(SAMPLES, *shape) for name, shape in shapes.items()}

    return make


def package(zoo: str) -> ModuleType:
    """Return the module of a zoo.

    Such a module has `REQUIRES`, what pip installs for it, and either `MODELS`, a table {name:
    Model}, or functions of its own: `entries()`, `build(entry)` and `fitting_input(entry, model)`.
    """
    return importlib.import_module(f"tools.zoo.packages.{ZOOS[zoo]}")


def entries(zoo: str) -> list[Entry]:
    """Return the models of a zoo; of timm, the smallest of each module and a sample of others."""
    module = package(zoo)
    if hasattr(module, "MODELS"):
        return [Entry(zoo, name, model.group) for name, model in module.MODELS.items()]
    return list(module.entries())


def build(entry: Entry) -> nn.Module:
    """Build a model with random weights."""
    module = package(entry.zoo)
    if not hasattr(module, "MODELS"):
        model: nn.Module = module.build(entry)
        return model
    listed: Model = module.MODELS[entry.name]
    return listed.build()


def fitting_input(entry: Entry, model: nn.Module) -> Inputs:
    """Return random inputs for `SAMPLES` samples, of the smallest size that the model runs on."""
    module = package(entry.zoo)
    if not hasattr(module, "MODELS"):
        inputs: Inputs = module.fitting_input(entry, model)
        return inputs
    listed: Model = module.MODELS[entry.name]
    return listed.inputs()
