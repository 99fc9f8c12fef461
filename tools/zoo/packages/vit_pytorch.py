"""Classifiers of vit-pytorch, in small configurations. Each has a module of its own."""

from __future__ import annotations

from typing import Any

from tools.zoo.entries import CLASSES, Model, model_of, random_inputs

REQUIRES = ("vit-pytorch", "einops", "torch-einops-utils", "hyper-connections")

_IMAGE = (3, 32, 32)
_SIZES = {"num_classes": CLASSES, "dim": 32, "depth": 4, "heads": 2, "dim_head": 16, "mlp_dim": 64}
_SQUARE = {**_SIZES, "image_size": 32, "patch_size": 8}
_CLIP = {
    **_SIZES,
    "image_size": 32,
    "image_patch_size": 8,
    "frames": 4,
    "frame_patch_size": 2,
}
_STAGES = {"num_classes": CLASSES, "dim": (8, 16, 24, 32), "depth": (1, 1, 2, 1)}


def _listed(
    module: str,
    class_name: str,
    sizes: dict[str, Any],
    shape: tuple[int, ...] = _IMAGE,
    /,
    **more: Any,
) -> Model:
    """Return the entry of a class, which takes its sizes by keyword and one tensor."""
    options = {**sizes, **more}
    for name in [name for name, value in options.items() if value is None]:
        del options[name]
    return model_of(f"vit_pytorch.{module}", class_name, options, random_inputs(x=shape))


