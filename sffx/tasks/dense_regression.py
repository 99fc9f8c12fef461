"""Numbers of pixels, of voxels, or of the samples of a signal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sffx.tasks.dense import Dense
from sffx.tasks.regression import Regression


@dataclass(frozen=True)
class DenseRegression(Dense, Regression):  # type: ignore[override]  # `shapes`
    """Numbers of pixels: images from images, depth, flow, fields of physics.

    The model's output is (B, N, H, W), and y is the same; with volumes (B, N, D, H, W), with
    signals (B, N, T). One number for each pixel may lack its axis, as depth does: (B, H, W) made
    from an image, (B, D, H, W) from a volume. Of one number, y may have the axis or lack it.

    The head of a block is a linear readout at each position, `s[n, :, p] = W Y[n, :, p] + b`, at
    the block's own resolution; "mlp" has a hidden layer. The loss of a block is the squared error,
    the mean over all numbers. Where scores and y differ in size, the finer of the two is averaged
    over the pixels that fall into one of the other.

    In train mode the net returns a tuple, in which each block has its own resolution. In eval mode
    the numbers are enlarged to the size of the answer, and the ensemble is their mean. A block of
    low resolution blurs it, so the readout "last" or "classifier" may be the better answer.

    `sffx.evaluate` enlarges the scores to the size of y. It reports what it reports for
    `Regression`, with R2 over all pixels.

    Bring targets to a mean of 0 and a variance of 1 before the training. The norm between two
    blocks removes the scale of a sample. Where it matters, as in physics, pass `norm="none"`.

    With `skip_nan`, numbers that are nan are left out, as of pixels whose depth is not known.
    """

    name: ClassVar[str] = "dense-regression"
    form: ClassVar[str] = "field"
    outputs: ClassVar[str] = "numbers of pixels"
    what: ClassVar[str] = "numbers"
    task_of_sample: ClassVar[str] = "Regression"

    def check_values(self, y: Tensor) -> None:
        self.require_numbers(y)
