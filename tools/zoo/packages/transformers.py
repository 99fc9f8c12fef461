"""Classifiers of transformers, in small configurations."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tools.zoo.entries import CLASSES, SAMPLES, Entry, Inputs

REQUIRES = ("transformers",)

_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", _TEXT),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64, "vocab_size": 100},
    ),
    "roberta": ("RobertaForSequenceClassification", _TEXT),
    "electra": ("ElectraForSequenceClassification", {**_TEXT, "embedding_size": 32}),
    "albert": ("AlbertForSequenceClassification", {**_TEXT, "embedding_size": 16}),
    "gpt2": (
        "GPT2ForSequenceClassification",
        {"n_embd": 32, "n_layer": 3, "n_head": 2, "vocab_size": 100, "pad_token_id": 0},
    ),
    "vit": ("ViTForImageClassification", _VISION),
    "deit": ("DeiTForImageClassification", _VISION),
    "swin": (
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]},
    ),
    "convnext": (
        "ConvNextForImageClassification",
        {"depths": [2, 2, 2, 2], "hidden_sizes": [8, 16, 24, 32]},
    ),
    "resnet": (
        "ResNetForImageClassification",
        {"depths": [2, 2], "hidden_sizes": [16, 32], "embedding_size": 8},
    ),
    "mobilenet_v2": ("MobileNetV2ForImageClassification", {}),
    "segformer": ("SegformerForImageClassification", {}),
    "wav2vec2": (
        "Wav2Vec2ForSequenceClassification",
        {
            **_TEXT,
            "conv_dim": (16, 16, 16),
            "conv_stride": (5, 2, 2),
            "conv_kernel": (10, 3, 3),
            "num_conv_pos_embeddings": 16,
        },
    ),
}


def entries() -> list[Entry]:
    return [Entry("transformers", name) for name in TRANSFORMERS]


def build(entry: Entry) -> nn.Module:
    import transformers

    class_name, options = TRANSFORMERS[entry.name]
    model_class = getattr(transformers, class_name)
    model: nn.Module = model_class(model_class.config_class(num_labels=CLASSES, **options))
    return model


def fitting_input(entry: Entry, model: nn.Module) -> Inputs:
    if model.main_input_name == "pixel_values":
        side = getattr(model.config, "image_size", 64)
        return {"pixel_values": torch.randn(SAMPLES, 3, side, side)}
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(SAMPLES, 800)}
    mask = torch.ones(SAMPLES, 12, dtype=torch.int64)
    mask[0, 8:] = 0
    return {"input_ids": torch.randint(1, 100, (SAMPLES, 12)), "attention_mask": mask}
