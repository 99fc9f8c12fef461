"""What an exporter is given: a copy of the model for inference, example inputs, and the axes whose length stays open."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from sffx.blocks import Input
from sffx.errors import ExportError, InputError
from sffx.export.explain import first_line
from sffx.learning.readouts import READOUTS, WEIGHTED, Cumulative, readout_of, require_readout
from sffx.runtime.shard import require_whole

T = TypeVar("T")

EXPORT_READOUTS = (*READOUTS, WEIGHTED, "cumulative")
TRACED_BATCH = 2
VERIFIED_BATCHES = (1, 3)
# What is added to height and width for a second size: multiples of what models divide them by, and not the same.
GROWTH = (32, 64)


def chosen_readout(net: fx.GraphModule, readout: str | None) -> str:
    """Return the readout to export: the one asked for, or that of the net.

    Raises:
        InputError: there is no such readout, or no block has a weight yet.
    """
    own = readout_of(net)
    if readout is None:
        return own.mode
    require_readout(readout, EXPORT_READOUTS)
    if readout == WEIGHTED:
        own.require_weights()
    return readout


def inference_copy(net: fx.GraphModule, readout: str) -> fx.GraphModule:
    """Return a copy of the net for inference on the CPU in float32, with no parameter that requires grad, and with what a readout needs."""
    require_whole(net)
    try:
        model = copy.deepcopy(net)
    except Exception as error:
        hint = "Hint: a module that keeps tensors with a grad history as attributes cannot be copied; detach them"
        raise ExportError(f"the model cannot be copied: {first_line(error)}. {hint}") from error
    model = model.cpu().float().eval().requires_grad_(False)
    _keep(model, readout)
    return model


def _keep(model: fx.GraphModule, readout: str) -> None:
    """Leave out the heads, or the classifier, that the readout does not look at."""
    output = next(node for node in model.graph.nodes if node.op == "output")
    combined: Any = output.args[0]
    *goodness, classifier = combined.args[0]
    if readout == "ensemble":  # of which the classifier's logits, the last entry, are no part
        readout_of(model).mode = readout
        combined.args = ([*goodness, goodness[-1]],)
    elif readout == WEIGHTED:  # likewise, and blocks without a weight are none
        own = readout_of(model)
        own.mode = readout
        heard = [
            (node, weight)
            for node, weight in zip(goodness, own.require_weights(), strict=True)
            if weight
        ]
        own.weights = tuple(weight for _, weight in heard)
        combined.args = ([*(node for node, _ in heard), heard[-1][0]],)
    elif readout == "cumulative":
        model.add_submodule("cumulative", Cumulative())
        with model.graph.inserting_before(output):
            output.args = (model.graph.call_module("cumulative", (goodness,)),)
    else:
        output.args = (classifier if readout == "classifier" else goodness[-1],)
    model.graph.eliminate_dead_code()
    model.delete_all_unused_submodules()
    model.recompile()


def random_inputs(inputs: Sequence[Input], batch: int) -> tuple[Tensor, ...]:
    """Draw one random batch of every input from a generator of its own, so that the caller's random state does not move."""
    generator = torch.Generator().manual_seed(batch)
    return tuple(_example(each, batch, generator) for each in inputs)


