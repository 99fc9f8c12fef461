"""Questions about a single tensor that several rooms of the package ask."""

from __future__ import annotations

from torch import Tensor


def storage_key(tensor: Tensor) -> int:
    """Return a key of a tensor's storage, which the views of one tensor share.

    The key is an address. torch uses it again after the storage is freed, so whoever keeps a key
    keeps the storage alive as well.
    """
    return tensor.untyped_storage()._cdata


def can_learn(tensor: Tensor) -> bool:
    """Whether a tensor may have a gradient: floats and complex numbers may."""
    return tensor.is_floating_point() or tensor.is_complex()
