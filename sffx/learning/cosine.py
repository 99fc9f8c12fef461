"""A goodness by direction: the cosine between a sample's features and a learned direction.

It is not the paper's. The mean square of an auxiliary convolution begins flat and grows without
bound. A cosine has a gradient from the first step on, and is bounded. From it small blocks learn
more. With a hidden layer before it, a block need not make its classes linearly separable itself. So
it keeps features that later blocks can use, as with the auxiliary networks of Belilovsky et al.
(arXiv 1901.08164).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sffx.errors import InputError
from sffx.kernels.directions import cosines, hidden_units, normed
from sffx.kernels.precision import full_precision, widened
from sffx.learning.pooling import features_of, num_features


class CosineGoodness(nn.Module):
    """`g[n, j] = scale * cos(w_j, v_n)`, for a sample's centred features v_n.

    Images and volumes are pooled to some regions along each axis of space: 2 regions give an image
    4 C features. Tokens are averaged, flat values taken as they are. A hidden layer may lie between
    these features and the cosine.

    Args:
        channels: C of the block's output.
        num_classes: J.
        channel_axis: axis of the channels in the batched output, as in `SFFGoodness`.
        spatial: number of axes besides batch and channels.
        regions: along each axis of space of images and volumes. More regions let small images and
            early blocks learn more, and cost parameters.
        scale: factor of the cosine, the inverse of the softmax's temperature.
        hidden: number of units of the hidden layer, with a ReLU; None for no such layer.

    Raises:
        InputError: there is only one feature, or one hidden unit.

    Attributes:
        weight: (J, features or hidden units); only the direction of its rows counts.
        hidden: the linear layer to the hidden units, or None. It reads features with a mean of 0
            and a variance of 1.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        channel_axis: int = 1,
        spatial: int = 2,
        regions: int = 2,
        scale: float = 10.0,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.channel_axis = channel_axis
        self.spatial = spatial
        self.regions = regions
        self.scale = scale
        features = num_features(channels, spatial, regions)
        _check_directions(features, hidden)
        self.hidden = nn.Linear(features, hidden) if hidden is not None else None
        inputs = features if hidden is None else hidden
        self.weight = nn.Parameter(torch.empty(num_classes, inputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw random directions, and the hidden layer as `torch.nn.Linear` does."""
        nn.init.normal_(self.weight)
        if self.hidden is not None:
            self.hidden.reset_parameters()

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the goodness (B, J), in float32 or wider, of a block's output.

        Args:
            y: the output of a block.
            mask: (B, T) where y is (B, T, C), nonzero at real tokens. The mean then runs over
                these alone.
        """
        with full_precision(y):
            wide = widened(y).movedim(self.channel_axis, 1)
            pooled = features_of(wide, mask, self.spatial, self.regions)
            features = normed(pooled)
            if self.hidden is not None:
                weight = self.hidden.weight.to(wide.dtype)
                bias = self.hidden.bias.to(wide.dtype)
                features = normed(hidden_units(features, weight, bias))
            return cosines(features, self.weight.to(wide.dtype), self.scale)

    def extra_repr(self) -> str:
        classes, inputs = self.weight.shape
        features = inputs if self.hidden is None else self.hidden.in_features
        return (
            f"{features}, {classes}, channel_axis={self.channel_axis}, "
            f"regions={self.regions}, scale={self.scale:g}"
        )


def _check_directions(features: int, hidden: int | None) -> None:
    # A single value minus its mean is 0.
    if features < 2:
        number = f"{features} feature"
    elif hidden is not None and hidden < 2:
        number = f"{hidden} hidden unit"
    else:
        return
    raise InputError(
        f"a cosine of {number} has no direction. "
        "Hint: goodness='sff' for such a block, and 2 hidden units at least"
    )
