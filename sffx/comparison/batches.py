"""Random inputs for a model and its cut one, of other batch sizes and other sizes as well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from sffx.blocks import Input
from sffx.inputs import constant_batch, like_the_model, random_batch
from sffx.net import plan_of

# The axes of a sample with another size, by input, axis and the new size.
Sizes = dict[tuple[str, int], int]

Source = Literal["random", "between 0 and 1", "ones", "example"]


class Batches:
    """Makes values of the inputs of a model: random ones, or ones where random ones do not fit.

    Args:
        model: the plain model.
        net: the cut model, which knows the inputs that it takes.
        example: its inputs by name, for a model that takes no random ones: one that checks its
            data, as for an end-of-sentence token in each sample.

    Attributes:
        inputs: that both take.
        source: of the values. A logarithm has values for random numbers between 0 and 1 only.
            Some models refuse what is no distribution, no index or no length; ones are all of
            these.
        sources: that there are, in the order in which they are tried.
    """

    def __init__(
        self, model: nn.Module, net: fx.GraphModule, example: Mapping[str, Any] | None = None
    ) -> None:
        self.inputs = plan_of(net).inputs
        self.source: Source = "random"
        self.sources: tuple[Source, ...] = ("random", "between 0 and 1", "ones", "example")
        if example is None:
            self.sources = self.sources[:-1]
        self._example = example or {}
        self._like = model

    def draw(
        self, batch: int, sizes: Sizes | None = None, *, padded: bool = False
    ) -> dict[str, Any]:
        """Return inputs by name. The same call returns the same values.

        Args:
            batch: the number of samples.
            sizes: of axes that have another size than in the example.
            padded: whether inputs of zeros and ones have their ones first, as masks have them.
        """
        inputs = [_resized(each, sizes or {}) for each in self.inputs]
        tensors = constant_batch(inputs, batch, "cpu")
        if self.source in ("random", "between 0 and 1"):
            in_unit_range = self.source == "between 0 and 1"
            tensors = random_batch(inputs, batch, in_unit_range=in_unit_range)
        if self.source == "example" and not sizes:
            return {each.name: _rows(self._example[each.name], batch) for each in inputs}
        if padded:
            tensors = tuple(map(_ones_first, tensors, inputs))
        if any(p.is_floating_point() for p in self._like.parameters()):
            tensors = like_the_model(self._like, tensors)
        return dict(zip([each.name for each in inputs], tensors, strict=True))

    def other_sizes(self) -> Iterator[Sizes]:
        """Yield axes with other sizes that the model may take: some larger, some smaller.

        Axes of one size change together, as the height and width of an image, or the lengths of
        tokens and their mask. An axis of which nothing else has the size may be the channels.
        """
        sizes = {size for each in self.inputs for size in each.shape if size > 1}
        for size in sorted(sizes, reverse=True):
            # An odd growth, and not the same for height and width, so that no rounding hides.
            yield self._changed(size, lambda old, k: old + 3 + 2 * k)
            yield self._changed(size, lambda old, k: old // 2)
            yield self._changed(size, lambda old, k: 2 * old)

    def _changed(self, size: int, change: Any) -> Sizes:
        changed: Sizes = {}
        for each in self.inputs:
            axes = [axis for axis, own in enumerate(each.shape) if own == size]
            for k, axis in enumerate(axes):
                changed[each.name, axis] = change(size, k)
        return changed


def _rows(value: Tensor, batch: int) -> Tensor:
    """Return so many rows of a value, the first ones again where it has fewer."""
    return value[torch.arange(batch) % len(value)]


def _resized(each: Input, sizes: Sizes) -> Input:
    shape = [sizes.get((each.name, axis), size) for axis, size in enumerate(each.shape)]
    return replace(each, shape=tuple(shape))


def _ones_first(tensor: Tensor, each: Input) -> Tensor:
    is_mask = each.high == 2 or tensor.dtype == torch.bool
    if not is_mask or tensor.ndim < 2 or tensor.is_complex():
        return tensor
    ordered = tensor.sort(dim=-1, descending=True).values
    ordered[..., 0] = 1  # a sample without a real token has no mean
    return ordered
