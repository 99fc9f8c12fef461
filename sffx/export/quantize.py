"""Static int8 quantisation of an exported ONNX file, by ONNX Runtime's own tools.

Layers with weights, and what lies between them, are quantised, each channel of a weight with a scale of its own. What makes the goodness
of a head out of its convolution, the squares and their mean, and the layer norms between blocks stay in float: they carry a block's whole
answer, and cost little.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sffx.errors import ExportError, InputError
from sffx.export.explain import first_line
from sffx.export.onnx import open_session, require_packages, taken_by
from sffx.files import writing
from sffx.learning.losses import check_labels, check_pair

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

QUANTIZED = (
    "Conv",
    "ConvTranspose",
    "Gemm",
    "MatMul",
    "Relu",
    "Clip",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "Add",
    "Concat",
)
MIB = 2**20


@dataclass(frozen=True)
class Quantization:
    """What quantising a file has cost and gained. Prints as two lines.

    Attributes:
        path: of the quantised file.
        bytes_before: size of the file that it was made from.
        bytes_after: its own size.
        samples: how many were tested; 0 where there was no test loader, and then the rest says nothing.
        accuracy_before: between 0 and 1, of the file that it was made from.
        accuracy_after: its own.
        agreement: the share of the samples for which both predict the same class.
    """

    path: Path
    bytes_before: int
    bytes_after: int
    samples: int = 0
    accuracy_before: float = float("nan")
    accuracy_after: float = float("nan")
    agreement: float = float("nan")

    def __str__(self) -> str:
        share = self.bytes_after / self.bytes_before
        size = f"{self.path}: {self.bytes_before / MIB:.2f} MiB -> {self.bytes_after / MIB:.2f} MiB ({share:.2f})"
        if not self.samples:
            return f"{size}\naccuracy not tested"
        accuracy = f"accuracy {self.accuracy_before:.2%} -> {self.accuracy_after:.2%}"
        return f"{size}\n{accuracy}, the same prediction for {self.agreement:.2%} of {self.samples} samples"


def quantize_onnx(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    calibration_loader: Iterable[Any],
    test_loader: Iterable[Any] | None = None,
    *,
    per_channel: bool = True,
    reduce_range: bool = True,
) -> Quantization:
    """Write an exported ONNX file once more, with int8 weights and 8-bit activations (QuantizeLinear, DequantizeLinear).

    The file appears only once it has passed onnx's checker and runs; whatever fails, an older file of that name stays as it was.

    Args:
        source: what `sffx.export_onnx` wrote; it stays as it is.
        target: of the file to write; its directory must exist.
        calibration_loader: yields (x, y) with inputs like those to come, from which the ranges of the activations are read; a few hundred
            samples are enough, and y is not looked at. x is a tensor, a tuple, or a mapping by the names of the inputs.
        test_loader: yields (x, y) with class indices y, (B,), on which both files are compared, by their last output where they have
            several; None compares nothing.
        per_channel: whether each channel of a weight has a scale of its own.
        reduce_range: whether weights take 7 of the 8 bits. x86 processors without VNNI need it, or sums of products saturate without
            a word: on digits that made one in a hundred of the predictions others. False is for processors that have VNNI, or ARM.

    Raises:
        InputError: `source` is no ONNX file, `target` cannot be written to, or a loader yields something else.
        MissingExtra: onnx or onnxruntime is not installed.
        ExportError: the file cannot be quantised.
    """
    require_packages()
    before = _source_session(Path(source))
    if Path(target).resolve() == Path(source).resolve():
        raise InputError(
            f"{str(target)!r} is the source itself, which stays as it is. Hint: name another file, such as net.int8.onnx"
        )
    with writing(target) as file:
        # ONNX Runtime would write another format for suffixes such as .json.
        draft = file.with_name("quantised.onnx")
        tests = _tried_out(before, test_loader) if test_loader is not None else None
        try:
            _quantize(
                Path(source),
                draft,
                _feeds(calibration_loader, before),
                per_channel=per_channel,
                reduce_range=reduce_range,
            )
        except (InputError, OSError):
            raise
        except Exception as error:
            hint = f"Hint: the loader must yield what the file takes: {taken_by(before)}"
            raise ExportError(
                f"{str(source)!r} cannot be quantised: {first_line(error)}. {hint}"
            ) from error
        sizes = Path(source).stat().st_size, draft.stat().st_size
        tested = _compared(before, open_session(draft), tests) if tests is not None else ()
        draft.rename(file)
    return Quantization(Path(target), *sizes, *tested)


def _source_session(source: Path) -> InferenceSession:
    if not source.is_file():
        raise InputError(f"there is no file {str(source)!r}. Hint: write it with sffx.export_onnx")
    try:
        return open_session(source)
    except ExportError as error:
        raise InputError(
            f"{str(source)!r} is no ONNX file that can be used: {first_line(error.__cause__ or error)}"
        ) from error


def _tried_out(session: InferenceSession, loader: Iterable[Any]) -> Iterator[Any]:
    """Return the batches of the test loader, on the first of which the file was run: before the calibration takes its time.

    Raises:
        InputError: it cannot be run on it, or there is none.
    """
    batches = iter(loader)
    first = next(batches, None)
    if first is None:
        raise InputError("the test loader yielded no samples")
    check_pair(first)
    feed = _feed(first[0], session)
    try:
        session.run(None, feed)
    except Exception as error:
        raise InputError(
            f"the file cannot run on what the test loader yields: {first_line(error)}. Hint: it takes {taken_by(session)}"
        ) from error
    return chain([first], batches)


def _feeds(loader: Iterable[Any], session: InferenceSession) -> Iterator[dict[str, Any]]:
    """Yield what a session is fed for each batch of a loader."""
    for batch in loader:
        check_pair(batch)
        yield _feed(batch[0], session)


def _feed(x: Any, session: InferenceSession) -> dict[str, Any]:
    names = [each.name for each in session.get_inputs()]
    values = (
        dict(x)
        if isinstance(x, Mapping)
        else dict(zip(names, x if isinstance(x, (tuple, list)) else (x,), strict=False))
    )
    if missing := [name for name in names if not isinstance(values.get(name), Tensor)]:
        raise InputError(
            f"the loader yields no tensor for the input {missing[0]!r}. Hint: the file's inputs are {', '.join(names)}"
        )
    return {name: values[name].detach().cpu().numpy() for name in names}


class _Reader:
    """What ONNX Runtime's calibration asks for its inputs."""

    def __init__(self, feeds: Iterator[dict[str, Any]]) -> None:
        self.feeds = feeds

    def get_next(self) -> dict[str, Any] | None:
        return next(self.feeds, None)


