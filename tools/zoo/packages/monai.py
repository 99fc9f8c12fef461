"""Classifiers of monai, of volumes and images, small."""

from __future__ import annotations

from typing import Any

from torch import nn

from tools.zoo.entries import CLASSES, Model, model_of, random_inputs

REQUIRES = ("monai",)

_VOLUME = (1, 32, 32, 32)
_IMAGE = (1, 64, 64)


def _listed(class_name: str, shape: tuple[int, ...], **options: Any) -> Model:
    return model_of("monai.networks.nets", class_name, options, random_inputs(x=shape))


def _resnet(spatial: int, shape: tuple[int, ...], **more: Any) -> Model:
    options = {
        "block": "basic",
        "layers": [2, 2, 2, 2],
        "block_inplanes": [8, 12, 16, 16],
        "spatial_dims": spatial,
        "n_input_channels": 1,
        "num_classes": CLASSES,
        **more,
    }
    return _listed("ResNet", shape, **options)


def _densenet(spatial: int, shape: tuple[int, ...], **more: Any) -> Model:
    options = {
        "spatial_dims": spatial,
        "in_channels": 1,
        "out_channels": CLASSES,
        "init_features": 8,
        "growth_rate": 4,
        "block_config": (2, 2, 2, 2),
        **more,
    }
    return _listed("DenseNet", shape, **options)


def _senet(block: str, **more: Any) -> Model:
    options = {
        "spatial_dims": 2,
        "in_channels": 1,
        "num_classes": CLASSES,
        "block": block,
        "layers": (1, 1, 1, 3),
        "groups": 1,
        "reduction": 8,
        "inplanes": 16,
        **more,
    }
    return _listed("SENet", _IMAGE, **options)


def _efficientnet(name: str, spatial: int, shape: tuple[int, ...]) -> Model:
    options = {
        "model_name": name,
        "pretrained": False,
        "spatial_dims": spatial,
        "in_channels": 1,
        "num_classes": CLASSES,
    }
    return _listed("EfficientNetBN", shape, **options)


def _vit(spatial: int, **more: Any) -> Model:
    """Return a vision transformer behind an adapter: its forward returns hidden states as well."""
    options = {
        "in_channels": 1,
        "img_size": (32,) * spatial,
        "patch_size": (8,) * spatial,
        "spatial_dims": spatial,
        "hidden_size": 24,
        "mlp_dim": 48,
        "num_layers": 4,
        "num_heads": 2,
        "classification": True,
        "num_classes": CLASSES,
        **more,
    }
    return _listed("ViT", (1, *(32,) * spatial), **options)


def _mil(mode: str) -> Model:
    """Return a model of bags of instances, (B, N, C, H, W)."""

    def build() -> nn.Module:
        from monai.networks.nets import MILModel

        return MILModel(num_classes=CLASSES, mil_mode=mode, pretrained=False, backbone="resnet18")

    return Model(build, random_inputs(x=(2, 3, 32, 32)))


MODELS = {
    "resnet_2d": _resnet(2, _IMAGE),
    "resnet_3d": _resnet(3, _VOLUME),
    "resnet_1d": _resnet(1, (1, 128)),
    "resnet_3d_bottleneck": _resnet(3, _VOLUME, block="bottleneck"),
    "resnet_3d_shortcut_a": _resnet(3, _VOLUME, shortcut_type="A"),
    "resnet_2d_instance_norm": _resnet(2, _IMAGE, norm=("instance", {"affine": True})),
    "densenet_2d": _densenet(2, _IMAGE),
    "densenet_3d": _densenet(3, _VOLUME),
    "densenet_2d_dropout": _densenet(2, _IMAGE, dropout_prob=0.2),
    "densenet121_2d": _listed(
        "DenseNet121", _IMAGE, spatial_dims=2, in_channels=1, out_channels=CLASSES
    ),
    "senet_bottleneck": _senet("se_bottleneck"),
    "senet_resnet": _senet("se_resnet_bottleneck", downsample_kernel_size=1, input_3x3=False),
    "senet_resnext": _senet(
        "se_resnetxt_bottleneck", groups=4, downsample_kernel_size=1, input_3x3=False
    ),
    "seresnet50_2d": _listed(
        "SEResNet50", _IMAGE, spatial_dims=2, in_channels=1, num_classes=CLASSES
    ),
    "efficientnet_b0_2d": _efficientnet("efficientnet-b0", 2, _IMAGE),
    "efficientnet_b0_3d": _efficientnet("efficientnet-b0", 3, _VOLUME),
    "vit_2d": _vit(2),
    "vit_3d": _vit(3),
    "vit_3d_perceptron": _vit(3, proj_type="perceptron"),
    "vit_3d_sincos": _vit(3, pos_embed_type="sincos"),
    "vit_2d_qkv_bias": _vit(2, qkv_bias=True),
    "classifier": _listed(
        "Classifier",
        (1, 32, 32),
        in_shape=(1, 32, 32),
        classes=CLASSES,
        channels=(4, 8, 16),
        strides=(2, 2, 2),
    ),
    "regressor": _listed(
        "Regressor",
        (1, 32, 32),
        in_shape=(1, 32, 32),
        out_shape=(CLASSES,),
        channels=(4, 8, 16),
        strides=(2, 2, 2),
    ),
    "critic_like_discriminator": _listed(
        "Classifier",
        (1, 32, 32),
        in_shape=(1, 32, 32),
        classes=CLASSES,
        channels=(4, 8, 16),
        strides=(2, 2, 2),
        num_res_units=0,
        bias=False,
    ),
    "fully_connected": _listed(
        "FullyConnectedNet",
        (20,),
        in_channels=20,
        out_channels=CLASSES,
        hidden_channels=[24, 24, 24, 24],
    ),
    "torchvision_fc": _listed(
        "TorchVisionFCModel", (3, 64, 64), model_name="resnet18", num_classes=CLASSES, pool=None
    ),
    "mil_mean": _mil("mean"),
    "mil_max": _mil("max"),
    "mil_attention": _mil("att"),
    "mil_transformer": _mil("att_trans"),
}
