"""A head for large vocabularies: an adapter, and a copy of the model's own output layer.

The paper's head has V times C weights for each block. Here all blocks share one copy of the weight
of the model's output layer, which they only read. A block learns an adapter in front of it.

The copy is made anew every `EVERY` training steps, and whenever the layer has changed in eval mode.
It is a copy and not the weight itself, since the output layer belongs to another block, which may
be on another device or in another process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sffx.errors import InputError
from sffx.kernels.precision import full_precision, widened

EVERY = 20


class OutputCopy(nn.Module):
    """A copy of an output layer's weight and bias, which the heads of all blocks read.

    It is no part of the state dict, since it is made from what is.

    Args:
        source: the output layer.
        readers: how many heads read the copy in a training step.
    """

    weight: Tensor
    bias: Tensor | None
    # The state of the layer that was copied, None where it is not known.
    _made_of: object = None

    def __init__(self, source: nn.Linear, readers: int) -> None:
        super().__init__()
        # In a tuple, so that it does not become a child: it belongs to another block.
        self._source = (source,)
        self._readers = readers
        self._reads = 0
        self.register_buffer("weight", source.weight.detach().clone(), persistent=False)
        bias = None if source.bias is None else source.bias.detach().clone()
        self.register_buffer("bias", bias, persistent=False)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the layer as it is now."""
        (source,) = self._source
        self.weight.copy_(source.weight.detach())
        if self.bias is not None:
            self.bias.copy_(source.bias.detach())
        self._made_of = self._state_of_source()

    def refresh_if_changed(self) -> None:
        """Copy the layer if it has changed since, as when weights are loaded in eval mode."""
        state = self._state_of_source()
        if state is None or state != self._made_of:
            self.refresh()

    def _state_of_source(self) -> object:
        """Return what differs once the layer has changed, None if torch cannot tell."""
        states = []
        for parameter in self._source[0].parameters(recurse=False):
            # A tensor of inference mode has no version.
            if parameter.is_inference():
                return None
            states.append((id(parameter), parameter._version))
        return states

    def about_to_copy(self) -> list[nn.Parameter]:
        """Return the parameters that the next read in training copies: mostly none."""
        is_due = self._reads % (EVERY * self._readers) == 0
        return list(self._source[0].parameters()) if is_due else []

    def note_read(self) -> None:
        """Count a read in training, and refresh the copy before the first read of some steps."""
        if self.about_to_copy():
            self.refresh()
        self._reads += 1

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        """Let the next read copy the layer, whose weights are loaded with those of the net."""
        super()._load_from_state_dict(*arguments, **options)
        self._reads = 0
        self._made_of = None

    def train(self, mode: bool = True) -> OutputCopy:
        """Set the mode. In eval mode the copy is the layer as it is then."""
        if not mode:
            self.refresh()
        return super().train(mode)


class SharedOutput(nn.Module):
    """`s[n, t] = W norm(A y[n, t]) + b`, with an adapter A and the output layer's W and b.

    The adapter begins as the identity where the widths allow it, so that the scores begin as those
    that the output layer gives for the block's own output.

    Args:
        channels: C of the block's output.
        channel_axis: axis of the channels in the batched output.

    Attributes:
        output: the copy, which `connect` sets.
    """

    def __init__(self, channels: int, channel_axis: int) -> None:
        super().__init__()
        self.channel_axis = channel_axis
        self.adapter = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.output: OutputCopy | None = None
        nn.init.eye_(self.adapter.weight)
        nn.init.zeros_(self.adapter.bias)

    def connect(self, output: OutputCopy) -> None:
        """Read a copy of the output layer, which may have another width than the block."""
        channels = self.adapter.in_features
        width = output.weight.shape[1]
        if width != channels:
            like = self.adapter.weight
            self.adapter = nn.Linear(channels, width).to(like.device, like.dtype)
            self.norm = nn.LayerNorm(width).to(like.device, like.dtype)
        self.output = output

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the scores (B, T, V), in float32 or wider, of a block's output.

        Args:
            y: the output of a block.
            mask: not used, since no token sees another.
        """
        output = self.output
        assert output is not None  # `connect` has set it
        if not torch.compiler.is_compiling():
            if self.training:
                output.note_read()
            else:
                output.refresh_if_changed()
        with full_precision(y):
            wide = widened(y).movedim(self.channel_axis, 2)
            dtype = wide.dtype
            adapted = F.linear(wide, self.adapter.weight.to(dtype), self.adapter.bias.to(dtype))
            weight = self.norm.weight.to(dtype)
            normed = F.layer_norm(adapted, weight.shape, weight, self.norm.bias.to(dtype))
            bias = None if output.bias is None else output.bias.to(dtype)
            return F.linear(normed, output.weight.to(dtype), bias)


def connect(heads: list[nn.Module], source: nn.Module | None, num_outputs: int) -> None:
    """Give the heads that need it one copy of the model's output layer.

    Args:
        heads: of all blocks.
        source: the last module of the classifier.
        num_outputs: V.

    Raises:
        InputError: the model does not end in a linear layer of V outputs.
    """
    shared = [head for head in heads if isinstance(head, SharedOutput)]
    if not shared:
        return
    source = require_output_layer(source, num_outputs)
    copy = OutputCopy(source, len(shared))
    for head in shared:
        head.connect(copy)


def own_parameters(channels: int, width: int) -> int:
    """Return how many parameters a `SharedOutput` has, those of an adapter and of a norm.

    Args:
        channels: of the block.
        width: of the features that the output layer reads.
    """
    return (channels + 1) * width + 2 * width


def require_output_layer(source: nn.Module | None, num_outputs: int) -> nn.Linear:
    """Return the output layer.

    Raises:
        InputError: it is no linear layer of V outputs.
    """
    if isinstance(source, nn.Linear) and source.out_features == num_outputs:
        return source
    raise InputError(
        f"goodness 'shared' needs a model that ends in a linear layer of {num_outputs} outputs, "
        f"but the last module is a {type(source).__name__}. Hint: goodness='sff' or 'mlp'"
    )
