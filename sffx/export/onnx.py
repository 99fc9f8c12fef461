"""The ONNX export of a cut model: one readout, one file, which is compared with torch.

The dynamo exporter is used, not the TorchScript one. Torch has deprecated the latter. It bakes
Python control flow into the graph with no more than a warning, and it writes 1.3 to 8.6 times the
nodes (swin_t: 6201 against 720). Dynamo is slower: resnet18, mobilenet_v3_small, vit_b_16 and
swin_t take 4, 9, 14 and 30 s on two cores, against 0.4, 0.3, 5 and 3 s. The relative error was
below 2e-6 with both.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sffx.blocks import BlockPlan, Input
from sffx.checks import positive_integer
from sffx.errors import ExportError, InputError, MissingExtra, first_line
from sffx.export.any_batch import require_any_batch
from sffx.export.attention_axes import FourAxes
from sffx.export.data_writes import require_no_data_writes
from sffx.export.explain import explanation
from sffx.export.metadata import KEY, metadata
from sffx.export.parity import Scores, require_parity, require_tolerance
from sffx.export.prepare import (
    CUMULATIVE,
    chosen_readout,
    in_float32,
    inference_copy,
    reduce_to_readout,
)
from sffx.export.sizes import Axes, require_image, require_no_decisions, traced, trial_batches
from sffx.export.small_numbers import keep_small_numbers
from sffx.files import as_path, writing
from sffx.inputs import mask_among
from sffx.learning.readouts import ReadoutName
from sffx.net import cut_model
from sffx.progress import running
from sffx.tables import GIB, MIB

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from torch.onnx import ONNXProgram

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# A protobuf file ends at 2 GiB; the 16 MiB are room for the graph around the weights.
MAX_WEIGHT_BYTES = 2 * GIB - 16 * MIB


@running("exporting to ONNX")
def export_onnx(
    net: nn.Module,
    path: str | os.PathLike[str],
    readout: ReadoutName | None = None,
    *,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    output_name: str = "scores",
    dynamic_size: bool = False,
    opset: int | None = None,
    tolerance: float = 1e-4,
) -> Path:
    """Write the inference graph of a cut model as an ONNX file.

    The model is exported in float32 and eval mode, with BN folded into the layers before it, from a
    copy on the CPU. `net` is not touched.

    The file appears only after it has passed onnx's checker and shape inference and agrees with
    torch at two batch sizes. If anything fails, an older file of that name stays as it was. The
    file's metadata is described in `sffx.export.metadata`.

    Args:
        net: what `sffx.transform` returned, in any mode, on any device.
        path: of the file to write; its directory must exist.
        readout: None takes that of the net, `net.readout.mode`. The file holds only what the
            readout needs.
            "ensemble": the mean of the blocks' goodness.
            "last": the last block's goodness.
            "classifier": the classifier's logits.
            "weighted": the mixture that `sffx.weigh` found, as logarithms of probabilities.
            "cumulative": an output for each block, the ensemble of the blocks up to it.
        class_names: one for each of the J classes, in order, for the file's metadata.
        mean: with which images were normalised, a number for each channel, for the file's metadata.
            The graph does not normalise.
        std: likewise.
        output_name: of the scores. With "cumulative", "scores_0" is the output after block_0, and
            so on.
        dynamic_size: whether height and width of the image stay open as well, where the model
            allows it. The file is then checked at a second size.
        opset: version of the ONNX operator set; torch's default if None.
        tolerance: the largest relative error allowed between ONNX Runtime and torch,
            max|a - b| / max|b|.

    Returns:
        `path`. The graph's inputs are named as in `net.plan.inputs`. Its outputs are (B, J). The
        open axes are "batch", and with `dynamic_size` "height" and "width".

        ONNX Runtime computes the whole of a "cumulative" file, whichever output is asked for. To
        take out the network up to block_1, use
        `onnx.utils.extract_model(path, "short.onnx", ["x"], ["scores_1"])`.
        `sffx.export_early_exit` writes a file for each block.

    Raises:
        InputError: `net` is not a cut model or is sharded, `readout` is unknown, names or numbers
            do not fit the model, `opset` is no version, or `path` cannot be written to.
        MissingExtra: onnx, onnxscript or onnxruntime is not installed.
        ExportError: the model cannot be exported, does not allow another size, is larger than
            2 GiB, or its scores differ beyond `tolerance`.
    """
    cut = cut_model(net)
    plan = cut.plan
    chosen = chosen_readout(cut, readout)
    path = as_path(path)
    require_tolerance(tolerance)
    require_opset(opset)
    properties = metadata(plan, chosen, class_names, mean, std)
    outputs = _output_names(output_name, plan, chosen)
    require_image(plan.inputs, dynamic_size=dynamic_size)
    if dynamic_size:
        require_no_decisions(cut)
    with writing(path) as draft, in_float32():
        require_packages()
        model = inference_copy(cut)
        require_any_batch(cut, chosen)
        reduce_to_readout(model, chosen)
        program = _export(model, plan.inputs, outputs, opset, dynamic_size=dynamic_size)
        program.model.metadata_props[KEY] = properties
        save_program(program, draft)
        _verify(draft, model, plan.inputs, tolerance, dynamic_size=dynamic_size)
    return path


def require_packages() -> None:
    """Raise a MissingExtra if a package that writes or checks ONNX files is not installed."""
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise MissingExtra(error.name or package, "export", "exporting to ONNX") from error


def require_opset(opset: object) -> None:
    """Raise an InputError if something is no version of the operator set, and not None."""
    if opset is not None:
        positive_integer("opset", opset, "pass the version of an operator set, such as 18, or None")


def onnx_program(
    model: nn.Module,
    arguments: tuple[Tensor, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
    axes: tuple[Axes | None, ...],
    opset: int | None,
) -> ONNXProgram:
    """Return the ONNX program of a module.

    Args:
        model: in eval mode.
        arguments: an example of each input.
        input_names: in the order of the arguments.
        output_names: in the order of what the module returns.
        axes: the open axes of each input; None if all are fixed.
        opset: version of the operator set; torch's default if None.

    Raises:
        ExportError: torch cannot export it. The error names the node and the module. Or an input is
            complex.
    """
    _require_real(input_names, arguments)
    require_no_data_writes(model, arguments)
    export = partial(
        torch.onnx.export,
        model,
        arguments,
        dynamo=True,
        verbose=False,
        input_names=list(input_names),
        output_names=list(output_names),
        dynamic_shapes=axes,
        opset_version=opset,
    )
    try:
        with _without_warning_of_names(), FourAxes():
            program = _optimized_or_not(export)
    except Exception as error:
        raise ExportError(explanation(error, model)) from error
    _separate_names(program)
    _require_written_in(opset, program)
    return program


def _require_real(names: Sequence[str], arguments: Sequence[Tensor]) -> None:
    """Raise an ExportError if an input is complex."""
    for name, argument in zip(names, arguments, strict=True):
        if argument.is_complex():
            raise ExportError(
                f"{no_complex(name, argument)}. Hint: a forward may take real and imaginary parts "
                f"in a last axis, and begin with torch.view_as_complex({name}); "
                "sffx.export_program keeps complex numbers"
            )


@contextmanager
def _without_warning_of_names() -> Iterator[None]:
    """Silence a warning of torch that is not true.

    All inputs share the batch axis. Torch warns of each input after the first that the name of the
    axis will not be used, and then uses it.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"# The axis name: batch will not be used", category=UserWarning
        )
        yield


