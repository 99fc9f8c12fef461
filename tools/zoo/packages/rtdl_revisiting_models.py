"""Classifiers of tables in rtdl_revisiting_models, with the embeddings of rtdl_num_embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tools.zoo.entries import CLASSES, SAMPLES, Inputs, Model, random_inputs

REQUIRES = ("rtdl-revisiting-models", "rtdl-num-embeddings", "delu")

NUMBERS = 8
_MLP = {"d_out": CLASSES, "n_blocks": 4, "d_block": 32, "dropout": 0.1}
_RESNET = {
    "d_out": CLASSES,
    "n_blocks": 4,
    "d_block": 32,
    "d_hidden_multiplier": 2.0,
    "dropout1": 0.1,
    "dropout2": 0.1,
}


def _mlp() -> nn.Module:
    from rtdl_revisiting_models import MLP

    model: nn.Module = MLP(d_in=NUMBERS, **_MLP)
    return model


def _resnet() -> nn.Module:
    from rtdl_revisiting_models import ResNet

    model: nn.Module = ResNet(d_in=NUMBERS, **_RESNET)
    return model


def _ft_transformer(**options: Any) -> nn.Module:
    from rtdl_revisiting_models import FTTransformer

    defaults = {**FTTransformer.get_default_kwargs(n_blocks=3), **options}
    defaults.update(n_cont_features=NUMBERS, cat_cardinalities=[3, 5], d_out=CLASSES)
    model: nn.Module = FTTransformer(**defaults)
    return model


def _linformer() -> nn.Module:
    return _ft_transformer(
        linformer_kv_compression_ratio=0.5,
        linformer_kv_compression_sharing="headwise",
    )


def _behind(name: str, **options: Any) -> nn.Module:
    """Return an MLP behind embeddings of the numbers, 6 for each."""
    import rtdl_num_embeddings
    from rtdl_revisiting_models import MLP

    embeddings = getattr(rtdl_num_embeddings, name)(NUMBERS, 6, **options)
    return nn.Sequential(embeddings, nn.Flatten(), MLP(d_in=6 * NUMBERS, **_MLP))


def _piecewise(version: str) -> nn.Module:
    import rtdl_num_embeddings
    from rtdl_revisiting_models import MLP

    bins = [torch.linspace(-2, 2, 5) for _ in range(NUMBERS)]
    make = rtdl_num_embeddings.PiecewiseLinearEmbeddings
    embeddings = make(bins, 6, activation=version == "A", version=version)
    return nn.Sequential(embeddings, nn.Flatten(), MLP(d_in=6 * NUMBERS, **_MLP))


def _numbers_and_categories() -> Inputs:
    categories = torch.stack([torch.randint(n, (SAMPLES,)) for n in (3, 5)], 1)
    return {"x_cont": torch.randn(SAMPLES, NUMBERS), "x_cat": categories}


_NUMBERS = random_inputs(x=(NUMBERS,))
MODELS = {
    "mlp": Model(_mlp, _NUMBERS),
    "resnet": Model(_resnet, _NUMBERS),
    "ft_transformer": Model(_ft_transformer, _numbers_and_categories),
    "ft_transformer_linformer": Model(_linformer, _numbers_and_categories),
    "linear_embeddings": Model(lambda: _behind("LinearEmbeddings"), _NUMBERS),
    "linear_relu_embeddings": Model(lambda: _behind("LinearReLUEmbeddings"), _NUMBERS),
    "periodic_embeddings": Model(lambda: _behind("PeriodicEmbeddings", lite=False), _NUMBERS),
    "periodic_embeddings_lite": Model(lambda: _behind("PeriodicEmbeddings", lite=True), _NUMBERS),
    "piecewise_linear_embeddings_a": Model(lambda: _piecewise("A"), _NUMBERS),
    "piecewise_linear_embeddings_b": Model(lambda: _piecewise("B"), _NUMBERS),
}
