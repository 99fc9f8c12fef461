"""Spiking classifiers of spikingjelly. Their neurons are reset before each batch."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from tools.zoo.entries import CLASSES, Model, random_inputs

REQUIRES = ("spikingjelly", "h5py", "loguru")

_STEPS = 2


class Resetting(nn.Module):
    """A spiking network, reset before each batch, and the mean of its outputs over time."""

    def __init__(self, network: nn.Module, is_stepwise: bool) -> None:
        super().__init__()
        self.network = network
        self.is_stepwise = is_stepwise

    def forward(self, x: Tensor) -> Tensor:
        from spikingjelly.activation_based import functional

        functional.reset_net(self.network)
        if not self.is_stepwise:
            return self.network(x.unsqueeze(0).repeat(_STEPS, *([1] * x.ndim))).mean(0)
        total = self.network(x)
        for _ in range(_STEPS - 1):
            total = total + self.network(x)
        return total / _STEPS


def _listed(
    module: str, function: str, mode: str = "s", node: str = "IFNode", **more: Any
) -> Model:
    def build() -> nn.Module:
        from spikingjelly.activation_based import functional, neuron, surrogate

        models = importlib.import_module(f"spikingjelly.activation_based.model.{module}")
        network = getattr(models, function)(
            spiking_neuron=getattr(neuron, node),
            surrogate_function=surrogate.ATan(),
            detach_reset=True,
            num_classes=CLASSES,
            **more,
        )
        functional.set_step_mode(network, mode)
        return Resetting(network, is_stepwise=mode == "s")

    return Model(build, random_inputs(x=(3, 32, 32)))


def _layers(*kinds: str, mode: str = "s", node: str = "IFNode") -> Model:
    """Return a network that is written down as layers, as the tutorials do."""

    def build() -> nn.Module:
        from spikingjelly.activation_based import functional, layer, neuron, surrogate

        def fire() -> nn.Module:
            # Neurons that leak would be silent at the ordinary threshold, in so few steps.
            threshold = 1.0 if node == "IFNode" else 0.3
            surrogate_function = surrogate.ATan()
            fired: nn.Module = getattr(neuron, node)(
                v_threshold=threshold, surrogate_function=surrogate_function
            )
            return fired

        parts: list[nn.Module] = []
        width = 3
        for kind in kinds:
            if kind == "pool":
                parts.append(layer.MaxPool2d(2, 2))
                continue
            parts += [layer.Conv2d(width, 16, 3, padding=1, bias=False), layer.BatchNorm2d(16)]
            parts.append(fire())
            width = 16
        side = 32 // 2 ** kinds.count("pool")
        parts += [layer.Flatten(), layer.Linear(16 * side * side, 24), fire()]
        parts += [layer.Linear(24, CLASSES)]
        network = nn.Sequential(*parts)
        functional.set_step_mode(network, mode)
        return Resetting(network, is_stepwise=mode == "s")

    return Model(build, random_inputs(x=(3, 32, 32)))


MODELS = {
    "spiking_resnet18": _listed("spiking_resnet", "spiking_resnet18"),
    "spiking_resnet18_multistep": _listed("spiking_resnet", "spiking_resnet18", "m"),
    "spiking_resnet18_lif": _listed("spiking_resnet", "spiking_resnet18", node="LIFNode"),
    "sew_resnet18_add": _listed("sew_resnet", "sew_resnet18", cnf="ADD"),
    "sew_resnet18_multistep": _listed("sew_resnet", "sew_resnet18", "m", cnf="ADD"),
    # Without BN, no spike of random weights passes all layers at the ordinary threshold.
    "spiking_vgg11": _listed("spiking_vgg", "spiking_vgg11", v_threshold=0.2),
    "spiking_vgg11_bn": _listed("spiking_vgg", "spiking_vgg11_bn"),
    "layers": _layers("conv", "pool", "conv", "pool", "conv", "pool"),
    "layers_multistep": _layers("conv", "pool", "conv", "pool", "conv", "pool", mode="m"),
    "layers_lif": _layers("conv", "pool", "conv", "pool", "conv", "pool", node="LIFNode"),
    "layers_parametric": _layers(
        "conv", "pool", "conv", "pool", "conv", "pool", node="ParametricLIFNode"
    ),
}
