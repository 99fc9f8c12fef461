"""The modified channel-wise competitive loss (CwC): groups of channels, and no parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sffx.errors import InputError
from sffx.kernels.goodness import as_positions, mean_square
from sffx.kernels.padding import per_real_token, zero_padded
from sffx.kernels.precision import full_precision, widened


class CwCGoodness(nn.Module):
    """The mean square of each class's group of channels (sections 2.3.1, 2.3.2).

    The C channels are split over the J classes in order, and as evenly as possible: where J does
    not divide C, each of the first C mod J groups has one channel more.

    Args:
        channels: C of the block's output.
        num_classes: J.
        channel_axis: axis of the channels in the batched output, as in `SFFGoodness`.
        superclass_of: of each class, counted from 0. The channels are then split over the
            superclasses, and a class has the goodness of its superclass. None for no superclasses.

    Raises:
        InputError: there are fewer channels than classes, or than superclasses.

    Attributes:
        groups: (C, J) of bool; column j marks the channels of class j. A cast of the net leaves
            them as they are, where shares such as 1/3 would be rounded.
    """

    groups: Tensor

    def __init__(
        self,
        channels: int,
        num_classes: int,
        channel_axis: int = 1,
        superclass_of: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        number = num_classes if superclass_of is None else max(superclass_of) + 1
        if number > channels:
            kind = "class" if superclass_of is None else "superclass"
            raise InputError(
                f"CwC needs a channel for each {kind}, but a block has {channels} channels for "
                f"{number} {kind}es. Hint: use goodness='sff', or a policy whose blocks end "
                "with more channels"
            )
        self.channel_axis = channel_axis
        groups = torch.arange(channels).tensor_split(number)
        sizes = torch.tensor([len(group) for group in groups])
        class_of_channel = torch.arange(number).repeat_interleave(sizes)
        groups_of_channel = F.one_hot(class_of_channel, number).bool()
        if superclass_of is not None:
            groups_of_channel = groups_of_channel[:, list(superclass_of)]
        self.register_buffer("groups", groups_of_channel, persistent=False)

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the goodness (B, J), in float32 or wider, of a block's output.

        Args:
            y: the output of a block.
            mask: (B, T) where y is (B, T, C), nonzero at real tokens. The mean then runs over
                these alone.
        """
        with full_precision(y):
            wide = widened(y)
            marks = self.groups.to(wide.dtype)
            # The weights of the mean over the channels of each class.
            groups = marks / marks.sum(0)
            if mask is None:
                return mean_square(as_positions(wide, self.channel_axis)) @ groups
            real = mask.bool()
            positions = as_positions(zero_padded(wide, real), self.channel_axis)
            return mean_square(positions) @ groups * per_real_token(real, wide.dtype)

    def extra_repr(self) -> str:
        channels, classes = self.groups.shape
        return f"{channels}, {classes}, channel_axis={self.channel_axis}"
