"""The ONNX export of a cut model: one readout, one file, compared with torch before it takes its place.

The dynamo exporter is used, not the TorchScript one: torch has deprecated the latter, it bakes Python control flow into the graph with
no more than a warning, and writes 1.3 to 8.6 times the nodes (swin_t: 6201 against 720). Dynamo's price, for resnet18,
mobilenet_v3_small, vit_b_16 and swin_t on two cores: 4, 9, 14 and 30 s against 0.4, 0.3, 5 and 3 s; parity was the same, below 2e-6.
"""

from __future__ import annotations

import copy
import importlib
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sffx.compiler.plan import Input, plan_of
from sffx.errors import ExportError, InputError, MissingExtra
from sffx.learning.readout import READOUTS

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from torch.onnx import ONNXProgram

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TRACED_BATCH = 2
VERIFIED_BATCHES = (1, 3)
# A protobuf file ends at 2 GiB; the 16 MiB are room for the graph around the weights.
MAX_WEIGHT_BYTES = 2**31 - 2**24


def export_onnx(
    net: torch.fx.GraphModule, path: str | os.PathLike[str], readout: str = "ensemble", *, opset: int | None = None, tolerance: float = 1e-4
) -> Path:
    """Write the inference graph of a cut model as an ONNX file.

    The file appears only once it has passed onnx's checker and agrees with torch at two batch sizes; whatever fails, an older file
    of that name stays as it was. The model is exported in float32 and eval mode, from a copy on the CPU; `net` is not touched.

    Args:
        net: what `sffx.transform` returned, in any mode, on any device.
        path: of the file to write; its directory must exist.
        readout: "ensemble" (mean of the blocks' goodness), "last" (the last block's goodness) or "classifier" (its logits).
            What the readout does not need is not in the file.
        opset: version of the ONNX operator set; torch's default if None.
        tolerance: the largest relative error allowed between ONNX Runtime and torch, max|a - b| / max|b|.

    Returns:
        `path`. The graph's inputs are named as in `net.plan.inputs`, its output is "scores", (B, J); the batch axis is "batch".

    Raises:
        InputError: `net` is not a cut model, `readout` is unknown, or `path` cannot be written to.
        MissingExtra: onnx, onnxscript or onnxruntime is not installed.
        ExportError: the model cannot be exported, is larger than 2 GiB, or its scores differ beyond `tolerance`.
    """
    inputs = plan_of(net).inputs
    _require_readout(readout)
    target = _target(Path(path))
    require_packages()
    with draft_beside(target) as draft, torch.no_grad():
        model = inference_copy(net, readout)
        program = _export(model, inputs, opset)
        save_program(program, draft)
        _verify(draft, model, inputs, tolerance)
        os.replace(draft, target)
    return Path(path)


def _require_readout(readout: str) -> None:
    if readout not in READOUTS:
        raise InputError(f"there is no readout {readout!r}. Hint: the readouts are {', '.join(map(repr, READOUTS))}")


def _target(path: Path) -> Path:
    """Return the file that `path` names, through symbolic links: the rename must replace the file, not the link to it."""
    target = path.resolve()
    if target.is_dir():
        raise InputError(f"{str(path)!r} is a directory. Hint: name the file, as in {str(path / 'net.onnx')!r}")
    require_directory(target.parent)
    return target


def require_directory(directory: Path) -> None:
    """Raise an InputError if there is no such directory."""
    if not directory.is_dir():
        raise InputError(f"the directory {str(directory)!r} does not exist. Hint: create it first")


def require_packages() -> None:
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise MissingExtra(error.name or package, "export", "exporting to ONNX") from error


@contextmanager
def draft_beside(target: Path) -> Iterator[Path]:
    """Yield a file name in a temporary folder beside the target, so that one rename, which is atomic, can put it in place.

    A folder, not a temporary file, because the file in it then gets the permissions that any new file gets.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix=".sffx-", dir=target.parent)
    except OSError as error:
        raise InputError(f"cannot write to the directory {str(target.parent)!r}: {error.strerror}. Hint: choose another path") from error
    with folder as name:
        try:
            yield Path(name) / "net.onnx"
        except OSError as error:
            raise ExportError(f"cannot write {str(target)!r}: {error.strerror or error}. Hint: is the disk full?") from error


def inference_copy(net: torch.fx.GraphModule, readout: str) -> nn.Module:
    """Return a copy of the net for inference on the CPU in float32, with no parameter that requires grad."""
    try:
        model = copy.deepcopy(net)
    except Exception as error:
        hint = "Hint: a module that keeps tensors with a grad history as attributes cannot be copied; detach them"
        raise ExportError(f"the model cannot be copied: {_first_line(error)}. {hint}") from error
    model = model.cpu().float().eval().requires_grad_(False)
    head: Any = model.get_submodule("readout")
    head.mode = readout
    return model


def random_inputs(inputs: tuple[Input, ...], batch: int) -> tuple[Tensor, ...]:
    """Draw one random batch of every input from a generator of its own, so that the caller's random state does not move."""
    generator = torch.Generator().manual_seed(batch)
    return tuple(_example(each, batch, generator) for each in inputs)


