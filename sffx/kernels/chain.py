"""The formulas of `norm -> activation -> layer`, forward and backward, in plain operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sffx.kernels.activation import Activation

_aten = torch.ops.aten

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Running(NamedTuple):
    """The running statistics that a batch norm updates, and the weight of a batch in them."""

    mean: Tensor | None = None
    variance: Tensor | None = None
    momentum: float = 0.0


@dataclass(frozen=True)
class Chain:
    """A norm, an activation and a layer, each of which reads the one before.

    Attributes:
        norm: a batch norm or a layer norm, or None.
        activation: or None.
        layer: a linear layer or a convolution. None stands for a linear layer that is no module.
        overwrite: whether the gradient of x may be written over x.
        frees_gradient: whether the gradient of the output may be freed as soon as it was used.
    """

    norm: Any = None
    activation: Activation | None = None
    layer: Any = None
    overwrite: bool = False
    frees_gradient: bool = False

    @property
    def is_linear(self) -> bool:
        return self.layer is None or isinstance(self.layer, nn.Linear)

    @property
    def by_rows(self) -> bool:
        """Whether it is an activation and a linear layer, where no row depends on another."""
        return self.is_linear and self.norm is None and self.activation is not None

    def tracked(self) -> Running:
        """Count this batch as `torch.nn` norms do, and return what the norm has to update."""
        norm = self.norm
        if not isinstance(norm, BATCH_NORMS) or not norm.training or not norm.track_running_stats:
            return Running()
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        momentum = norm.momentum
        if momentum is None:
            momentum = 1 / int(norm.num_batches_tracked or 1)
        return Running(norm.running_mean, norm.running_var, momentum)

    def normalised(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Return the norm's output, and the statistics that its backward pass asks for."""
        norm = self.norm
        if norm is None:
            return x, ()
        if isinstance(norm, nn.LayerNorm):
            z, *statistics = torch.native_layer_norm(
                x, norm.normalized_shape, weight, bias, norm.eps
            )
            return z, tuple(statistics)
        mean, variance, momentum = running
        z, *statistics = _aten._batch_norm_impl_index(
            x, weight, bias, mean, variance, True, momentum, norm.eps, True
        )
        return z, tuple(statistics)

    def activated(self, z: Tensor) -> Tensor:
        """Return the layer's input, given the norm's output."""
        return self.activation.function(z) if self.activation is not None else z

    def layer_output(self, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output, given its input."""
        if self.is_linear:
            return F.linear(y, weight, bias)
        return self.layer._conv_forward(y, weight, bias)

    def norm_gradients(
        self,
        dz: Tensor,
        x: Tensor,
        weight: Any,
        bias: Any,
        statistics: tuple[Any, ...],
        wanted: list[bool],
    ) -> Any:
        """Return the gradients of x and of the norm's weight and bias, those that are wanted.

        Args:
            dz: gradient of the norm's output.
            x: input of the norm.
            weight: of the norm.
            bias: of the norm.
            statistics: that `normalised` returned.
            wanted: for each of the three gradients.
        """
        norm = self.norm
        if norm is None:
            return dz, None, None
        if isinstance(norm, nn.LayerNorm):
            return _aten.native_layer_norm_backward(
                dz, x, norm.normalized_shape, *statistics, weight, bias, wanted
            )
        mean, inverse_deviation, reserve, index = statistics
        return _aten._batch_norm_impl_index_backward(
            index,
            x,
            dz,
            weight,
            running_mean=None,
            running_var=None,
            save_mean=mean,
            save_var_transform=inverse_deviation,
            train=True,
            eps=norm.eps,
            output_mask=wanted,
            reservedSpace=reserve,
        )

    def input_gradient(self, dout: Tensor, like: Tensor, weight: Tensor) -> Any:
        """Return the gradient of the layer's input, which has the size of `like`."""
        if self.is_linear:
            return dout @ weight
        return self._convolution_gradients(dout, like, weight, [True, False, False])[0]

    def parameter_gradients(
        self, dout: Tensor, y: Tensor, weight: Tensor, wanted: list[bool]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of the layer's weight and bias, those that are wanted.

        Args:
            dout: gradient of the layer's output.
            y: the layer's input.
            weight: of the layer.
            wanted: for each of the two gradients.
        """
        if not self.is_linear:
            return self._convolution_gradients(dout, y, weight, [False, *wanted])[1:]
        rows = dout.flatten(0, -2)
        dw = rows.t() @ y.flatten(0, -2) if wanted[0] else None
        db = rows.sum(0) if wanted[1] else None
        return dw, db

    def _convolution_gradients(
        self, dout: Tensor, y: Tensor, weight: Tensor, wanted: list[bool]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, weight and bias, those that are wanted."""
        layer = self.layer
        return _aten.convolution_backward(
            dout,
            y,
            weight,
            bias_sizes=[weight.shape[0]],
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            transposed=False,
            output_padding=[0] * (y.ndim - 2),
            groups=layer.groups,
            output_mask=wanted,
        )
