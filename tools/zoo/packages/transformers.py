"""Models of transformers, in small configurations: classifiers, and models with other tasks."""

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

_DISTILBERT = {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64, "vocab_size": 100}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 2, "vocab_size": 100, "bos_token_id": 0}
# By group, which tells the task.
OTHER_TASKS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "tokens": {
        "bert-tokens": ("BertForTokenClassification", _TEXT),
        "distilbert-tokens": ("DistilBertForTokenClassification", _DISTILBERT),
        "electra-tokens": ("ElectraForTokenClassification", {**_TEXT, "embedding_size": 32}),
    },
    "language": {
        "gpt2-lm": ("GPT2LMHeadModel", {**_GPT2, "eos_token_id": 0}),
        "llama-lm": ("LlamaForCausalLM", _TEXT),
        "llama-lm-tied": ("LlamaForCausalLM", {**_TEXT, "tie_word_embeddings": True}),
    },
    "regression": {"bert-number": ("BertForSequenceClassification", {**_TEXT, "num_labels": 1})},
    "multilabel": {
        "bert-labels": (
            "BertForSequenceClassification",
            {**_TEXT, "problem_type": "multi_label_classification"},
        ),
    },
}


def entries() -> list[Entry]:
    listed = [Entry("transformers", name) for name in TRANSFORMERS]
    for group, models in OTHER_TASKS.items():
        listed += [Entry("transformers", name, group) for name in models]
    return listed


def build(entry: Entry) -> nn.Module:
    import transformers

    models = OTHER_TASKS.get(entry.group, TRANSFORMERS)
    class_name, options = models[entry.name]
    model_class = getattr(transformers, class_name)
    configured = model_class.config_class(**{"num_labels": CLASSES, **options})
    model: nn.Module = model_class(configured)
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
