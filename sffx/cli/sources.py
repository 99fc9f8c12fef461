"""Models that packages have by name, `timm:NAME` and `hf:CONFIG_CLASS`.

They are made without pretrained weights and without a network.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sffx.errors import InputError

# The number of tokens in an example; a model's graph does not depend on it.
TOKENS = 16

# Where transformers maps classes of configurations to classes of classifiers.
HF_CLASSIFIERS = (
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",
)


def timm_model(name: str, num_classes: int | None = None, *, filled: bool = False) -> nn.Module:
    """Return a model of timm.

    Args:
        name: as timm has it.
        num_classes: of the classifier; timm's own number if None.
        filled: whether its parameters have random values, not only shapes.

    Raises:
        InputError: timm is not installed or knows no such model.
    """
    timm = _package("timm", f"timm:{name}")
    # A name may have a tag, "resnet18.a1_in1k". It chooses weights, which are not loaded here.
    if not timm.is_model(name):
        near = _near(name, timm.list_models()) or "timm.list_models() lists them"
        raise InputError(f"timm has no model {name!r}. Hint: {near}")
    options = {} if num_classes is None else {"num_classes": num_classes}
    return _made(lambda: timm.create_model(name, **options), filled)


def hf_model(name: str, num_classes: int | None = None, *, filled: bool = False) -> nn.Module:
    """Return the classifier of transformers for a class of configurations, as it is by default.

    `BertConfig` gives a BertForSequenceClassification.

    Args:
        name: of the class of configurations.
        num_classes: of the classifier; the configuration's own number if None.
        filled: whether its parameters have random values, not only shapes.

    Raises:
        InputError: transformers is not installed, knows no such configuration or has no
            classifier for it.
    """
    transformers = _package("transformers", f"hf:{name}")
    config_class = getattr(transformers, name, None) if name.endswith("Config") else None
    if not isinstance(config_class, type):
        all_configs = [each for each in dir(transformers) if each.endswith("Config")]
        near = _near(name, all_configs) or "hf:BertConfig"
        raise InputError(f"transformers has no configuration {name!r}. Hint: {near}")
    model_class = _hf_classifier(config_class)
    if model_class is None:
        raise InputError(
            f"transformers has no classifier of sequences, images or audio for {name}. "
            "Hint: hf:BertConfig, hf:ViTConfig"
        )
    options = {} if num_classes is None else {"num_labels": num_classes}
    config = _traceable(config_class(**options))
    return _made(lambda: model_class(config), filled)


def token_example(model: nn.Module) -> dict[str, Tensor] | None:
    """Return example inputs of a model that reads tokens, all of them real.

    Other models get None: `sffx.plan` infers their input.
    """
    arguments = inspect.signature(model.forward).parameters
    if "input_ids" not in arguments:
        return None
    names = [name for name in ("input_ids", "attention_mask") if name in arguments]
    return {name: torch.ones(1, TOKENS, dtype=torch.long) for name in names}


SOURCES: dict[str, Callable[..., nn.Module]] = {"timm": timm_model, "hf": hf_model}


def _hf_classifier(config_class: type) -> Any:
    """Return the class of the classifier for a class of configurations, None if there is none."""
    mappings = importlib.import_module("transformers.models.auto.modeling_auto")
    for name in HF_CLASSIFIERS:
        mapping = getattr(mappings, name)
        if config_class in mapping:
            classifiers = mapping[config_class]
            # Some configurations have several classes of models, the plain classifier first.
            return classifiers[0] if isinstance(classifiers, tuple) else classifiers
    return None


def _package(name: str, source: str) -> ModuleType:
    """Return a package without its warnings.

    Raises:
        InputError: it cannot be imported.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"{source} needs the package {name!r}, which cannot be imported: {error}. "
            f"Hint: pip install {name}"
        ) from error


def _near(name: str, all_names: Iterable[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, list(all_names), n=5))


def _traceable(config: Any) -> Any:
    """Return a configuration whose model can be traced and classifies.

    What only training needs and a graph cannot hold is switched off. The padding that a classifier
    asks for is set.
    """
    if getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = 0
    if hasattr(config, "layerdrop"):
        config.layerdrop = 0.0
    if hasattr(config, "apply_spec_augment"):
        config.apply_spec_augment = False
    return config


def _made(make: Callable[[], nn.Module], filled: bool) -> nn.Module:
    return make() if filled else _without_weights(make)


def _without_weights(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a model whose parameters have shapes and no values, so that it takes no memory.

    A model that reads its parameters while it is made gets values.
    """
    try:
        with torch.device("meta"):
            return make()
    except (NotImplementedError, RuntimeError):
        return make()
