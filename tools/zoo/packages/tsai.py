"""Classifiers of time series in tsai: 3 variables, 64 steps."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import nn

from tools.zoo.entries import CLASSES, REQUESTS, SAMPLES, Entry, Inputs

REQUIRES = (
    "tsai",
    "fastai",
    "fastcore",
    "fastprogress",
    "fasttransform",
    "fastdownload",
    "python-fasthtml",
    "plum-dispatch",
    "beartype",
    "starlette",
    "itsdangerous",
    "python-multipart",
    "sklearn-compat",
    "imbalanced-learn",
    "pandas",
    *REQUESTS,
)

VARIABLES = 3
STEPS = 64

_NAMES_BY_MODULE = {
    "ConvTranPlus": "ConvTran ConvTranPlus",
    "FCN": "FCN",
    "FCNPlus": "FCNPlus",
    "HydraPlus": "Hydra HydraPlus",
    "InceptionTime": "InceptionTime",
    "InceptionTimePlus": "InceptionTimePlus InCoordTime XCoordTime",
    "MINIROCKETPlus_Pytorch": "InceptionRocketPlus MiniRocketPlus",
    "MLP": "MLP",
    "OmniScaleCNN": "OmniScaleCNN",
    "RNN": "RNN LSTM GRU",
    "RNNAttention": "RNNAttention LSTMAttention GRUAttention",
    "RNNAttentionPlus": "RNNAttentionPlus LSTMAttentionPlus GRUAttentionPlus",
    "RNNPlus": "RNNPlus LSTMPlus GRUPlus",
    "RNN_FCN": "RNN_FCN LSTM_FCN GRU_FCN",
    "RNN_FCNPlus": "RNN_FCNPlus LSTM_FCNPlus GRU_FCNPlus",
    "ResCNN": "ResCNN",
    "ResNet": "ResNet",
    "ResNetPlus": "ResNetPlus",
    "TCN": "TCN",
    "TSPerceiver": "TSPerceiver",
    "TSSequencerPlus": "TSSequencer TSSequencerPlus",
    "TST": "TST",
    "TSTPlus": "TSTPlus",
    "TSiTPlus": "TSiT TSiTPlus",
    "TransformerModel": "TransformerModel",
    "TransformerRNNPlus": "TransformerRNNPlus TransformerLSTMPlus TransformerGRUPlus",
    "XCM": "XCM",
    "XCMPlus": "XCMPlus",
    "XResNet1d": "xresnet1d18 xresnet1d34_deep",
    "XResNet1dPlus": "xresnet1d18plus xresnet1d34_deepplus",
    "XceptionTime": "XceptionTime",
    "XceptionTimePlus": "XceptionTimePlus",
    "gMLP": "gMLP",
    "mWDN": "mWDN mWDNPlus",
}
_MODULES = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names.split()}


def entries() -> list[Entry]:
    return [Entry("tsai", name) for name in _MODULES]


def build(entry: Entry) -> nn.Module:
    make = getattr(importlib.import_module(f"tsai.models.{_MODULES[entry.name]}"), entry.name)
    options: dict[str, Any] = {}
    if "seq_len" in inspect.signature(make).parameters:
        options["seq_len"] = STEPS
    model: nn.Module = make(VARIABLES, CLASSES, **options)
    return model


def fitting_input(entry: Entry, model: nn.Module) -> Inputs:
    return {"x": torch.randn(SAMPLES, VARIABLES, STEPS)}