def _require_written_in(opset: int | None, program: ONNXProgram) -> None:
    """Raise an ExportError if a program has another opset than the one asked for."""
    written = program.model.opset_imports[""]
    if opset not in (None, written):
        # Torch only logs that it could not convert, and keeps the version it had.
        raise ExportError(
            f"the model has no form in opset {opset}; torch offers opset {written}. "
            f"Hint: leave opset out, or pass {written}"
        )


def no_complex(name: str, value: Tensor) -> str:
    """Return what is wrong with a complex value that a file would take or give."""
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{name!r} is {dtype}, and an ONNX file takes and gives real numbers"


def _optimized_or_not(export: Callable[..., ONNXProgram | None]) -> ONNXProgram:
    """Return what an exporter returns, optimized; as it is where the optimizer fails.

    The optimizer fails at a split of an axis that stays open, as `x.chunk(2)` of the batch.
    """
    from onnxscript import ir

    program = _exported(export)
    keep_small_numbers(program.model)
    try:
        program.optimize()
    except ir.passes.PassError:
        # The optimizer works in place, so it leaves a program that is half done.
        return _exported(export)
    return program


def _exported(export: Callable[..., ONNXProgram | None]) -> ONNXProgram:
    """Return what an exporter returns, as it is."""
    program = export(optimize=False)
    assert program is not None  # only the TorchScript exporter returns None
    return program


def _separate_names(program: ONNXProgram) -> None:
    """Rename values inside a program that are called as one of its inputs or outputs.

    Torch names values after the nodes of the model, and an output may be called "relu" as well.
    """
    graph = program.model.graph
    public = (*graph.inputs, *graph.outputs)
    # By `id`: an output is the value of a node as well, and keeps its name.
    ids_of_public = {id(value) for value in public}
    inner = []
    for node in graph:
        inner += [value for value in node.outputs if id(value) not in ids_of_public]
    public_names = {value.name for value in public}
    taken = public_names | {value.name for value in inner}
    for value in inner:
        if value.name not in public_names:
            continue
        name = f"{value.name}_inner"
        while name in taken:
            name += "_"
        taken.add(name)
        value.name = name


