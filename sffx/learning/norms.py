"""The norm between two blocks. It normalises a block's output before the next block reads it.

The layer norm removes the length of the output, which carries the goodness. So the next block does
not see the goodness of the block before it.

The contract of `norm=`: a callable `(block) -> nn.Module | None`. It is called for each feature
block, and returns a new module, or None for no norm. `block` is the `sffx.blocks.Block` whose
output is normalised. Where several values cross the cut after a block, it is called for each of
them, with a block that has this value as its output.

The norm is moved to the device and the dtype of the model. Then

- it is called as `norm(y)`; where `block.mask` is not empty, as `norm(y, mask)`;
- y is the detached output of the block, and mask is as for heads (`sffx.learning.heads`);
- it returns a value of the shape and dtype of y, and does not write to y;
- it has no trainable parameters, since it is part of no block that could train them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sffx.blocks import Block, BlockPlan, NormMaker, Options, option_name
from sffx.checks import require_callable
from sffx.errors import InputError, shown
from sffx.kernels.precision import widened
from sffx.learning.masks import require_mask_argument
from sffx.tensors import require_identity


class SampleNorm(nn.Module):
    """Layer norm without parameters, over all axes but the batch (section 4.2).

    With a mask it runs over the real tokens alone.

    Args:
        eps: is added to the variance.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return y, (B, ...), with each sample normalised.

        Args:
            y: the output of a block.
            mask: (B, T) where y is (B, T, C), nonzero at real tokens. The others take no part in
                mean and variance, and become zero.
        """
        if mask is not None:
            return self._over_tokens(y, mask.bool()[:, :, None])
        if torch.onnx.is_in_onnx_export():
            return self._in_onnx(y)
        if torch.compiler.is_exporting() or not _is_channels_last(y):
            return F.layer_norm(y, y.shape[1:], eps=self.eps)
        # The result does not depend on the order of the axes. In the order of its memory, a
        # channels-last value is normalised without a copy, and stays channels-last.
        channels_at_end = y.movedim(1, -1)
        normed = F.layer_norm(channels_at_end, channels_at_end.shape[1:], eps=self.eps)
        return normed.movedim(-1, 1)

    def _in_onnx(self, y: Tensor) -> Tensor:
        """Return the same by single operations, for an ONNX file.

        ONNX Runtime has a layer norm, but it loses digits when a sample has many values.
        """
        centred = y - _mean(y)
        return centred * torch.rsqrt(_mean(centred.square()) + self.eps)

    def _over_tokens(self, y: Tensor, real: Tensor) -> Tensor:
        wide = widened(y).masked_fill(~real, 0)
        # A sample without a real token counts as having one, so that nothing is divided by zero.
        tokens = real.sum((1, 2), keepdim=True).clamp(min=1)
        count = tokens * y.shape[2]
        mean = wide.sum((1, 2), keepdim=True) / count
        centred = (wide - mean).masked_fill(~real, 0)
        variance = centred.square().sum((1, 2), keepdim=True) / count
        return (centred * torch.rsqrt(variance + self.eps)).to(y.dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class TokenNorm(nn.Module):
    """Layer norm without parameters of each token by itself, for tasks of tokens.

    There the goodness of a token is in the token's own length. A norm over all tokens would also
    tell a token about those behind it, which a language model must not see.

    Args:
        channel_axis: of the values, (B, T, C) or (B, C, T).
        eps: is added to the variance.
    """

    def __init__(self, channel_axis: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.channel_axis = channel_axis
        self.eps = eps

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return y with each token normalised.

        Args:
            y: the output of a block.
            mask: (B, T), nonzero at real tokens. The others become zero.
        """
        tokens = y.movedim(self.channel_axis, -1)
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=self.eps)
        if mask is not None:
            normed = normed.masked_fill(~mask.bool()[:, :, None], 0)
        return normed.movedim(-1, self.channel_axis)

    def extra_repr(self) -> str:
        return f"channel_axis={self.channel_axis}, eps={self.eps}"


