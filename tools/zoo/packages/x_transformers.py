"""Classifiers of x-transformers: one wrapper for tokens, one for images, many options of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tools.zoo.entries import CLASSES, SAMPLES, Inputs, Model, random_inputs

REQUIRES = ("x-transformers", "einops", "einx", "loguru", "frozendict", "torch-einops-utils")

_VOCABULARY = 50
_LENGTH = 12
_LAYERS = {"dim": 32, "depth": 4, "heads": 2, "attn_dim_head": 16, "verbose": False}


def _tokens() -> Inputs:
    return {"x": torch.randint(0, _VOCABULARY, (SAMPLES, _LENGTH))}


def _text(wrapper: dict[str, Any] | None = None, **layers: Any) -> Model:
    """Return a classifier of tokens, which takes the mean over them unless told otherwise."""

    def build() -> nn.Module:
        from x_transformers import Encoder, TransformerWrapper

        return TransformerWrapper(
            num_tokens=_VOCABULARY,
            max_seq_len=_LENGTH,
            attn_layers=Encoder(**_LAYERS, **layers),
            logits_dim=CLASSES,
            **(wrapper or {"average_pool_embed": True}),
        )

    return Model(build, _tokens)


def _image(wrapper: dict[str, Any] | None = None, **layers: Any) -> Model:
    """Return a classifier of images."""

    def build() -> nn.Module:
        from x_transformers import Encoder, ViTransformerWrapper

        return ViTransformerWrapper(
            image_size=32,
            patch_size=8,
            num_classes=CLASSES,
            attn_layers=Encoder(**_LAYERS, **layers),
            **(wrapper or {}),
        )

    return Model(build, random_inputs(x=(3, 32, 32)))


MODELS = {
    "text": _text(),
    "text_cls_token": _text({"use_cls_token": True}),
    "text_memory_tokens": _text({"average_pool_embed": True, "num_memory_tokens": 4}),
    "text_rotary": _text(rotary_pos_emb=True),
    "text_alibi": _text(alibi_pos_bias=True),
    "text_relative": _text(rel_pos_bias=True),
    "text_dynamic_position": _text(dynamic_pos_bias=True),
    "text_rmsnorm": _text(use_rmsnorm=True),
    "text_scalenorm": _text(use_scalenorm=True),
    "text_post_norm": _text(pre_norm=False),
    "text_sandwich_norm": _text(sandwich_norm=True),
    "text_macaron": _text(macaron=True),
    "text_residual_attention": _text(residual_attn=True, pre_norm=False),
    "text_gated_residual": _text(gate_residual=True),
    "text_talking_heads": _text(attn_pre_talking_heads=True, attn_post_talking_heads=True),
    "text_glu": _text(ff_glu=True, ff_swish=True),
    "text_shifted": _text(shift_tokens=1),
    "text_value_residual": _text(add_value_residual=True),
    "text_hyper_connections": _text(num_residual_streams=2),
    "text_unet_skips": _text(unet_skips=True),
    "text_layer_dropout": _text(layer_dropout=0.1),
    "image": _image(),
    "image_registers": _image({"num_register_tokens": 4}),
    "image_flash": _image(attn_flash=True),
    "image_qk_norm": _image(attn_qk_norm=True),
    "image_one_kv_head": _image(attn_one_kv_head=True),
    "image_sparse": _image(attn_sparse_topk=4),
    "image_memory_kv": _image(attn_num_mem_kv=4),
    "image_layer_scale": _image(use_layerscale=True, layerscale_init_value=0.1),
    "image_tied_layers": _image(weight_tie_layers=True),
}