def _example(each: Input, batch: int, generator: torch.Generator) -> Tensor:
    shape = (batch, *each.shape)
    dtype = getattr(torch, each.dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
    if each.marks_tokens:  # at least one real token in each sample, and the padding behind
        return (torch.arange(shape[1]) < torch.randint(1, shape[1] + 1, (batch, 1), generator=generator, device="cpu")).to(dtype)
    high = 2 if dtype == torch.bool else max(each.high, 1)
    return torch.randint(0, high, shape, generator=generator, device="cpu").to(dtype)


def _export(model: nn.Module, inputs: tuple[Input, ...], opset: int | None) -> ONNXProgram:
    axes = tuple({0: "batch"} for _ in inputs)
    return traced_program(model, random_inputs(inputs, TRACED_BATCH), [each.name for each in inputs], ["scores"], axes, opset)


def traced_program(
    model: nn.Module,
    arguments: tuple[Tensor, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
    axes: tuple[dict[int, str] | None, ...],
    opset: int | None,
) -> ONNXProgram:
    try:
        with warnings.catch_warnings():
            # torch says this of every input after the first, since all share the axis; the name is used all the same.
            warnings.filterwarnings("ignore", message=r"# The axis name: batch will not be used", category=UserWarning)
            program = torch.onnx.export(
                model,
                arguments,
                dynamo=True,
                verbose=False,
                input_names=list(input_names),
                output_names=list(output_names),
                dynamic_shapes=axes,
                opset_version=opset,
            )
    except Exception as error:
        raise ExportError(_explanation(error)) from error
    assert program is not None  # only the TorchScript exporter returns None
    written = program.model.opset_imports[""]
    if opset not in (None, written):
        # torch only logs that it could not convert, and keeps the version it had.
        raise ExportError(f"the model has no form in opset {opset}; torch offers opset {written}. Hint: leave opset out, or pass {written}")
    return program


def _explanation(error: Exception) -> str:
    """Say in one line what stopped the exporter: the operator or the module, its own first words, and what to do."""
    chain = _chain(error)
    text = "\n".join(map(str, chain))
    if operator := re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", text):
        node = re.search(r"Error when translating node %(\w+)", text)
        place = f" (node {node[1]!r})" if node else ""
        return f"the operator {operator[1]!r}{place} has no ONNX form. Hint: write it with other operators"
    reason = _first_line(chain[-1])
    hint = "Hint: the model must run at any batch size, without Python branches on the values of tensors"
    if module := re.search(r"call_module\[target=([\w.]+)\]", text):
        return f"the module {module[1]!r} cannot be exported: {reason}. {hint}"
    return f"the model cannot be exported: {reason}. {hint}"


def _chain(error: BaseException) -> list[BaseException]:
    """Return the error, its cause, the cause of that, and so on."""
    return [error, *_chain(error.__cause__)] if error.__cause__ else [error]


def _first_line(error: BaseException) -> str:
    """Return the first line of the error's message, with the second where the first only announces it."""
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    return (f"{first} {rest[0].strip(' -')}" if first.endswith(":") and rest else first).rstrip(".:")


def save_program(program: ONNXProgram, draft: Path) -> None:
    """Write the program as one file, without the source paths of this machine, which the exporter puts on every node."""
    import onnx
    from onnxscript import ir

    weights = sum(value.const_value.nbytes for value in program.model.graph.initializers.values() if value.const_value is not None)
    if weights > MAX_WEIGHT_BYTES:
        hint = "Hint: torch.onnx.export(..., external_data=True) keeps the weights in a second file"
        raise ExportError(f"the weights take {weights / 2**30:.2f} GiB, and an ONNX file ends at 2 GiB. {hint}")
    for node in ir.traversal.RecursiveGraphIterator(program.model.graph):
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    # Not program.save: above 1.5 GiB it writes a second file, asked or not, which the rename would leave behind.
    onnx.save(program.model_proto, draft)


def _verify(draft: Path, model: nn.Module, inputs: tuple[Input, ...], tolerance: float) -> None:
    """Refuse a file that is not valid ONNX, does not run, or disagrees with torch."""
    session = open_session(draft)
    for batch in VERIFIED_BATCHES:
        expected, scores = _both_scores(session, model, inputs, batch)
        require_parity(scores, expected, tolerance, f"at batch size {batch}")


def open_session(draft: Path) -> InferenceSession:
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        onnx.checker.check_model(draft, full_check=True)
        return onnxruntime.InferenceSession(draft, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"the exported file is not usable: {_first_line(error)}. Hint: try another opset") from error


def _both_scores(session: InferenceSession, model: nn.Module, inputs: tuple[Input, ...], batch: int) -> tuple[Tensor, Tensor]:
    """Return torch's scores and ONNX Runtime's of the same random batch, each (B, J)."""
    examples = random_inputs(inputs, batch)
    feed = {each.name: example.numpy() for each, example in zip(inputs, examples, strict=True)}
    try:
        expected = model(*examples)
        scores = torch.from_numpy(session.run(["scores"], feed)[0])
    except Exception as error:
        raise ExportError(f"the model fails at batch size {batch}: {_first_line(error)}. Hint: does it fix the batch size?") from error
    if scores.shape != expected.shape:
        raise ExportError(f"ONNX Runtime returns scores of shape {tuple(scores.shape)}, torch of shape {tuple(expected.shape)}")
    return expected, scores


def require_parity(scores: Tensor, expected: Tensor, tolerance: float, place: str) -> None:
    """Raise an ExportError if ONNX Runtime's scores differ from torch's by more than is tolerated; `place` says of what they are."""
    error = _relative_error(scores, expected)
    # Not `error > tolerance`: a NaN must be refused too.
    if not error <= tolerance:
        raise ExportError(
            f"ONNX Runtime and torch differ by a relative error of {error:.3g} {place}; the tolerance is {tolerance:g}. "
            "Hint: pass a larger tolerance if this much is acceptable"
        )


def _relative_error(scores: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((scores.double() - expected.double()).abs().max() / scale.double())
