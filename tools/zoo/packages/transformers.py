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
            "layerdrop": 0.0,
        },
    ),
}

_DISTILBERT = {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64, "vocab_size": 100}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 2, "vocab_size": 100, "bos_token_id": 0}
_CAUSAL = {**_TEXT, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
# The four maps that the head of an encoder of patches reads.
_DENSE = {**_VISION, "num_hidden_layers": 4, "image_size": 64, "patch_size": 16}
_NECK = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16}
_DPT = {**_DENSE, **_NECK, "backbone_out_indices": [0, 1, 2, 3]}
_PYRAMID = {
    "depths": [2, 2, 2, 2],
    "hidden_sizes": [8, 16, 24, 32],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
}
_MULTILABEL = {"problem_type": "multi_label_classification"}
_NUMBER = {"num_labels": 1}
# By group, which tells the task.
OTHER_TASKS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "tokens": {
        "bert-tokens": ("BertForTokenClassification", _TEXT),
        "distilbert-tokens": ("DistilBertForTokenClassification", _DISTILBERT),
        "electra-tokens": ("ElectraForTokenClassification", {**_TEXT, "embedding_size": 32}),
        "roberta-tokens": ("RobertaForTokenClassification", _TEXT),
        "deberta-v2-tokens": ("DebertaV2ForTokenClassification", _TEXT),
        "modernbert-tokens": ("ModernBertForTokenClassification", {**_TEXT, "pad_token_id": 0}),
    },
    "language": {
        "gpt2-lm": ("GPT2LMHeadModel", {**_GPT2, "eos_token_id": 0}),
        "llama-lm": ("LlamaForCausalLM", _TEXT),
        "llama-lm-tied": ("LlamaForCausalLM", {**_TEXT, "tie_word_embeddings": True}),
        "mistral-lm": ("MistralForCausalLM", {**_CAUSAL, "sliding_window": 6}),
        "qwen2-lm": ("Qwen2ForCausalLM", _CAUSAL),
        "qwen3-lm": ("Qwen3ForCausalLM", _CAUSAL),
        "gemma-lm": ("GemmaForCausalLM", _CAUSAL),
        "gpt-neox-lm": ("GPTNeoXForCausalLM", _TEXT),
        "phi-lm": ("PhiForCausalLM", _TEXT),
        "opt-lm": (
            "OPTForCausalLM",
            {**_TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 0},
        ),
        "bloom-lm": ("BloomForCausalLM", {**_TEXT, "n_layer": 3, "n_head": 2}),
    },
    "regression": {
        "bert-number": ("BertForSequenceClassification", {**_TEXT, **_NUMBER}),
        "distilbert-number": ("DistilBertForSequenceClassification", {**_DISTILBERT, **_NUMBER}),
        "gpt2-number": ("GPT2ForSequenceClassification", {**_GPT2, **_NUMBER, "pad_token_id": 0}),
        "vit-number": ("ViTForImageClassification", {**_VISION, **_NUMBER}),
    },
    "multilabel": {
        "bert-labels": ("BertForSequenceClassification", {**_TEXT, **_MULTILABEL}),
        "distilbert-labels": (
            "DistilBertForSequenceClassification",
            {**_DISTILBERT, **_MULTILABEL},
        ),
        "vit-labels": ("ViTForImageClassification", {**_VISION, **_MULTILABEL}),
    },
    "segmentation": {
        "segformer-pixels": (
            "SegformerForSemanticSegmentation",
            _PYRAMID,
        ),
        "mobilevit-pixels": (
            "MobileViTForSemanticSegmentation",
            {
                "hidden_sizes": [16, 24, 32],
                "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
                "image_size": 64,
                "aspp_out_channels": 16,
                "atrous_rates": [2, 3, 4],
            },
        ),
        "mobilenet-v2-pixels": (
            "MobileNetV2ForSemanticSegmentation",
            {"image_size": 64, "depth_multiplier": 0.35},
        ),
        "upernet-pixels": (
            "UperNetForSemanticSegmentation",
            {
                "backbone_config": {
                    "model_type": "convnext",
                    "depths": [2, 2, 2, 2],
                    "hidden_sizes": [8, 16, 24, 32],
                    "out_features": ["stage1", "stage2", "stage3", "stage4"],
                },
                "hidden_size": 16,
                "auxiliary_channels": 16,
                "auxiliary_in_channels": 24,
            },
        ),
        "dpt-pixels": (
            "DPTForSemanticSegmentation",
            _DPT,
        ),
        "beit-pixels": ("BeitForSemanticSegmentation", {**_DENSE, "out_indices": [1, 2, 3, 4]}),
        "data2vec-pixels": (
            "Data2VecVisionForSemanticSegmentation",
            {**_DENSE, "out_indices": [1, 2, 3, 4]},
        ),
    },
    "multiple_choice": {
        "bert-choice": ("BertForMultipleChoice", _TEXT),
        "distilbert-choice": ("DistilBertForMultipleChoice", _DISTILBERT),
        "electra-choice": ("ElectraForMultipleChoice", {**_TEXT, "embedding_size": 32}),
        "roberta-choice": ("RobertaForMultipleChoice", _TEXT),
    },
    "dense_regression": {
        "dpt-depth": (
            "DPTForDepthEstimation",
            _DPT,
        ),
        "depth-anything": (
            "DepthAnythingForDepthEstimation",
            {
                "backbone_config": {
                    **_DENSE,
                    "model_type": "dinov2",
                    "out_indices": [1, 2, 3, 4],
                    "reshape_hidden_states": False,
                },
                "patch_size": 16,
                **_NECK,
                "reassemble_hidden_size": 32,
                "head_hidden_size": 8,
            },
        ),
        "glpn-depth": (
            "GLPNForDepthEstimation",
            _PYRAMID,
        ),
        "swin2sr": (
            "Swin2SRForImageSuperResolution",
            {
                "embed_dim": 12,
                "depths": [2, 2],
                "num_heads": [2, 2],
                "window_size": 4,
                "image_size": 16,
                "upscale": 2,
            },
        ),
    },
}


