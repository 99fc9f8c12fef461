"""Scores of tokens that make a grid, as scores of a map of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, isqrt

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from sffx.errors import InputError

# Tokens before those of the image: of a class, of a distillation, registers.
_MOST_EXTRA = 8


def grid_of(tokens: int, size: Sequence[int]) -> tuple[int, int] | None:
    """Return the height and width of the grid that tokens make; None where they make none.

    The grid has the proportions of the image. Up to 8 tokens may come before it.

    Args:
        tokens: their number.
        size: height and width of the image, in pixels.
    """
    height, width = size
    common = gcd(height, width)
    rows, columns = height // common, width // common
    for extra in range(min(_MOST_EXTRA + 1, tokens)):
        cells = tokens - extra
        scale = isqrt(cells // (rows * columns))
        if scale and rows * columns * scale**2 == cells:
            return rows * scale, columns * scale
    return None


def on_grid(scores: Tensor, size: Sequence[int]) -> Tensor:
    """Return scores of a grid of tokens, (B, J, N), as those of a map, (B, J, h, w).

    Scores of a map are returned as they are.

    Args:
        scores: of tokens or of a map.
        size: height and width of the image, or of a map with its proportions.

    Raises:
        InputError: the tokens make no grid of these proportions.
    """
    # An exporter traces this with proxies, and records a call of this function.
    if has_torch_function((scores,)):
        on_map: Tensor = handle_torch_function(on_grid, (scores,), scores, size)
        return on_map
    if scores.ndim > 3:
        return scores
    tokens = scores.shape[2]
    grid = grid_of(tokens, size)
    if grid is None:
        raise InputError(
            f"{tokens} tokens make no grid with the proportions {size[0]} : {size[1]} of the "
            "labels. Hint: pass labels of the size of the image"
        )
    cells = grid[0] * grid[1]
    return scores[:, :, tokens - cells :].unflatten(2, grid)
