"""The export of a cut model as torch's own program, a `.pt2` file.

It runs without the code of the model, and without sffx.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from sffx.blocks import Input
from sffx.errors import ExportError, first_line
from sffx.export.any_batch import require_any_batch
from sffx.export.data_writes import require_no_data_writes
from sffx.export.explain import explanation
from sffx.export.metadata import FILE, metadata
from sffx.export.parity import require_parity, require_tolerance
from sffx.export.prepare import chosen_readout, in_float32, inference_copy, reduce_to_readout
from sffx.export.sizes import Axes, require_image, require_no_decisions, traced, trial_batches
from sffx.files import as_path, writing
from sffx.inputs import mask_among
from sffx.learning.readouts import ReadoutName
from sffx.net import cut_model
from sffx.progress import running

BATCH_HINT = "Hint: does the model fix the size of the batch?"
SIZE_HINT = (
    "Hint: leave dynamic_size out, or cut the model with a larger example_input; where features "
    "shrink to a single position, torch.export sets that size apart from all others"
)


@running("exporting by torch.export")
def export_program(
    net: nn.Module,
    path: str | os.PathLike[str],
    readout: ReadoutName | None = None,
    *,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dynamic_size: bool = False,
    tolerance: float = 1e-4,
) -> Path:
    """Write the inference graph of a cut model as a program of `torch.export`.

    `torch.export.load(path).module()` runs it. The model is exported in float32 and eval mode from
    a copy on the CPU. `net` is not touched.

    The file appears only after it was loaded back and agrees with the model at two batch sizes. If
    anything fails, an older file of that name stays as it was.

    Args:
        net: what `sffx.transform` returned, in any mode, on any device.
        path: of the file to write, as in "net.pt2"; its directory must exist.
        readout: "ensemble", "last", "classifier", "weighted" or "cumulative", as for
            `sffx.export_onnx`; None takes that of the net.
        class_names: one for each of the J classes, in order, for the file's metadata, as described
            in `sffx.export.metadata`.
        mean: with which images were normalised, a number for each channel, for the file's metadata.
        std: likewise.
        dynamic_size: whether height and width of the image stay open as well, where the model
            allows it. The file is then checked at a second size.
        tolerance: the largest relative error allowed between the loaded program and the model,
            max|a - b| / max|b|.

    Returns:
        `path`. The program takes the model's inputs in order and returns scores, (B, J); with
        "cumulative", a tuple of K of them.

    Raises:
        InputError: `net` is not a cut model or is sharded, `readout` is unknown, names or numbers
            do not fit the model, or `path` cannot be written to.
        ExportError: the model cannot be exported, does not allow another size, or the program's
            scores differ beyond `tolerance`.
    """
    cut = cut_model(net)
    plan = cut.plan
    path = as_path(path)
    chosen = chosen_readout(cut, readout)
    properties = metadata(plan, chosen, class_names, mean, std)
    require_tolerance(tolerance)
    require_image(plan.inputs, dynamic_size=dynamic_size)
    if dynamic_size:
        require_no_decisions(cut)
    with writing(path) as draft, in_float32():
        model = inference_copy(cut)
        require_any_batch(cut, chosen)
        reduce_to_readout(model, chosen)
        program = _export(model, plan.inputs, dynamic_size=dynamic_size)
        _save(program, properties, draft)
        _verify(draft, model, plan.inputs, tolerance, dynamic_size=dynamic_size)
    return path


def _export(model: nn.Module, inputs: tuple[Input, ...], *, dynamic_size: bool) -> ExportedProgram:
    def trace(examples: tuple[Tensor, ...], axes: tuple[Axes, ...]) -> ExportedProgram:
        shapes = tuple(dict.fromkeys(each, Dim.DYNAMIC) for each in axes)
        require_no_data_writes(model, examples)
        try:
            return torch.export.export(model, examples, dynamic_shapes=shapes)
        except Exception as error:
            raise ExportError(explanation(error, model)) from error

    return traced(trace, model, inputs, dynamic_size=dynamic_size)


def _save(program: ExportedProgram, properties: str, draft: Path) -> None:
    # By way of memory, because torch's own writer turns a full disk into an error that does not
    # say so.
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={FILE: properties})
    draft.write_bytes(content.getbuffer())


def _verify(
    draft: Path,
    model: nn.Module,
    inputs: tuple[Input, ...],
    tolerance: float,
    *,
    dynamic_size: bool,
) -> None:
    """Raise an ExportError if a file does not load, does not run, or disagrees with the model."""
    try:
        loaded: Any = torch.export.load(draft).module()
    except Exception as error:
        raise ExportError(
            f"the exported program cannot be loaded: {first_line(error)}. "
            "Hint: try sffx.export_onnx"
        ) from error
    hint = SIZE_HINT if dynamic_size else BATCH_HINT
    engine = "the exported program"
    for case, examples, place in trial_batches(model, inputs, dynamic_size=dynamic_size):
        try:
            expected = model(*examples)
            scores = loaded(*examples)
        except Exception as error:
            raise ExportError(f"the program fails {place}: {first_line(error)}. {hint}") from error
        require_parity(
            scores,
            expected,
            tolerance,
            place,
            engine,
            dynamic_size=dynamic_size,
            mask=mask_among(case, examples),
        )
