"""Classifiers of pytorchcv: the smallest model of each module that has one below 30 million."""

from __future__ import annotations

from typing import Any

from torch import nn

from tools.zoo.entries import CLASSES, Entry, Inputs
from tools.zoo.images import IMAGES, first_fitting

REQUIRES = ("pytorchcv",)

_LISTED = """
shufflenet_g3_wd4 dicenet_wd5 fdmobilenet_wd4 densenet40_k12_bc_cifar10 mobilenetb_wd4
menet160_8x1_g8 mobilenet_wd4 espnetv2_wd2 mobilenetv2b_wd4 igcv3_wd4 preresnet20_cifar10
resdropresnet20_cifar10 resnet20_cifar10 shakedropresnet20_cifar10 sepreresnet20_cifar10
seresnet20_cifar10 diapreresnet20_cifar10 diaresnet20_cifar10 shufflenetv2_wd2 shufflenetv2b_wd2
shakeshakeresnet20_2x16d_cifar10 revnet38 sqnxt23_w1 squeezenet_v1_1 mnasnet_small ror3_56_cifar10
dla46xc mobilenetv3_small_w7d20 darknet_tiny nin_cifar10 xdensenet40_2_k24_bc_cifar10
pyramidnet110_a48_cifar10 condensenet74_c8_g8 resnext20_32x2d_cifar10 peleenet regnetx002
hardnet39ds mixnet_s proxylessnas_mobile channelnet vovnet27s sparsenet121 spnasnet fbnet_cb
ghostnet darts efficientnet_b0 efficientnet_edge_small_b nasnet_4a1056 msdnet22_cifar10
preresnet10 resnet10 octresnet10_ad2 resneta10 sepreresnet10 seresnet10 resnext14_32x2d
diapreresnet10 diaresnet10 densenet121 ibn_densenet121 sharesnet18 resnestabc14 rir_cifar10
bninception diracnet18v2 hrnet_w18_small_v1 bam_resnet18 cbam_resnet18 isqrtcovresnet18 dpn68
xdensenet121_2 bagnet9 fishnet99 drnd22 wrn16_10_cifar10 msdnet22 xception inceptionv3
ibn_resnext50_32x4d inceptionresnetv1 ibn_resnet50 ibnb_resnet50 scnet50 resnetd50b
airnet50_1x64d_r16 sknet50 seresnext50_32x4d airnext50_32x4d_r2 ntsnet_cub wrn20_10_1bit_cifar10
selecsls42 senet16 tresnet_m resattnet56
"""


def entries() -> list[Entry]:
    return [Entry("pytorchcv", name) for name in _LISTED.split()]


def build(entry: Entry) -> nn.Module:
    from pytorchcv.model_provider import get_model

    model: nn.Module = get_model(entry.name, pretrained=False, num_classes=CLASSES)
    return model


def fitting_input(entry: Entry, model: nn.Module) -> Inputs:
    sizes: Any = model.in_size
    own = int(sizes[0])
    sides = [own] if own <= 32 else [*IMAGES, own]
    return first_fitting(model, [(3, side, side) for side in sides])
