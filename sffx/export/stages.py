"""The files of an early exit: one ONNX file for each block with its head, and a manifest that says how they hang together.

A file for each block, and not one for all, because ONNX Runtime computes the whole of a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from sffx.blocks import Input
from sffx.errors import ExportError, InputError, MissingExtra
from sffx.export.early_exit import NEVER, EarlyExit
from sffx.export.exit_stage import ExitStage
from sffx.export.explain import first_line
from sffx.export.onnx import (
    described_inputs,
    onnx_program,
    open_session,
    require_packages,
    save_program,
)
from sffx.export.parity import require_parity
from sffx.export.prepare import inference_copy, random_inputs
from sffx.export.sizes import TRACED_BATCH, VERIFIED_BATCHES
from sffx.files import writing_folder
from sffx.net import plan_of

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

MANIFEST = "manifest.json"
VERSION = 1


def export_early_exit(
    net: fx.GraphModule,
    folder: str | os.PathLike[str],
    threshold: float = 0.9,
    *,
    opset: int | None = None,
    tolerance: float = 1e-4,
) -> Path:
    """Write an early exit for ONNX Runtime: a folder with a file for each block and a manifest. `EarlyExit.load(folder)` runs it.

    The folder appears only once the answers after every block agree with torch at two batch sizes; whatever fails, an older export
    there stays as it was.

    Args:
        net: what `sffx.transform` returned, in any mode, on any device.
        folder: to write; an older export in it is replaced.
        threshold: the confidence that the runner starts with, such as `EarlyExit.calibrate` chose.
        opset: version of the ONNX operator set; torch's default if None.
        tolerance: the largest relative error allowed between ONNX Runtime and torch, max|a - b| / max|b|.

    Returns:
        `folder`. The files are block_0.onnx and so on; their first output is the goodness, (B, J), the others are what later blocks read.

    Raises:
        InputError: `net` is no cut model, or `folder` is something else than a new or an exported folder.
        MissingExtra: onnx, onnxscript or onnxruntime is not installed.
        ExportError: a block cannot be exported, is larger than 2 GiB, or the answers differ beyond `tolerance`.
    """
    plan_of(net)
    _require_replaceable(Path(folder))
    with writing_folder(folder) as new, torch.no_grad():
        require_packages()
        runner = EarlyExit(inference_copy(net), threshold)
        _write(runner, new, opset)
        _verify(EarlyExit.load(new, NEVER), runner, tolerance)
    return Path(folder)


def load_stages(
    folder: Path,
) -> tuple[tuple[ExitStage, ...], tuple[Input, ...], frozenset[str], float]:
    """Return the stages on ONNX Runtime, the model's inputs, the names of the values with a batch axis, and the threshold."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        inputs = tuple(
            Input(**{**each, "shape": tuple(each["shape"])}) for each in manifest["inputs"]
        )
        described = [
            (each, tuple(each["inputs"]), tuple(each["outputs"])) for each in manifest["stages"]
        ]
        batched, threshold = frozenset(manifest["batched"]), float(manifest["threshold"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        hint = "Hint: pass the folder that sffx.export_early_exit wrote"
        raise InputError(
            f"there is no early exit in {str(folder)!r}: {type(error).__name__}: {error}. {hint}"
        ) from error
    stages = tuple(
        ExitStage(
            each["name"],
            reads,
            outputs,
            int(each["macs"]),
            _runner(_open(folder / each["file"]), reads, each["goodness"], outputs),
        )
        for each, reads, outputs in described
    )
    return stages, inputs, batched, threshold


def _require_replaceable(folder: Path) -> None:
    """Raise an InputError if the folder holds something else than an early exit."""
    if not folder.is_dir():
        return
    foreign = sorted({each.name for each in folder.iterdir()} - _exported(folder))
    if foreign:
        raise InputError(
            f"the folder {str(folder)!r} holds something else than an early exit: "
            f"{', '.join(foreign[:3])}. Hint: name a new folder"
        )


def _exported(folder: Path) -> set[str]:
    """Return the names of the files of an export in a folder; none where there is none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return {MANIFEST, *(str(each["file"]) for each in manifest["stages"])}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _write(runner: EarlyExit, folder: Path, opset: int | None) -> None:
    examples = random_inputs(runner.inputs, TRACED_BATCH)
    values: dict[str, Any] = {
        each.name: value for each, value in zip(runner.inputs, examples, strict=True)
    }
    stages = []
    for i, stage in enumerate(runner.stages):
        goodness, file = f"goodness_{i}", f"{stage.name}.onnx"
        arguments = tuple(values[name] for name in stage.inputs)
        _, *outputs = stage.run(*arguments)
        values.update(zip(stage.outputs, outputs, strict=True))
        _require_tensors(stage, values)
        axes = tuple({0: "batch"} if name in runner.batched else None for name in stage.inputs)
        module: Any = stage.run
        save_program(
            onnx_program(module, arguments, stage.inputs, (goodness, *stage.outputs), axes, opset),
            folder / file,
        )
        described = {
            "name": stage.name,
            "file": file,
            "inputs": stage.inputs,
            "goodness": goodness,
            "outputs": stage.outputs,
        }
        stages.append({**described, "macs": stage.macs})
    inputs = [asdict(each) for each in runner.inputs]
    manifest = {
        "version": VERSION,
        "threshold": runner.threshold,
        "inputs": inputs,
        "batched": sorted(runner.batched),
        "stages": stages,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _require_tensors(stage: ExitStage, values: dict[str, Any]) -> None:
    for name in stage.outputs:
        if not isinstance(values[name], Tensor):
            kind = type(values[name]).__name__
            raise ExportError(
                f"the value {name!r}, a {kind}, crosses the cut after {stage.name}, and ONNX hands on tensors. Hint: cut elsewhere"
            )


def _verify(written: EarlyExit, runner: EarlyExit, tolerance: float) -> None:
    for batch in VERIFIED_BATCHES:
        x = random_inputs(runner.inputs, batch)
        expected, found = runner.cumulative(x), written.cumulative(x)
        for stage, wanted, got in zip(runner.stages, expected, found, strict=True):
            require_parity(got, wanted, tolerance, f"after {stage.name} at batch size {batch}")


def _open(path: Path) -> InferenceSession:
    try:
        import onnxruntime  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra("onnxruntime", "export", "EarlyExit.load") from error
    if not path.is_file():
        raise InputError(f"the file {str(path)!r} is missing. Hint: export the model again")
    return open_session(path)


def _runner(
    session: InferenceSession, inputs: Sequence[str], goodness: str, outputs: Sequence[str]
) -> Callable[..., list[Tensor]]:
    """Return the stage as a function of tensors. An input that the file does not read is not given to it."""
    read = {each.name for each in session.get_inputs()}

    def run(*values: Tensor) -> list[Tensor]:
        feed = {
            name: value.detach().cpu().numpy()
            for name, value in zip(inputs, values, strict=True)
            if name in read
        }
        try:
            results = session.run([goodness, *outputs], feed)
        except Exception as error:
            raise InputError(
                f"the file cannot run on this input: {first_line(error)}. Hint: it takes {described_inputs(session)}"
            ) from error
        return [torch.from_numpy(result) for result in results]

    return run
