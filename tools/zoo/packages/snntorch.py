"""Spiking classifiers of snntorch, written as its tutorials write them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from tools.zoo.entries import CLASSES, Model, random_inputs

REQUIRES = ("snntorch",)

# Enough for signals to pass through three layers; thresholds below are low, so that neurons fire.
_STEPS = 5


class Dense(nn.Module):
    """Linear layers with a neuron behind each, whose potentials the forward keeps."""

    def __init__(self, neuron: str, **options: Any) -> None:
        super().__init__()
        import snntorch

        widths = [20, 24, 24, CLASSES]
        self.layers = nn.ModuleList()
        self.neurons = nn.ModuleList()
        for width, following in itertools.pairwise(widths):
            self.layers.append(nn.Linear(width, following))
            self.neurons.append(getattr(snntorch, neuron)(**options))

    def forward(self, x: Tensor) -> Tensor:
        states: list[Any] = []
        neuron: Any
        for neuron in self.neurons:
            state = neuron.reset_mem()
            states.append(state if isinstance(state, tuple) else (state,))
        outputs = []
        for _ in range(_STEPS):
            current = x
            for i, layer in enumerate(self.layers):
                current, *states[i] = self.neurons[i](layer(current), *states[i])
            outputs.append(states[-1][-1])
        return torch.stack(outputs).mean(0)


class Convolutional(nn.Module):
    """A `Sequential` of convolutions, whose neurons keep their potentials themselves."""

    def __init__(self) -> None:
        super().__init__()
        import snntorch
        from snntorch import surrogate

        hidden = {"beta": 0.9, "spike_grad": surrogate.fast_sigmoid(), "init_hidden": True}
        self.net = nn.Sequential(
            *(nn.Conv2d(3, 8, 5), snntorch.Leaky(**hidden), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 5), snntorch.Leaky(**hidden), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(400, CLASSES), snntorch.Leaky(**hidden, output=True)),
        )

    def forward(self, x: Tensor) -> Tensor:
        from snntorch import utils

        utils.reset(self.net)
        potentials = [self.net(x)[1] for _ in range(_STEPS)]
        return torch.stack(potentials).mean(0)


_FLAT = random_inputs(x=(20,))

MODELS = {
    "leaky": Model(lambda: Dense("Leaky", beta=0.9), _FLAT),
    "leaky_learned": Model(
        lambda: Dense("Leaky", beta=0.9, learn_beta=True, learn_threshold=True), _FLAT
    ),
    "lapicque": Model(lambda: Dense("Lapicque", beta=0.9, threshold=0.02), _FLAT),
    "synaptic": Model(lambda: Dense("Synaptic", alpha=0.9, beta=0.8), _FLAT),
    "alpha": Model(lambda: Dense("Alpha", alpha=0.9, beta=0.8, threshold=0.02), _FLAT),
    "convolutional": Model(Convolutional, random_inputs(x=(3, 32, 32))),
}