class LengthNorm(nn.Module):
    """Divides each sample by its length, so that only its direction goes on (arXiv 2212.13345).

    The length becomes the square root of the number of values, so that their mean square is 1.
    With a mask it counts the real tokens alone.

    Args:
        eps: is added to the root of the mean square.
    """

    def __init__(self, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return y, (B, ...), with each sample at the same length.

        Args:
            y: the output of a block.
            mask: (B, T) where y is (B, T, C), nonzero at real tokens. The others become zero.
        """
        axes = tuple(range(1, y.ndim))
        wide = widened(y)
        if mask is None:
            mean_square = wide.square().mean(axes, keepdim=True)
        else:
            real = mask.bool()[:, :, None]
            wide = wide.masked_fill(~real, 0)
            count = real.sum(axes, keepdim=True).clamp(min=1) * y.shape[2]
            mean_square = wide.square().sum(axes, keepdim=True) / count
        return (wide / (mean_square.sqrt() + self.eps)).to(y.dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


def _is_channels_last(y: Tensor) -> bool:
    return y.movedim(1, -1).is_contiguous() and not y.is_contiguous()


def _mean(y: Tensor) -> Tensor:
    """Return the mean of each sample, (B, 1, ...)."""
    # One axis after the other: short sums lose fewer digits.
    for axis in range(y.ndim - 1, 0, -1):
        y = y.mean(axis, keepdim=True)
    return y


def _layer_norm(block: Block) -> nn.Module:
    return SampleNorm()


def _token_norm(block: Block) -> nn.Module:
    return TokenNorm(block.channel_axis)


def _no_norm(block: Block) -> None:
    return None


def _length_norm(block: Block) -> nn.Module:
    return LengthNorm()


# Of the features of a sample, (N, features), by the name of an objective's norm.
_FEATURE_NORMS: dict[str, type[nn.Module]] = {
    "layer": SampleNorm,
    "length": LengthNorm,
    "none": nn.Identity,
}


def feature_norm(norm: str | NormMaker) -> nn.Module:
    """Return the norm that a linear probe applies to the features of a sample, (N, features).

    Args:
        norm: of the objective. A callable is for the outputs of blocks, so that features have the
            layer norm.
    """
    return _FEATURE_NORMS[norm if isinstance(norm, str) else "layer"]()


NORMS: dict[str, NormMaker] = {"layer": _layer_norm, "length": _length_norm, "none": _no_norm}


def norm_maker(options: Options) -> NormMaker:
    """Return the callable that makes the norm behind a block.

    Raises:
        InputError: there is no such norm.
    """
    norm = options.norm
    if isinstance(norm, nn.Module):
        raise InputError(
            f"norm is a module, {type(norm).__name__}, but each block has a norm of its own. "
            "Hint: pass a callable (block) -> nn.Module | None"
        )
    if callable(norm):
        require_callable("norm", norm, ("block",))
        return norm
    if not isinstance(norm, str) or norm not in NORMS:
        names = ", ".join(map(repr, NORMS))
        raise InputError(
            f"there is no norm {shown(norm)}. Hint: choose one of {names}, "
            "or pass a callable (block) -> nn.Module | None"
        )
    return NORMS[norm]


def make_norms(plan: BlockPlan, root: nn.Module) -> list[list[nn.Module | None]]:
    """Return the norms behind each block, on the device and in the dtype of the model's parameters.

    A block has one for each of its outputs.

    Raises:
        InputError: there is no such norm, or a callable returned something else than a module
            without trainable parameters, or one module with buffers twice; names the block.
    """
    like = next(p for p in root.parameters() if p.is_floating_point())
    maker = norm_maker(plan.options)
    if maker is _layer_norm and plan.task.norms_tokens:
        maker = _token_norm
    norms: list[list[nn.Module | None]] = []
    earlier: list[nn.Module] = []
    for block in plan:
        own: list[nn.Module | None] = []
        for output in block.outputs:
            norm = maker(block.seen_from(output))
            if norm is not None:
                _require_norm(norm, block, plan.options)
                _require_own_buffers(norm, earlier, block, plan.options)
                earlier.append(norm)
                norm = norm.to(like.device, like.dtype)
            own.append(norm)
        norms.append(own)
    return norms


def _require_norm(norm: object, block: Block, options: Options) -> None:
    place = f"{block.target} ({block.name}): norm {option_name(options.norm)}"
    if not isinstance(norm, nn.Module):
        raise InputError(
            f"{place} returned a {type(norm).__name__}, not a torch.nn.Module. "
            "Hint: return the norm, which is called as norm(y), or None"
        )
    require_identity(norm)
    if any(p.requires_grad for p in norm.parameters()):
        raise InputError(
            f"{place} returned a {type(norm).__name__} with trainable parameters, which are "
            "part of no block. "
            "Hint: elementwise_affine=False or affine=False, or norm.requires_grad_(False)"
        )
    require_mask_argument(norm, block, place)


def _require_own_buffers(
    norm: nn.Module, earlier: list[nn.Module], block: Block, options: Options
) -> None:
    """Raise an InputError if blocks share a norm with buffers: they would mix their statistics."""
    is_shared = any(norm is other for other in earlier)
    if is_shared and any(True for _ in norm.buffers()):
        raise InputError(
            f"{block.target} ({block.name}): norm {option_name(options.norm)} returned the same "
            f"{type(norm).__name__} as before, whose buffers would mix what several blocks give. "
            "Hint: make a new module at each call"
        )
