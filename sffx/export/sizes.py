"""Which lengths of an exported model's inputs stay open, and the inputs that a file is tried on.

The batch always stays open. With `dynamic_size`, so do the height and width of one image input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sffx.blocks import Input
from sffx.checks import require_flag
from sffx.compiler.fake import failures_unlogged, fake_copy
from sffx.compiler.trace.sizes import is_guard
from sffx.errors import ExportError, InputError, first_line
from sffx.export.parity import Scores, as_tuple
from sffx.inputs import constant_batch, random_batch
from sffx.net import plan_of

Program = TypeVar("Program")

# The names of the open axes of one input, by the index of the axis.
Axes = dict[int, str]

TRACED_BATCH = 2
VERIFIED_BATCHES = (1, 3)  # others than the traced one
# What is added to height and width for a second size: multiples of the strides of common models,
# and two different numbers, so that an exporter cannot take both axes for one.
GROWTH = (32, 64)


def require_image(inputs: Sequence[Input], *, dynamic_size: bool) -> None:
    """Raise an InputError if the image size is to stay open and there is no single image input."""
    require_flag("dynamic_size", dynamic_size)
    if dynamic_size:
        _image_input(inputs)


@failures_unlogged()
def require_no_decisions(net: fx.GraphModule) -> None:
    """Raise an ExportError if a model decides something by the size of the image.

    A file would hold the decision for one size. Sizes around the example are tried, and some that
    are much larger or smaller. A cut model itself refuses those with another decision.
    """
    graphs = [module.graph for module in net.modules() if isinstance(module, fx.GraphModule)]
    if not any(is_guard(node) for graph in graphs for node in graph.nodes):
        return
    inputs = plan_of(net).inputs
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    probe = fake_copy(net, mode).eval()
    device = next(net.parameters()).device
    *_, height, width = _image_input(inputs).shape
    for other_height, other_width in _sizes_around(height, width):
        resized = _resized(inputs, other_height, other_width)
        try:
            with mode, torch.no_grad():
                probe(*constant_batch(resized, TRACED_BATCH, device))
        except InputError as error:
            raise _size_error(inputs, f"at {other_height} x {other_width}, {error}") from error
        except Exception:
            continue  # the model itself takes no such size, or does not run on fake tensors


def _sizes_around(height: int, width: int) -> Iterator[tuple[int, int]]:
    for more in (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64):
        yield height + more, width + more
        yield height + more, width
        yield height, width + more
    for factor in (2, 4, 8):
        yield factor * height, factor * width
        yield max(height // factor, 1), max(width // factor, 1)


def traced(
    trace: Callable[[tuple[Tensor, ...], tuple[Axes, ...]], Program],
    model: nn.Module,
    inputs: Sequence[Input],
    *,
    dynamic_size: bool,
) -> Program:
    """Return the exporter's program of a model with the batch open and, if asked, the image size.

    Args:
        trace: the exporter: from an example of each input and their open axes to a program.
        model: that the exporter traces.
        inputs: of the model.
        dynamic_size: whether height and width stay open.

    Raises:
        ExportError: the exporter fails. The error says so if it fails only with the size open.
    """
    if not dynamic_size:
        return _traced_at_fixed_size(trace, inputs)
    _require_other_size(model, inputs)
    try:
        # At the larger size, because the exporters fix a length that is 1 when they trace.
        return trace(random_batch(_grown(inputs), TRACED_BATCH), _axes_with_size(inputs))
    except ExportError as error:
        # If the model cannot be exported at all, this raises the exporter's own error.
        _traced_at_fixed_size(trace, inputs)
        raise _size_error(inputs, str(error)) from error


def trial_batches(
    model: nn.Module, inputs: tuple[Input, ...], *, dynamic_size: bool
) -> Iterator[tuple[tuple[Input, ...], tuple[Tensor, ...], str]]:
    """Yield the batches that an exported file is tried on.

    Yields:
        the inputs with their sizes, a value of each, and words for both, as "at batch size 3".
    """

    def run(values: tuple[Tensor, ...]) -> Scores:
        scores: Scores = model(*values)
        return scores

    for batch in VERIFIED_BATCHES:
        yield inputs, telling_batch(run, inputs, batch), f"at batch size {batch}"
    if dynamic_size:
        larger = _grown(inputs)
        examples = telling_batch(run, larger, TRACED_BATCH)
        yield larger, examples, f"at height and width {_size_text(larger)}"


def telling_batch(
    run: Callable[[tuple[Tensor, ...]], Scores], inputs: Sequence[Input], batch: int
) -> tuple[Tensor, ...]:
    """Return a random batch for which a model gives numbers, if one is found.

    Args:
        run: the model, on the values of its inputs.
        inputs: of the model.
        batch: the number of samples.
    """
    # A logarithm has no value for a negative number.
    for in_unit_range in (False, True):
        drawn = random_batch(inputs, batch, in_unit_range=in_unit_range)
        try:
            scores = run(drawn)
        except Exception:
            # Who runs it next says what fails.
            break
        if not any(bool(each.isnan().any()) for each in as_tuple(scores)):
            return drawn
    return random_batch(inputs, batch)


def _traced_at_fixed_size(
    trace: Callable[[tuple[Tensor, ...], tuple[Axes, ...]], Program], inputs: Sequence[Input]
) -> Program:
    axes: tuple[Axes, ...] = tuple({0: "batch"} for _ in inputs)
    return trace(random_batch(inputs, TRACED_BATCH), axes)


def _axes_with_size(inputs: Sequence[Input]) -> tuple[Axes, ...]:
    image = _image_input(inputs)
    width_axis = len(image.shape)  # the last one, since the batch comes before the shape
    all_axes = []
    for each in inputs:
        axes = {0: "batch"}
        if each is image:
            axes[width_axis - 1] = "height"
            axes[width_axis] = "width"
        all_axes.append(axes)
    return tuple(all_axes)


def _image_input(inputs: Sequence[Input]) -> Input:
    """Return the input that is images (C, H, W) or clips (C, T, H, W).

    Raises:
        InputError: there is none, or several.
    """
    images = [each for each in inputs if _is_image(each)]
    if len(images) != 1:
        shapes = ", ".join(f"{each.name} {each.shape}" for each in inputs)
        raise InputError(
            "dynamic_size leaves height and width of one image input open, "
            f"but the model has {len(images)} ({shapes}). Hint: leave dynamic_size out"
        )
    return images[0]


def _is_image(each: Input) -> bool:
    dtype: torch.dtype = getattr(torch, each.dtype)
    return len(each.shape) > 2 and dtype.is_floating_point


def _grown(inputs: Sequence[Input]) -> tuple[Input, ...]:
    """Return the inputs with the image's height and width larger."""
    *_, height, width = _image_input(inputs).shape
    return _resized(inputs, height + GROWTH[0], width + GROWTH[1])


def _resized(inputs: Sequence[Input], height: int, width: int) -> tuple[Input, ...]:
    """Return the inputs with the image of another size."""
    image = _image_input(inputs)
    resized = replace(image, shape=(*image.shape[:-2], height, width))
    return tuple(resized if each is image else each for each in inputs)


def _size_text(inputs: Sequence[Input]) -> str:
    """Return height and width of the image input, as "224 x 224"."""
    height, width = _image_input(inputs).shape[-2:]
    return f"{height} x {width}"


def _require_other_size(model: nn.Module, inputs: Sequence[Input]) -> None:
    """Raise an ExportError if the model itself runs at one size only."""
    larger = _grown(inputs)
    try:
        model(*random_batch(larger, TRACED_BATCH))
    except Exception as error:
        reason = f"torch fails at {_size_text(larger)}: {first_line(error)}"
        raise _size_error(inputs, reason) from error


def _size_error(inputs: Sequence[Input], reason: str) -> ExportError:
    """Return the error that the model does not allow other sizes than the traced one."""
    size = _size_text(inputs)
    return ExportError(
        f"the model does not allow other heights and widths than {size}: {reason}. "
        f"Hint: leave dynamic_size out, and resize images to {size}"
    )
