"""The export of an early exit: each block with its head becomes an ONNX file of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sffx.blocks import BatchAxis
from sffx.errors import ExportError
from sffx.export.any_batch import require_any_batch
from sffx.export.early_exit import EarlyExit
from sffx.export.exit_files import digest, require_replaceable
from sffx.export.exit_stage import BatchAxes, ExitStage
from sffx.export.manifest import Manifest, StageFile, write_manifest
from sffx.export.metadata import names_and_normalisation
from sffx.export.onnx import (
    no_complex,
    onnx_program,
    require_opset,
    require_packages,
    require_valid,
    save_program,
)
from sffx.export.parity import require_parity, require_tolerance
from sffx.export.plain_values import on_tensors
from sffx.export.prepare import CUMULATIVE, in_float32, inference_copy
from sffx.export.sizes import TRACED_BATCH, VERIFIED_BATCHES, Axes, telling_batch
from sffx.files import as_path, writing_folder
from sffx.inputs import random_batch
from sffx.net import cut_model
from sffx.parts import goodness_name
from sffx.progress import reported, running


@running("exporting an early exit")
def export_early_exit(
    net: nn.Module,
    folder: str | os.PathLike[str],
    threshold: float = 0.9,
    *,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    opset: int | None = None,
    tolerance: float = 1e-4,
) -> Path:
    """Write an early exit for ONNX Runtime: a folder with a file for each block and a manifest.

    `EarlyExit.load(folder)` runs it. The folder appears only after the answers after every block
    agree with torch at two batch sizes. If anything fails, an older export there stays as it was.

    Args:
        net: what `sffx.transform` returned, in any mode, on any device.
        folder: to write; an older export in it is replaced.
        threshold: the confidence that the runner starts with, such as `EarlyExit.calibrate` chose.
        class_names: one for each class, in order, for the manifest. What `EarlyExit.load` returns
            has `class_names`, `mean` and `std` as attributes.
        mean: with which images were normalised, a number for each channel.
        std: likewise.
        opset: version of the ONNX operator set; torch's default if None.
        tolerance: the largest relative error allowed between ONNX Runtime and torch,
            max|a - b| / max|b|.

    Returns:
        `folder`. The files are block_0.onnx and so on. Their first output is the goodness, (B, J);
        the others are the values that later blocks read. `sffx.export.manifest` describes the
        manifest.

    Raises:
        InputError: `net` is no cut model, `folder` holds something else than an early exit, or
            names or normalisation do not fit the model, or `opset` is no version.
        MissingExtra: onnx, onnxscript or onnxruntime is not installed.
        ExportError: a block cannot be exported, is larger than 2 GiB, or the answers differ beyond
            `tolerance`.
    """
    cut = cut_model(net)
    folder = as_path(folder)
    require_replaceable(folder)
    require_tolerance(tolerance)
    require_opset(opset)
    described = names_and_normalisation(cut.plan, class_names, mean, std)
    with writing_folder(folder) as new, in_float32():
        require_packages()
        model = inference_copy(cut)
        require_any_batch(cut, CUMULATIVE)
        runner = EarlyExit(model, threshold)
        for name, values in described.items():
            setattr(runner, name, None if values is None else tuple(values))
        _write(runner, new, opset)
        _verify(EarlyExit.load(new), runner, tolerance)
    return folder


def _write(runner: EarlyExit, folder: Path, opset: int | None) -> None:
    """Write the files of the stages, and the manifest.

    Each stage is traced with the values that the stages before it gave for one example batch.
    """
    examples = random_batch(runner.inputs, TRACED_BATCH)
    values: dict[str, Any] = {}
    for each, example in zip(runner.inputs, examples, strict=True):
        values[each.name] = example
    stages = []
    batched: dict[str, BatchAxis] = {}
    for i, on_torch in enumerate(reported(runner.stages, "blocks exported", len(runner.stages))):
        file = f"{on_torch.name}.onnx"
        goodness = goodness_name(i)
        # First, since the values that it gives say which of them are tensors.
        on_torch.score(values)
        stage = on_tensors(on_torch, values, runner.batched, TRACED_BATCH)
        _require_real(stage, values)
        batched.update(_axes_of_tensors(stage, runner.batched))
        arguments = tuple(values[name] for name in stage.inputs)
        _write_stage(stage, goodness, arguments, batched, folder / file, opset)
        described = StageFile(
            name=stage.name,
            file=file,
            sha256=digest((folder / file).read_bytes()),
            inputs=stage.inputs,
            goodness=goodness,
            outputs=stage.outputs,
            macs=stage.macs,
        )
        stages.append(described)
    manifest = Manifest(
        runner.threshold,
        runner.inputs,
        batched,
        tuple(stages),
        runner.nested,
        runner.skips,
        runner.class_names,
        runner.mean,
        runner.std,
    )
    write_manifest(folder, manifest)


def _axes_of_tensors(
    stage: ExitStage, batched: Mapping[str, BatchAxes]
) -> Iterator[tuple[str, BatchAxis]]:
    """Yield the batch axes of what a stage takes and gives, which are tensors."""
    for name in (*stage.inputs, *stage.outputs):
        axis = batched.get(name)
        if isinstance(axis, BatchAxis):
            yield name, axis


def _write_stage(
    stage: ExitStage,
    goodness: str,
    arguments: tuple[Tensor, ...],
    batched: Mapping[str, BatchAxis],
    file: Path,
    opset: int | None,
) -> None:
    axes = tuple(_open_axis(batched[name]) if name in batched else None for name in stage.inputs)
    outputs = (goodness, *stage.outputs)
    module: Any = stage.run  # on torch it is a module
    program = onnx_program(module, arguments, stage.inputs, outputs, axes, opset)
    save_program(program, file)
    require_valid(file)


def _open_axis(batch: BatchAxis) -> Axes:
    """Return the axis of a value that stays open, with its name in a file."""
    return {batch.axis: "batch" if batch.rows == 1 else f"batch_times_{batch.rows}"}


def _require_real(stage: ExitStage, values: dict[str, Any]) -> None:
    """Raise an ExportError if a stage gives later stages a complex value."""
    for name in stage.outputs:
        if values[name].is_complex():
            raise ExportError(
                f"{no_complex(name, values[name])}, but it crosses the cut after {stage.name}. "
                "Hint: cut elsewhere, policy=[...] takes the names of nodes"
            )


def _verify(written: EarlyExit, runner: EarlyExit, tolerance: float) -> None:
    """Raise an ExportError if the files' answer after a block differs from torch's."""
    for batch in VERIFIED_BATCHES:
        x = telling_batch(runner.cumulative, runner.inputs, batch)
        expected = runner.cumulative(x)
        actual = written.cumulative(x)
        for i, stage in enumerate(runner.stages[runner.skips :]):
            place = f"after {stage.name} at batch size {batch}"
            require_parity(actual[i], expected[i], tolerance, place)
