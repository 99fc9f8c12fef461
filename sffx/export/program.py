"""The export of a cut model as torch's own program: a `.pt2` file that runs without the code of the model, or of sffx."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from sffx.blocks import Input
from sffx.errors import ExportError
from sffx.export.explain import explanation, first_line
from sffx.export.metadata import FILE, metadata
from sffx.export.parity import require_parity
from sffx.export.prepare import (
    chosen_readout,
    inference_copy,
    random_inputs,
    require_image,
    traced,
    trial_inputs,
)
from sffx.files import writing
from sffx.net import plan_of

BATCH_HINT = "Hint: does the model fix the size of the batch?"
SIZE_HINT = (
    "Hint: leave dynamic_size out, or cut the model with a larger example_input; "
    "where features shrink to a single position, torch.export sets that size apart from all others"
)


def export_program(
    net: torch.fx.GraphModule,
    path: str | os.PathLike[str],
    readout: str | None = None,
    *,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dynamic_size: bool = False,
    tolerance: float = 1e-4,
) -> Path:
    """Write the inference graph of a cut model as a program of `torch.export`, which `torch.export.load(path).module()` runs.

    The file appears only once it was loaded back and agrees with the model at two batch sizes; whatever fails, an older file of that name
    stays as it was. The model is exported in float32 and eval mode from a copy on the CPU; `net` is not touched.

    Args:
        net: what `sffx.transform` returned, in any mode, on any device.
        path: of the file to write, as in "net.pt2"; its directory must exist.
        readout: "ensemble", "last", "classifier", "weighted" or "cumulative", as for `sffx.export_onnx`.
        class_names: one for each of the J classes, in order; kept in the file as `sffx.export.metadata` says.
        mean: by which images were normalised, a number for each channel; kept in the file.
        std: likewise.
        dynamic_size: whether height and width of the image stay open as well, where the model allows it; it is checked at a second size.
        tolerance: the largest relative error allowed between the loaded program and the model, max|a - b| / max|b|.

    Returns:
        `path`. The program takes the model's inputs in order and returns scores, (B, J); with "cumulative" a tuple of K of them.

    Raises:
        InputError: `net` is not a cut model or is sharded, `readout` is unknown, names or numbers do not fit the model, or `path`
            cannot be written to.
        ExportError: the model cannot be exported, does not allow another size, or the program's scores differ beyond `tolerance`.
    """
    plan = plan_of(net)
    readout = chosen_readout(net, readout)
    told = metadata(plan, readout, class_names, mean, std)
    require_image(plan.inputs, dynamic_size=dynamic_size)
    with writing(path) as draft, torch.no_grad():
        model = inference_copy(net, readout)
        program = traced(
            lambda examples, axes: _program(model, examples, axes), model, plan.inputs, dynamic_size
        )
        _save(program, told, draft)
        _verify(draft, model, plan.inputs, tolerance, dynamic_size=dynamic_size)
    return Path(path)


def _program(
    model: nn.Module, examples: tuple[torch.Tensor, ...], axes: tuple[dict[int, str], ...]
) -> ExportedProgram:
    shapes = tuple(dict.fromkeys(each, Dim.DYNAMIC) for each in axes)
    try:
        return torch.export.export(model, examples, dynamic_shapes=shapes)
    except Exception as error:
        raise ExportError(explanation(error, model)) from error


def _save(program: ExportedProgram, told: str, draft: Path) -> None:
    # By way of memory, since torch's own writer turns a full disk into an error that does not say so.
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={FILE: told})
    draft.write_bytes(content.getbuffer())


def _verify(
    draft: Path,
    model: nn.Module,
    inputs: tuple[Input, ...],
    tolerance: float,
    *,
    dynamic_size: bool,
) -> None:
    """Refuse a file that cannot be loaded, does not run, or disagrees with the model."""
    try:
        loaded: Any = torch.export.load(draft).module()
    except Exception as error:
        raise ExportError(
            f"the exported program cannot be loaded: {first_line(error)}. Hint: try sffx.export_onnx"
        ) from error
    for case, batch, place in trial_inputs(inputs, dynamic_size=dynamic_size):
        examples = random_inputs(case, batch)
        try:
            expected, scores = model(*examples), loaded(*examples)
        except Exception as error:
            raise ExportError(
                f"the program fails {place}: {first_line(error)}. {SIZE_HINT if dynamic_size else BATCH_HINT}"
            ) from error
        require_parity(
            scores, expected, tolerance, place, "the exported program", dynamic_size=dynamic_size
        )
