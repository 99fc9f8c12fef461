"""Models that packages know by name, `timm:NAME` and `hf:CONFIG_CLASS`: their graphs, without weights and without a network."""

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

# Tokens of an example; a model's graph does not depend on how many there are.
TOKENS = 16

# Where transformers keeps the classes of classifiers by the class of their configuration.
HF_TASKS = tuple(
    f"MODEL_FOR_{task}_CLASSIFICATION_MAPPING" for task in ("SEQUENCE", "IMAGE", "AUDIO")
)


def timm_model(name: str, num_classes: int | None = None, *, filled: bool = False) -> nn.Module:
    """A model of timm, by its name there.

    Args:
        name: as timm has it.
        num_classes: of the classifier; timm's own number if None.
        filled: whether its parameters have values, random ones, and not only shapes.

    Raises:
        InputError: timm is not installed or knows no such model.
    """
    timm = _package("timm", f"timm:{name}")
    if name not in timm.list_models():
        raise InputError(
            f"timm has no model {name!r}. Hint: {_near(name, timm.list_models(), 'timm.list_models() lists them')}"
        )
    options = {} if num_classes is None else {"num_classes": num_classes}
    return _made(lambda: timm.create_model(name, **options), filled)


def hf_model(name: str, num_classes: int | None = None, *, filled: bool = False) -> nn.Module:
    """The classifier of transformers for a class of configurations, as it is by default: `BertConfig` gives BertForSequenceClassification.

    Args:
        name: of the class of configurations.
        num_classes: of the classifier; the configuration's own number if None.
        filled: whether its parameters have values, random ones, and not only shapes.

    Raises:
        InputError: transformers is not installed, knows no such configuration or has no classifier for it.
    """
    transformers = _package("transformers", f"hf:{name}")
    kind = getattr(transformers, name, None) if name.endswith("Config") else None
    if not isinstance(kind, type):
        configs = [known for known in dir(transformers) if known.endswith("Config")]
        raise InputError(
            f"transformers has no configuration {name!r}. Hint: {_near(name, configs, 'hf:BertConfig')}"
        )
    tasks = importlib.import_module("transformers.models.auto.modeling_auto")
    found = [
        mapping[kind] for mapping in (getattr(tasks, task) for task in HF_TASKS) if kind in mapping
    ]
    if not found:
        raise InputError(
            f"transformers has no classifier of sequences, images or audio for {name}. Hint: hf:BertConfig, hf:ViTConfig"
        )
    # Some configurations have several classes of models, the plain classifier first.
    maker = found[0][0] if isinstance(found[0], tuple) else found[0]
    options = {} if num_classes is None else {"num_labels": num_classes}
    return _made(lambda: maker(_traceable(kind(**options))), filled)


def token_example(model: nn.Module) -> dict[str, Tensor] | None:
    """Example inputs of a model that reads tokens, all of them real; None for other models, whose input `sffx.plan` infers."""
    known = inspect.signature(model.forward).parameters
    if "input_ids" not in known:
        return None
    names = [name for name in ("input_ids", "attention_mask") if name in known]
    return {name: torch.ones(1, TOKENS, dtype=torch.long) for name in names}


SOURCES: dict[str, Callable[..., nn.Module]] = {"timm": timm_model, "hf": hf_model}


def _package(name: str, source: str) -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"{source} needs the package {name!r}, which cannot be imported: {error}. Hint: pip install {name}"
        ) from error


def _near(name: str, known: Iterable[str], otherwise: str) -> str:
    return ", ".join(difflib.get_close_matches(name, list(known), n=5)) or otherwise


def _traceable(config: Any) -> Any:
    """The configuration without what only training needs and a graph cannot hold, and with the padding that a classifier asks for."""
    if getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = 0
    for name, plain in (("layerdrop", 0.0), ("apply_spec_augment", False)):
        if hasattr(config, name):
            setattr(config, name, plain)
    return config


def _made(make: Callable[[], nn.Module], filled: bool) -> nn.Module:
    return make() if filled else _without_weights(make)


def _without_weights(make: Callable[[], nn.Module]) -> nn.Module:
    """The model with parameters that have shapes and no values, so that a large one takes no memory; with values where it reads them."""
    try:
        with torch.device("meta"):
            return make()
    except (NotImplementedError, RuntimeError):
        return make()
