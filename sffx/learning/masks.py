"""Whether a head or a norm of the user can be called with a mask of the real tokens."""

from __future__ import annotations

import inspect

from torch import nn

from sffx.blocks import Block
from sffx.errors import InputError


def require_mask_argument(part: nn.Module, block: Block, place: str) -> None:
    """Raise an InputError if a block has a mask, but a part of it takes none.

    Args:
        part: a head or a norm, which is called as part(y, mask).
        block: that it belongs to.
        place: of the part, for the error.
    """
    if not block.mask:
        return
    try:
        inspect.signature(part.forward).bind(None, None)
    except TypeError as cause:
        raise InputError(
            f"{place} returned a {type(part).__name__} that takes no mask, but the input "
            f"{block.mask!r} marks the real tokens of this block. "
            "Hint: give its forward a second argument, the mask (B, T)"
        ) from cause