def _quantize(
    source: Path,
    draft: Path,
    feeds: Iterator[dict[str, Any]],
    *,
    per_channel: bool,
    reduce_range: bool,
) -> None:
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quant_pre_process, quantize_static

    prepared = draft.with_name("prepared.onnx")
    first = next(feeds, None)
    if first is None:
        raise InputError("the calibration loader yielded no samples")
    with _quiet():
        quant_pre_process(source, prepared)
        quantize_static(
            prepared,
            draft,
            _Reader(chain([first], feeds)),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTIZED),
            per_channel=per_channel,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_in_float(onnx.load(prepared, load_external_data=False)),
        )


def _in_float(model: Any) -> list[str]:
    """Return the names of the nodes that stay in float: products of activations, as in attention and covariances, and sums with constants.

    Such sums are biases of heads, and the variance and epsilon of a norm, which spans many orders of magnitude.
    """
    constants = {each.name for each in model.graph.initializer}
    fixed = {node.name: bool(constants & set(node.input)) for node in model.graph.node}
    return [
        node.name
        for node in model.graph.node
        if (node.op_type, fixed[node.name]) in (("MatMul", False), ("Add", True))
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back the advice that ONNX Runtime's tools log about models in general."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _compared(
    before: InferenceSession, after: InferenceSession, loader: Iterable[Any]
) -> tuple[int, float, float, float]:
    """Return the number of samples, the accuracy of both files, and the share of samples for which they agree."""
    found = torch.zeros(4, dtype=torch.int64)
    for batch in loader:
        check_pair(batch)
        feed = _feed(batch[0], before)
        scores = torch.from_numpy(before.run(None, feed)[-1])
        check_labels(batch[1], *scores.shape)
        y, old = batch[1].cpu(), scores.argmax(1)
        new = torch.from_numpy(after.run(None, feed)[-1]).argmax(1)
        found += torch.tensor([len(y), (old == y).sum(), (new == y).sum(), (old == new).sum()])
    samples, right_before, right_after, same = found.tolist()
    if not samples:
        raise InputError("the test loader yielded no samples")
    return samples, right_before / samples, right_after / samples, same / samples
