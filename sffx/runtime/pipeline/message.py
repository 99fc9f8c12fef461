"""What is sent from one stage to the next: tensors as bytes, and the layout to allocate them by."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from sffx.errors import InputError


@dataclass(frozen=True)
class TensorLayout:
    """Stands for a tensor in a layout.

    The strides are kept, since kernels of another memory format round in another way.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def allocate(self, device: torch.device) -> Tensor:
        """Return a tensor of this layout with any values."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Layout:
    """The structure of a message: what the receiver must know before the tensors arrive.

    Attributes:
        spec: the nesting of lists, tuples and dictionaries.
        leaves: a `TensorLayout` for each tensor, and everything else as it is.
    """

    spec: TreeSpec
    leaves: tuple[Any, ...]

    def allocate(self, device: torch.device) -> list[Tensor]:
        """Return a tensor for each tensor of the message, in order."""
        tensors = []
        for leaf in self.leaves:
            if isinstance(leaf, TensorLayout):
                tensors.append(leaf.allocate(device))
        return tensors

    def unpacked(self, tensors: Sequence[Tensor]) -> Any:
        """Return the message with these tensors."""
        remaining = iter(tensors)
        leaves = []
        for leaf in self.leaves:
            is_tensor = isinstance(leaf, TensorLayout)
            leaves.append(next(remaining) if is_tensor else leaf)
        return tree_unflatten(leaves, self.spec)


@dataclass(frozen=True)
class Packed:
    """A message that is ready to be sent.

    Attributes:
        layout: pickled. Equal messages have equal bytes.
        tensors: dense ones, in the order of the layout.
    """

    layout: bytes
    tensors: list[Tensor]


def packed(message: Any) -> Packed:
    """Return a message, a tree of tensors and other values, ready to be sent.

    Raises:
        InputError: it holds a tensor that is no dense array of numbers.
    """
    leaves, spec = tree_flatten(message)
    layouts: list[Any] = []
    tensors: list[Tensor] = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            layouts.append(leaf)
            continue
        dense = _dense(leaf)
        tensors.append(dense)
        layouts.append(TensorLayout(tuple(dense.shape), dense.stride(), dense.dtype))
    return Packed(pickle.dumps(Layout(spec, tuple(layouts))), tensors)


def read_layout(pickled: bytes) -> Layout:
    """Return the layout of a message from another process of the same training."""
    layout: Layout = pickle.loads(pickled)
    return layout


def _dense(tensor: Tensor) -> Tensor:
    """Return a tensor whose elements fill one piece of memory, in any order of its axes."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        raise InputError(
            f"a value between two stages is a {type(tensor).__name__} of layout {tensor.layout}, "
            "which cannot be sent to another process. "
            "Hint: cuts=[...] puts the boundary between two processes elsewhere"
        )
    # The bytes of a conjugated or negated view are those of its base.
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain if _fills_its_memory(plain) else plain.contiguous()


def _fills_its_memory(tensor: Tensor) -> bool:
    """Return whether a tensor is contiguous up to the order of its axes, as with channels last."""
    # From the innermost axis on, each stride must be the number of elements further inside.
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:  # such an axis has any stride
            continue
        if stride != expected:
            return False
        expected *= size
    return True