def _example(each: Input, batch: int, generator: torch.Generator) -> Tensor:
    shape = (batch, *each.shape)
    dtype = getattr(torch, each.dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
    if each.marks_tokens:  # at least one real token in each sample, and the padding behind
        return (
            torch.arange(shape[1])
            < torch.randint(1, shape[1] + 1, (batch, 1), generator=generator, device="cpu")
        ).to(dtype)
    high = 2 if dtype == torch.bool else max(each.high, 1)
    return torch.randint(0, high, shape, generator=generator, device="cpu").to(dtype)


def _open_axes(inputs: Sequence[Input], *, dynamic_size: bool) -> tuple[dict[int, str], ...]:
    """Return, for each input, the names of the axes whose length stays open: the batch, and height and width of the image."""
    batch = {0: "batch"}
    if not dynamic_size:
        return tuple(batch for _ in inputs)
    image = _image_input(inputs)
    return tuple(
        {**batch, _from_start(image, -2): "height", _from_start(image, -1): "width"}
        if each is image
        else batch
        for each in inputs
    )


def _from_start(image: Input, axis: int) -> int:
    """Return an axis of the batched input, counted from the end, counted from the start."""
    return len(image.shape) + 1 + axis


def require_image(inputs: Sequence[Input], *, dynamic_size: bool) -> None:
    """Raise an InputError if an image size is to stay open and there is no image."""
    if dynamic_size:
        _image_input(inputs)


def _image_input(inputs: Sequence[Input]) -> Input:
    """Return the input that is images (C, H, W) or clips (C, T, H, W).

    Raises:
        InputError: there is none, or several.
    """
    images = [
        each
        for each in inputs
        if len(each.shape) > 2 and getattr(torch, each.dtype).is_floating_point
    ]
    if len(images) != 1:
        shapes = ", ".join(f"{each.name} {each.shape}" for each in inputs)
        raise InputError(
            f"dynamic_size leaves height and width of one image input open, but the model has {len(images)} ({shapes}). "
            "Hint: leave dynamic_size out"
        )
    return images[0]


def _grown(inputs: Sequence[Input]) -> tuple[Input, ...]:
    """Return the inputs with the image's height and width larger."""
    image = _image_input(inputs)
    *front, height, width = image.shape
    larger = replace(image, shape=(*front, height + GROWTH[0], width + GROWTH[1]))
    return tuple(larger if each is image else each for each in inputs)


def trial_inputs(
    inputs: tuple[Input, ...], *, dynamic_size: bool
) -> Iterator[tuple[tuple[Input, ...], int, str]]:
    """Yield what an exported file is tried on: the inputs, the batch size, and how to speak of them."""
    for batch in VERIFIED_BATCHES:
        yield inputs, batch, f"at batch size {batch}"
    if dynamic_size:
        larger = _grown(inputs)
        yield larger, TRACED_BATCH, f"at height and width {_size_of(larger)}"


def _size_of(inputs: Sequence[Input]) -> str:
    """Return height and width of the image input, as "224 x 224"."""
    return " x ".join(map(str, _image_input(inputs).shape[-2:]))


def traced(
    trace: Callable[[tuple[Tensor, ...], tuple[dict[int, str], ...]], T],
    model: nn.Module,
    inputs: Sequence[Input],
    dynamic_size: bool,
) -> T:
    """Return what an exporter makes of the model, with the batch open and, where it is wanted, height and width.

    Args:
        trace: the exporter, given an example of each input and the names of their open axes.
        model: that it traces.
        inputs: of the model.
        dynamic_size: whether height and width stay open.

    Raises:
        ExportError: the exporter fails, or does so once the size is open, which the error then says.
    """
    if not dynamic_size:
        return trace(random_inputs(inputs, TRACED_BATCH), _open_axes(inputs, dynamic_size=False))
    _require_other_size(model, inputs)
    try:
        # At the larger size, since lengths of 1 are fixed when they are traced.
        return trace(
            random_inputs(_grown(inputs), TRACED_BATCH), _open_axes(inputs, dynamic_size=True)
        )
    except ExportError as error:
        traced(
            trace, model, inputs, dynamic_size=False
        )  # raises where the size is not what stops it
        raise _size_error(inputs, str(error)) from error


def _require_other_size(model: nn.Module, inputs: Sequence[Input]) -> None:
    """Raise an ExportError if the model itself runs at one size only."""
    larger = _grown(inputs)
    try:
        model(*random_inputs(larger, TRACED_BATCH))
    except Exception as error:
        raise _size_error(
            inputs, f"torch fails at {_size_of(larger)}: {first_line(error)}"
        ) from error


def _size_error(inputs: Sequence[Input], reason: str) -> ExportError:
    """Return the error that says that the model does not allow other sizes than the traced one."""
    size = _size_of(inputs)
    hint = f"Hint: leave dynamic_size out, and resize images to {size}"
    return ExportError(
        f"the model does not allow other heights and widths than {size}: {reason}. {hint}"
    )
