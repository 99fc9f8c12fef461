"""Random models in which several streams run side by side."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.stream_models import CLASSES

# Some of them twice, so that they are drawn more often.
KINDS = (
    *("layer", "layer", "read", "read", "gate"),
    *("relu", "relu_", "scale", "mask", "keep", "skip"),
)


class StreamProgram(nn.Module):
    """Runs instructions on several streams of one shape, (B, 4, 4, 4).

    Args:
        code: the instructions, (name, stream, ...).
        layers: that they name by index.
        count: the number of streams.
        inputs: the number of inputs, 1 or 2. All streams but the first read the second one.
        is_dense: whether pixels are classified, (B, J, 4, 4), and not samples.
        meets_at_logits: whether each stream has a last layer of its own, and not all together.
    """

    def __init__(
        self,
        code: list[tuple[Any, ...]],
        layers: list[nn.Module],
        count: int,
        inputs: int,
        *,
        is_dense: bool = False,
        meets_at_logits: bool = False,
    ) -> None:
        super().__init__()
        self.code = code
        self.count = count
        self.inputs = inputs
        self.layers = nn.ModuleList(layers)
        self.is_dense = is_dense
        widths = [4] * count if meets_at_logits else [4 * count]
        self.outs = nn.ModuleList(
            nn.Conv2d(width, CLASSES, 1) if is_dense else nn.Linear(width, CLASSES)
            for width in widths
        )

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        streams = [x if other is None or i == 0 else other for i in range(self.count)]
        kept: list[Tensor] = []
        for name, i, *rest in self.code:
            value = streams[i]
            if name == "layer":
                streams[i] = self.layers[rest[0]](value)
            elif name == "read":
                streams[i] = value + self.layers[rest[1]](streams[rest[0]])
            elif name == "gate":
                streams[i] = value * self.layers[rest[1]](streams[rest[0]]).sigmoid()
            elif name == "relu":
                streams[i] = F.relu(value)
            elif name == "relu_":
                # A stream that is the model's input, or another stream, is not written.
                streams[i] = F.relu_(value + 0)
            elif name == "scale":
                streams[i] = value * value.shape[1] ** -0.5
            elif name == "mask":
                streams[i] = value.masked_fill(value < 0, 0.1)
            elif name == "keep":
                kept.append(value)
            elif name == "skip" and kept:
                streams[i] = value + kept.pop()
        if not self.is_dense:
            streams = [each.mean((2, 3)) for each in streams]
        if len(self.outs) == 1:
            streams = [torch.cat(streams, 1)]
        logits = [out(each) for out, each in zip(self.outs, streams, strict=True)]
        return logits[0] if len(logits) == 1 else sum(logits[1:], logits[0]) / len(logits)

    def extra_repr(self) -> str:
        meets = len(self.outs) > 1
        options = f"inputs={self.inputs}, is_dense={self.is_dense}, meets_at_logits={meets}"
        return f"{self.code}, {options}"


@st.composite
def stream_programs(draw: Any) -> tuple[StreamProgram, int]:
    """Draw a model of two or three streams, and the number of its inputs."""
    count = draw(st.integers(2, 3))
    inputs = draw(st.integers(1, 2))
    code, layers = draw(_code(count))
    model = StreamProgram(
        code,
        layers,
        count,
        inputs,
        is_dense=draw(st.booleans()),
        meets_at_logits=draw(st.booleans()),
    )
    return model, inputs


@st.composite
def _code(draw: Any, count: int) -> tuple[list[tuple[Any, ...]], list[nn.Module]]:
    """Draw the instructions of some streams, and their layers."""
    layers: list[nn.Module] = [_layer(3, False) for _ in range(count)]
    code: list[tuple[Any, ...]] = [("layer", i, i) for i in range(count)]
    for _ in range(draw(st.integers(5, 12))):
        kind = draw(st.sampled_from(KINDS))
        i = draw(st.integers(0, count - 1))
        if kind == "layer" and len(layers) > count and draw(st.booleans()):
            # A layer that was used before, perhaps by another stream, as in a Siamese net.
            code.append((kind, i, draw(st.integers(count, len(layers) - 1))))
            continue
        if kind in ("layer", "read", "gate"):
            read = [] if kind == "layer" else [draw(st.integers(0, count - 1))]
            code.append((kind, i, *read, len(layers)))
            layers.append(_layer(4, draw(st.booleans())))
        else:
            code.append((kind, i))
    return code, layers


def _layer(inputs: int, with_norm: bool) -> nn.Module:
    layer = nn.Conv2d(inputs, 4, 3, padding=1)
    return nn.Sequential(layer, nn.BatchNorm2d(4)) if with_norm else layer
