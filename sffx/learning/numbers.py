"""The head of a block that predicts numbers: a linear readout of pooled features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sffx.errors import InputError
from sffx.kernels.precision import full_precision, widened
from sffx.learning.pooling import features_of, num_features


class NumberReadout(nn.Module):
    """`s[n] = W v_n + b`, for a sample's pooled features v_n.

    Images and volumes are pooled to some regions along each axis of space. Tokens are averaged,
    flat values taken as they are. A hidden layer with a ReLU may lie before the readout. It reads
    the features by a layer norm without parameters, so that it begins at the same place in every
    block.

    Args:
        channels: C of the block's output.
        num_outputs: N.
        channel_axis: axis of the channels in the batched output, as in `SFFGoodness`.
        spatial: number of axes besides batch and channels.
        regions: along each axis of space of images and volumes.
        hidden: number of units of the hidden layer; None for no such layer.

    Raises:
        InputError: there is only one feature before the hidden layer.
    """

    def __init__(
        self,
        channels: int,
        num_outputs: int,
        channel_axis: int = 1,
        spatial: int = 2,
        regions: int = 1,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.channel_axis = channel_axis
        self.spatial = spatial
        self.regions = regions
        features = num_features(channels, spatial, regions)
        if hidden is not None and features < 2:
            raise InputError(
                "a single feature minus its mean is 0, which a hidden layer would read. "
                "Hint: goodness='sff' for such a block"
            )
        self.hidden = nn.Linear(features, hidden) if hidden is not None else None
        self.readout = nn.Linear(features if hidden is None else hidden, num_outputs)

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the numbers (B, N), in float32 or wider, for a block's output.

        Args:
            y: the output of a block.
            mask: (B, T) where y is (B, T, C), nonzero at real tokens. The mean then runs over
                these alone.
        """
        with full_precision(y):
            wide = widened(y).movedim(self.channel_axis, 1)
            features = features_of(wide, mask, self.spatial, self.regions)
            if self.hidden is not None:
                normed = F.layer_norm(features, features.shape[1:])
                features = _linear(self.hidden, normed).relu()
            return _linear(self.readout, features)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Return the output of a layer whose parameters may have 16 bits."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