# Families that take the sizes of an encoder or a decoder of text, or of a vision transformer.
_NAMES_LIKE_TEXT = """
BigBird BioGpt Camembert Canine ConvBert Data2VecText Deberta DebertaV2 FNet MPNet
MobileBert ModernBert Nystromformer SqueezeBert XLMRoberta
Arcee Bloom CTRL DiffLlama GPTJ GPTNeo Llama Mistral OPT Qwen2
"""
_NAMES_LIKE_VIT = "Beit Data2VecVision Dinov2 IJepa"

_DECODER = {"num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "eos_token_id": 2}
_MORE: dict[str, dict[str, Any]] = {
    "BigBird": {"attention_type": "original_full"},
    "Bloom": {"n_layer": 3, "n_head": 2},
    "Canine": {"num_hash_buckets": 64},
    "ConvBert": {"embedding_size": 32},
    "CTRL": {"dff": 64},
    "FNet": {"num_attention_heads": None},
    "GPTJ": {"rotary_dim": 8},
    "GPTNeo": {"num_layers": 3, "attention_types": [[["global", "local", "global"], 1]]},
    "MobileBert": {"embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "SqueezeBert": {"embedding_size": 32},
}
_DECODERS = ("Arcee", "DiffLlama", "Llama", "Mistral", "Qwen2")
_EXPERTS = {
    "num_key_value_heads": 2,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
_ENCODER_DECODER = {
    "d_model": 32,
    "vocab_size": 100,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 64,
}
# With SpecAugment. Layers that are dropped at random would make a leaf of the encoder.
_SPEECH = {
    **TRANSFORMERS["wav2vec2"][1],
    "layerdrop": 0.0,
    "mask_time_prob": 0.2,
    "mask_time_length": 4,
    "mask_feature_prob": 0.1,
    "mask_feature_length": 4,
}
_OTHERS: dict[str, dict[str, Any]] = {
    "AST": {**_VISION, "num_mel_bins": 16, "max_length": 48},
    "AXK2": {**_TEXT, **_EXPERTS, "num_hidden_layers": 4},
    "Bart": _ENCODER_DECODER,
    "Bit": {"depths": [2, 2, 2, 2], "hidden_sizes": [32, 64, 96, 128], "num_groups": 8},
    "ConvNextV2": {"depths": [2, 2, 2, 2], "hidden_sizes": [8, 16, 24, 32]},
    "Cvt": {},
    "Hubert": _SPEECH,
    "UniSpeech": _SPEECH,
    "WavLM": {**_SPEECH, "mask_feature_min_masks": 0},
    "Data2VecAudio": _SPEECH,
    "LayoutLM": {
        **_TEXT,
        "hidden_size": 64,
        "max_2d_position_embeddings": 32,
        "max_position_embeddings": 32,
    },
    "MBart": _ENCODER_DECODER,
    "T5": {
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 64,
        "num_layers": 3,
        "num_decoder_layers": 2,
        "num_heads": 2,
        "vocab_size": 100,
        "eos_token_id": 2,
        "decoder_start_token_id": 0,
    },
    "PoolFormer": {"depths": [2, 2, 2, 2], "hidden_sizes": [8, 16, 24, 32]},
    "RegNet": {"depths": [2, 2, 2, 2], "hidden_sizes": [8, 16, 24, 32], "groups_width": 8},
    "MobileNetV1": {},
}


def _class_name(family: str) -> str:
    """Return the name of the classifier of a family: of images, of sounds or of text."""
    import transformers

    for task in ("Image", "Audio", "Sequence"):
        name = f"{family}For{task}Classification"
        if hasattr(transformers, name):
            return name
    raise ValueError(f"transformers has no classifier of the family {family!r}")


def _options(family: str) -> dict[str, Any]:
    if family in _OTHERS:
        return _OTHERS[family]
    options: dict[str, Any] = {**_TEXT} if family in _NAMES_LIKE_TEXT.split() else {**_VISION}
    if family in _DECODERS:
        options.update(_DECODER)
    if family in _NAMES_LIKE_TEXT.split():
        options.setdefault("pad_token_id", 0)
    options.update(_MORE.get(family, {}))
    return {name: value for name, value in options.items() if value is not None}


FAMILIES = (*_NAMES_LIKE_TEXT.split(), *_NAMES_LIKE_VIT.split(), *_OTHERS)


def entries() -> list[Entry]:
    listed = [Entry("transformers", name) for name in (*TRANSFORMERS, *FAMILIES)]
    for group, models in OTHER_TASKS.items():
        listed += [Entry("transformers", name, group) for name in models]
    return listed


def build(entry: Entry) -> nn.Module:
    import transformers

    if entry.name in FAMILIES:
        class_name, options = _class_name(entry.name), _options(entry.name)
    else:
        class_name, options = OTHER_TASKS.get(entry.group, TRANSFORMERS)[entry.name]
    model_class = getattr(transformers, class_name)
    configured = model_class.config_class(**{"num_labels": CLASSES, **options})
    model: nn.Module = model_class(configured)
    return model


def fitting_input(entry: Entry, model: nn.Module) -> Inputs:
    if model.main_input_name == "pixel_values":
        side = getattr(model.config, "image_size", 64)
        side = side if isinstance(side, int) and entry.name not in _OTHERS else 64
        return {"pixel_values": torch.randn(SAMPLES, 3, side, side)}
    if entry.name == "AST":
        return {"input_values": torch.randn(SAMPLES, 48, 16)}
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(SAMPLES, 800)}
    if entry.group == "multiple_choice":
        return {"input_ids": torch.randint(4, 100, (SAMPLES, 5, 12))}
    mask = torch.ones(SAMPLES, 12, dtype=torch.int64)
    mask[0, 8:] = 0
    ids = torch.randint(4, 100, (SAMPLES, 12))
    if entry.name in FAMILIES:
        ids[:, 7] = 2  # the end of a sentence, which some read the class at
    return {"input_ids": ids, "attention_mask": mask}