MODELS = {
    "vit": _listed("vit", "ViT", _SQUARE),
    "vit_mean_pool": _listed("vit", "ViT", _SQUARE, pool="mean"),
    "ats_vit": _listed("ats_vit", "ViT", _SQUARE, max_tokens_per_depth=(16, 12, 8, 6)),
    "attn_residual_with_dca_simple_vit": _listed(
        "attn_residual_with_dca_simple_vit", "SimpleViT", _SQUARE
    ),
    "cait": _listed("cait", "CaiT", _SQUARE, cls_depth=2),
    "cait_layer_dropout": _listed("cait", "CaiT", _SQUARE, cls_depth=2, layer_dropout=0.1),
    "cct": _listed(
        "cct",
        "CCT",
        {"img_size": 32, "embedding_dim": 32, "num_layers": 4, "num_heads": 2},
        num_classes=CLASSES,
        mlp_ratio=2.0,
    ),
    "cct_learned": _listed(
        "cct",
        "CCT",
        {"img_size": 32, "embedding_dim": 32, "num_layers": 4, "num_heads": 2},
        num_classes=CLASSES,
        mlp_ratio=2.0,
        positional_embedding="learnable",
    ),
    "cct_3d": _listed(
        "cct_3d",
        "CCT",
        {"img_size": 32, "num_frames": 4, "embedding_dim": 32, "num_layers": 4, "num_heads": 2},
        (3, 4, 32, 32),
        num_classes=CLASSES,
        mlp_ratio=2.0,
    ),
    "cross_vit": _listed(
        "cross_vit",
        "CrossViT",
        {"image_size": 32, "num_classes": CLASSES, "sm_dim": 16, "lg_dim": 32},
        sm_patch_size=4,
        lg_patch_size=8,
        sm_enc_heads=2,
        lg_enc_heads=2,
        sm_enc_mlp_dim=32,
        lg_enc_mlp_dim=64,
        lg_enc_depth=2,
        cross_attn_heads=2,
        sm_enc_dim_head=16,
        lg_enc_dim_head=16,
        cross_attn_dim_head=16,
    ),
    "crossformer": _listed(
        "crossformer",
        "CrossFormer",
        {**_STAGES, "dim": (32, 32, 64, 64)},
        (3, 64, 64),
        local_window_size=2,
        global_window_size=(4, 2, 2, 1),
    ),
    "cvt": _listed(
        "cvt",
        "CvT",
        {"num_classes": CLASSES},
        s1_emb_dim=8,
        s2_emb_dim=16,
        s2_heads=1,
        s3_emb_dim=32,
        s3_heads=2,
        s3_depth=4,
    ),
    "deepvit": _listed("deepvit", "DeepViT", _SQUARE),
    "jet_vit": _listed("jet_vit", "JetViT", _SQUARE, window_size=2),
    "jumbo_vit": _listed("jumbo_vit", "JumboViT", _SQUARE, jumbo_cls_k=2),
    "learnable_memory_vit": _listed("learnable_memory_vit", "ViT", _SQUARE),
    "levit": _listed(
        "levit",
        "LeViT",
        {"num_classes": CLASSES, "dim": (16, 24, 32), "depth": 2, "heads": (2, 2, 2)},
        (3, 64, 64),
        image_size=64,
        mlp_mult=2,
        dim_key=8,
        dim_value=16,
    ),
    "levit_distilled": _listed(
        "levit",
        "LeViT",
        {"num_classes": CLASSES, "dim": (16, 24, 32), "depth": 2, "heads": (2, 2, 2)},
        (3, 64, 64),
        image_size=64,
        mlp_mult=2,
        num_distill_classes=CLASSES,
    ),
    "look_vit": _listed(
        "look_vit",
        "LookViT",
        {"dim": 32, "image_size": 32, "num_classes": CLASSES},
        patch_size=8,
        highres_patch_size=4,
        heads=2,
        dim_head=16,
        mlp_factor=2,
        highres_mlp_factor=2,
        cross_attn_heads=2,
        cross_attn_dim_head=16,
    ),
    "looped_vit": _listed(
        "looped_vit",
        "LoopedViT",
        {**_SQUARE, "depth": None, "pre_loop_depth": 2, "post_loop_depth": 2},
        num_looped_blocks=2,
        loop_depth=2,
    ),
    "max_vit": _listed(
        "max_vit",
        "MaxViT",
        {"num_classes": CLASSES, "dim": 16, "depth": (1, 2, 1)},
        (3, 64, 64),
        dim_head=8,
        window_size=2,
    ),
    "max_vit_with_registers": _listed(
        "max_vit_with_registers",
        "MaxViT",
        {"num_classes": CLASSES, "dim": 16, "depth": (1, 2, 1)},
        (3, 64, 64),
        dim_head=8,
        window_size=2,
    ),
    "mobile_vit": _listed(
        "mobile_vit",
        "MobileViT",
        {"image_size": (64, 64), "dims": [16, 24, 32], "num_classes": CLASSES},
        (3, 64, 64),
        channels=[8, 8, 16, 16, 24, 24, 32, 32, 40, 40, 64],
    ),
    "mp3": _listed("mp3", "ViT", _SQUARE),
    "nest": _listed(
        "nest",
        "NesT",
        {"image_size": 32, "patch_size": 4, "num_classes": CLASSES, "dim": 16, "heads": 2},
        num_hierarchies=3,
        block_repeats=(1, 1, 2),
        mlp_mult=2,
        dim_head=8,
    ),
    "normalized_vit": _listed("normalized_vit", "nViT", _SQUARE),
    "parallel_vit": _listed("parallel_vit", "ViT", _SQUARE),
    "pit": _listed("pit", "PiT", {**_SQUARE, "depth": (2, 2, 2)}),
    "regionvit": _listed(
        "regionvit", "RegionViT", _STAGES, (3, 64, 64), window_size=2, local_patch_size=4
    ),
    "rvt": _listed("rvt", "RvT", _SQUARE),
    "scalable_vit": _listed(
        "scalable_vit",
        "ScalableViT",
        {"num_classes": CLASSES, "dim": 16, "depth": (1, 1, 2), "heads": (1, 2, 2)},
        reduction_factor=(4, 2, 1),
        window_size=(4, 4, None),
        iwsa_dim_key=8,
        iwsa_dim_value=8,
        ssa_dim_key=8,
        ssa_dim_value=8,
        ff_expansion_factor=2,
    ),
    "sep_vit": _listed(
        "sep_vit",
        "SepViT",
        {"num_classes": CLASSES, "dim": 16, "depth": (1, 1, 2), "heads": (1, 2, 2)},
        (3, 112, 112),
        dim_head=8,
        ff_mult=2,
    ),
    "simple_flash_attn_vit": _listed("simple_flash_attn_vit", "SimpleViT", _SQUARE),
    "simple_flash_attn_vit_3d": _listed(
        "simple_flash_attn_vit_3d", "SimpleViT", _CLIP, (3, 4, 32, 32)
    ),
    "simple_uvit": _listed("simple_uvit", "SimpleUViT", _SQUARE),
    "simple_vit": _listed("simple_vit", "SimpleViT", _SQUARE),
    "simple_vit_1d": _listed(
        "simple_vit_1d", "SimpleViT", _SIZES, (3, 32), seq_len=32, patch_size=8
    ),
    "simple_vit_3d": _listed("simple_vit_3d", "SimpleViT", _CLIP, (3, 4, 32, 32)),
    "simple_vit_attn_residual": _listed(
        "simple_vit_attn_residual", "SimpleViTAttnResidual", _SQUARE
    ),
    "simple_vit_orthog_residual_update": _listed(
        "simple_vit_orthog_residual_update", "SimpleViT", _SQUARE
    ),
    "simple_vit_with_fft": _listed(
        "simple_vit_with_fft", "SimpleViT", _SQUARE, freq_patch_size=8, depth=6
    ),
    "simple_vit_with_hyper_connections": _listed(
        "simple_vit_with_hyper_connections", "SimpleViT", _SQUARE, num_residual_streams=4
    ),
    "simple_vit_with_patch_dropout": _listed("simple_vit_with_patch_dropout", "SimpleViT", _SQUARE),
    "simple_vit_with_qk_norm": _listed("simple_vit_with_qk_norm", "SimpleViT", _SQUARE),
    "simple_vit_with_register_tokens": _listed(
        "simple_vit_with_register_tokens", "SimpleViT", _SQUARE
    ),
    "simple_vit_with_relative_proj_pos_bias": _listed(
        "simple_vit_with_relative_proj_pos_bias", "SimpleViT", _SQUARE
    ),
    "simple_vit_with_sparse_gating": _listed(
        "simple_vit_with_sparse_gating", "SimpleViTWithSparseGating", _SQUARE
    ),
    "simple_vit_with_specialized_cls": _listed(
        "simple_vit_with_specialized_cls", "SimpleViT", _SQUARE
    ),
    "simple_vit_with_value_residual": _listed(
        "simple_vit_with_value_residual", "SimpleViT", _SQUARE
    ),
    "t2t": _listed("t2t", "T2TViT", {**_SQUARE, "patch_size": None}, t2t_layers=((3, 2), (3, 2))),
    "twins_svt": _listed(
        "twins_svt",
        "TwinsSVT",
        {"num_classes": CLASSES, "s1_emb_dim": 8, "s2_emb_dim": 16, "s3_emb_dim": 24},
        (3, 64, 64),
        s4_emb_dim=32,
        s1_local_patch_size=4,
        s2_local_patch_size=4,
        s3_local_patch_size=4,
        s4_local_patch_size=2,
        s1_global_k=4,
        s2_global_k=4,
        s3_global_k=4,
        s4_global_k=2,
        s3_depth=2,
        s4_depth=2,
    ),
    "vat": _listed("vat", "ViT", _SQUARE),
    "vit_1d": _listed("vit_1d", "ViT", _SIZES, (3, 32), seq_len=32, patch_size=8),
    "vit_3d": _listed("vit_3d", "ViT", _CLIP, (3, 4, 32, 32)),
    "vit_5": _listed("vit_5", "ViT", _SQUARE),
    "vit_detpool": _listed("vit_detpool", "ViTDetPool", _SQUARE),
    "vit_for_small_dataset": _listed("vit_for_small_dataset", "ViT", _SQUARE),
    "vit_nd": _listed("vit_nd", "ViTND", _SIZES, ndim=2, input_shape=32, patch_size=8),
    "vit_nd_pope": _listed("vit_nd_pope", "ViTND", _SIZES, ndim=2, input_shape=32, patch_size=8),
    "vit_nd_rotary": _listed(
        "vit_nd_rotary", "ViTND", _SIZES, ndim=2, input_shape=32, patch_size=8
    ),
    "vit_with_decorr": _listed("vit_with_decorr", "ViT", _SQUARE),
    "vit_with_keel_post_ln": _listed("vit_with_keel_post_ln", "ViT", _SQUARE),
    "vit_with_patch_dropout": _listed("vit_with_patch_dropout", "ViT", _SQUARE),
    "vit_with_patch_merger": _listed(
        "vit_with_patch_merger", "ViT", _SQUARE, patch_merge_num_tokens=4
    ),
    "vivit": _listed(
        "vivit",
        "ViViT",
        {**_CLIP, "depth": None, "spatial_depth": 3, "temporal_depth": 3},
        (3, 4, 32, 32),
    ),
    "vivit_factorized_attention": _listed(
        "vivit",
        "ViViT",
        {**_CLIP, "depth": None, "spatial_depth": 3, "temporal_depth": 3},
        (3, 4, 32, 32),
        variant="factorized_self_attention",
    ),
    "vivit_with_moss": _listed(
        "vivit_with_moss",
        "ViViT",
        {**_CLIP, "depth": None, "spatial_depth": 3, "temporal_depth": 3},
        (3, 4, 32, 32),
        pool="mean",
    ),
    "wwt": _listed("wwt", "WWT", _SQUARE, num_slots=4),
    "xcit": _listed("xcit", "XCiT", _SQUARE, cls_depth=2),
}