def save_program(program: ONNXProgram, draft: Path) -> None:
    """Write the program as one file, without the paths of source files on this machine.

    Raises:
        ExportError: the weights are too large for one file.
    """
    import onnx
    from onnxscript import ir

    weights = 0
    for value in program.model.graph.initializers.values():
        if value.const_value is not None:
            weights += value.const_value.nbytes
    if weights > MAX_WEIGHT_BYTES:
        raise ExportError(
            f"the weights take {weights / GIB:.2f} GiB, and an ONNX file ends at 2 GiB. Hint: "
            "torch.onnx.export(..., external_data=True) keeps the weights in a second file"
        )
    # The exporter puts a stack trace with source paths on every node.
    for node in ir.traversal.RecursiveGraphIterator(program.model.graph):
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    # Not program.save: above 1.5 GiB it writes a second file, asked or not, which would be lost.
    # The format is named, because onnx.save guesses another one from suffixes such as .json.
    onnx.save(program.model_proto, draft, format="protobuf")


def checked_session(file: Path) -> InferenceSession:
    """Check a file, its types and shapes inferred, and open it in ONNX Runtime.

    Raises:
        ExportError: the file is not valid or does not load.
    """
    require_valid(file)
    return open_session(file)


def require_valid(file: Path) -> None:
    """Raise an ExportError if onnx's checker or its shape inference refuses a file."""
    import onnx

    try:
        onnx.checker.check_model(file, full_check=True)  # full: with strict shape inference
    except Exception as error:
        raise _not_usable(error) from error


def open_session(file: Path | bytes) -> InferenceSession:
    """Open a file in ONNX Runtime. The package onnx is not needed.

    Args:
        file: its path, or its content.

    Raises:
        ExportError: the file does not load.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise _not_usable(error) from error


def _not_usable(error: Exception) -> ExportError:
    return ExportError(
        f"the exported file is not usable: {first_line(error)}. Hint: try another opset"
    )


def described_inputs(session: InferenceSession) -> str:
    """Return the names, shapes and types of a session's inputs, for a hint."""
    return ", ".join(f"{each.name} {each.shape} {each.type}" for each in session.get_inputs())


def _output_names(name: str, plan: BlockPlan, readout: str) -> list[str]:
    """Return the names of the file's outputs.

    Raises:
        InputError: `name` is no name, or that of an input.
    """
    if not isinstance(name, str) or not name:
        raise InputError(f"output_name is {name!r}. Hint: pass a name such as 'scores'")
    names = [name]
    if readout == CUMULATIVE:
        names = [f"{name}_{i}" for i in range(len(plan))]
    inputs = [each.name for each in plan.inputs]
    for each in names:
        if each in inputs:
            raise InputError(
                f"output_name {each!r} is the name of an input. "
                f"Hint: choose another than {', '.join(inputs)}"
            )
    return names


def _export(
    model: nn.Module,
    inputs: tuple[Input, ...],
    outputs: list[str],
    opset: int | None,
    *,
    dynamic_size: bool,
) -> ONNXProgram:
    names = [each.name for each in inputs]

    def trace(examples: tuple[Tensor, ...], axes: tuple[Axes, ...]) -> ONNXProgram:
        return onnx_program(model, examples, names, outputs, axes, opset)

    return traced(trace, model, inputs, dynamic_size=dynamic_size)


def _verify(
    draft: Path,
    model: nn.Module,
    inputs: tuple[Input, ...],
    tolerance: float,
    *,
    dynamic_size: bool,
) -> None:
    """Raise an ExportError if a file is not valid, does not run, or disagrees with torch."""
    session = checked_session(draft)
    for case, examples, place in trial_batches(model, inputs, dynamic_size=dynamic_size):
        scores, expected = _both_scores(session, model, case, examples, place)
        mask = mask_among(case, examples)
        require_parity(scores, expected, tolerance, place, dynamic_size=dynamic_size, mask=mask)


def _both_scores(
    session: InferenceSession,
    model: nn.Module,
    inputs: tuple[Input, ...],
    examples: Sequence[Tensor],
    place: str,
) -> tuple[Scores, Scores]:
    """Return the scores of ONNX Runtime and of torch for the same batch, (B, J) each."""
    feed: dict[str, Any] = {}
    for each, example in zip(inputs, examples, strict=True):
        feed[each.name] = example.numpy()
    try:
        expected = model(*examples)
        scores = tuple(map(torch.from_numpy, session.run(None, feed)))
    except Exception as error:
        raise ExportError(
            f"the model fails {place}: {first_line(error)}. "
            "Hint: does it fix the size of the batch or the image?"
        ) from error
    return scores, expected
