"""Static int8 quantisation of an exported ONNX file, by ONNX Runtime's own tools.

Layers with weights, and what lies between them, are quantised. Each channel of a weight has a scale
of its own. Two parts stay in float: the squares and their mean, which make the goodness of a head
out of its convolution, and the layer norms between blocks. They carry a block's whole answer, and
cost little.
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

import numpy as np
import torch
from torch import Tensor

from sffx.checks import require_flag
from sffx.errors import ExportError, InputError, first_line
from sffx.export.onnx import checked_session, described_inputs, require_packages
from sffx.files import as_path, writing
from sffx.inputs import batches as each_batch
from sffx.inputs import split_batch
from sffx.progress import running
from sffx.tables import in_mib
from sffx.tasks import CLASSIFICATION

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


@dataclass(frozen=True)
class Quantization:
    """The cost and the gain of quantising a file. Prints as two lines.

    Attributes:
        path: of the quantised file.
        bytes_before: size of the file that it was made from.
        bytes_after: its own size.
        samples: how many were tested. Without a test loader it is 0, and the other numbers are NaN.
        accuracy_before: of the file that it was made from, between 0 and 1.
        accuracy_after: its own.
        agreement: the share of the samples for which both files predict the same class.
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
        before = in_mib(self.bytes_before)
        size = f"{self.path}: {before} -> {in_mib(self.bytes_after)} ({share:.2f})"
        if not self.samples:
            return f"{size}\naccuracy not tested"
        accuracy = f"accuracy {self.accuracy_before:.2%} -> {self.accuracy_after:.2%}"
        agreement = f"the same prediction for {self.agreement:.2%} of {self.samples} samples"
        return f"{size}\n{accuracy}, {agreement}"


@running("quantising")
def quantize_onnx(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    calibration_loader: Iterable[Any],
    test_loader: Iterable[Any] | None = None,
    *,
    per_channel: bool = True,
    reduce_range: bool = True,
) -> Quantization:
    """Write an exported ONNX file again, with int8 weights and 8-bit activations.

    The new file holds QuantizeLinear and DequantizeLinear nodes. It appears only after it has
    passed onnx's checker and runs. If anything fails, an older file of that name stays as it was.

    Args:
        source: what `sffx.export_onnx` wrote; it stays as it is.
        target: of the file to write; its directory must exist.
        calibration_loader: yields (x, y) with inputs like those to come. The ranges of the
            activations are read from them; a few hundred samples are enough. x is a tensor, a
            tuple, or a mapping by the names of the inputs. y is not used.
        test_loader: yields (x, y) with class indices y, (B,), on which both files are compared, by
            their last output if they have several. None compares nothing.
        per_channel: whether each channel of a weight has a scale of its own.
        reduce_range: whether weights take 7 of the 8 bits. On x86 processors without VNNI, sums of
            products otherwise saturate without an error; on digits that changed one in a hundred
            predictions. Pass False for processors that have VNNI, and for ARM.

    Raises:
        InputError: `source` is no ONNX file, `target` cannot be written to, or a loader yields
            something else.
        MissingExtra: onnx or onnxruntime is not installed.
        ExportError: the file cannot be quantised.
    """
    require_packages()
    require_flag("per_channel", per_channel)
    require_flag("reduce_range", reduce_range)
    source = as_path(source)
    target = as_path(target)
    before = _source_session(source)
    if target.resolve() == source.resolve():
        raise InputError(
            f"{str(target)!r} is the source itself, which stays as it is. "
            "Hint: name another file, such as net.int8.onnx"
        )
    with writing(target) as file:
        # ONNX Runtime would write another format for suffixes such as .json.
        draft = file.with_name("quantised.onnx")
        test_batches = None
        if test_loader is not None:
            # Before the calibration, which takes its time.
            test_batches = _tried_batches(before, test_loader)
        feeds = _feeds(calibration_loader, before)
        first = next(feeds, None)
        if first is None:
            raise InputError(
                "the calibration loader yielded no samples. Hint: pass a few hundred samples"
            )
        feeds = chain([first], feeds)
        try:
            _quantize(source, draft, feeds, per_channel=per_channel, reduce_range=reduce_range)
        except (InputError, OSError):
            raise  # they say what is wrong: with the loader, or with the disk
        except Exception as error:
            raise _not_quantised(source, before, error) from error
        after = checked_session(draft)
        _require_runs(after, first)
        bytes_after = draft.stat().st_size
        comparison = () if test_batches is None else _compared(before, after, test_batches)
        draft.rename(file)
    return Quantization(target, source.stat().st_size, bytes_after, *comparison)


def _source_session(source: Path) -> InferenceSession:
    if not source.is_file():
        raise InputError(f"there is no file {str(source)!r}. Hint: write it with sffx.export_onnx")
    try:
        return checked_session(source)
    except ExportError as error:
        reason = first_line(error.__cause__ or error)
        raise InputError(
            f"{str(source)!r} is no ONNX file that can be used: {reason}. "
            "Hint: write it with sffx.export_onnx"
        ) from error


def _not_quantised(source: Path, session: InferenceSession, error: Exception) -> ExportError:
    return ExportError(
        f"{str(source)!r} cannot be quantised: {first_line(error)}. "
        f"Hint: the loader must yield what the file takes: {described_inputs(session)}"
    )


def _tried_batches(session: InferenceSession, loader: Iterable[Any]) -> Iterator[Any]:
    """Return the batches of the test loader, after the file was run on the first of them.

    Raises:
        InputError: the file cannot be run on it, or the loader is empty.
    """
    batches = each_batch(loader)
    first = next(batches, None)
    if first is None:
        raise InputError("the test loader yielded no samples. Hint: leave it out, or pass another")
    x, _ = split_batch(first)
    _tested_scores(session, _feed(x, session))
    return chain([first], batches)


def _tested_scores(session: InferenceSession, feed: dict[str, Any]) -> Tensor:
    """Return the last output of a file for a batch of the test loader.

    Raises:
        InputError: the file cannot be run on it.
    """
    try:
        return torch.from_numpy(session.run(None, feed)[-1])
    except Exception as error:
        raise InputError(
            f"the file cannot run on what the test loader yields: {first_line(error)}. "
            f"Hint: it takes {described_inputs(session)}"
        ) from error


def _require_runs(session: InferenceSession, feed: dict[str, Any]) -> None:
    """Raise an ExportError if a quantised file does not run on a batch of its calibration."""
    try:
        session.run(None, feed)
    except Exception as error:
        raise ExportError(
            f"the quantised file does not run: {first_line(error)}. Hint: use the file as it was"
        ) from error


def _feeds(loader: Iterable[Any], session: InferenceSession) -> Iterator[dict[str, Any]]:
    """Yield the inputs of a session for each batch of a loader that has samples.

    Raises:
        InputError: a batch holds something else, or values that are not finite. An activation
            without a range has no scale.
    """
    for batch in each_batch(loader):
        x, _ = split_batch(batch)
        feed = _feed(x, session)
        for name, value in feed.items():
            if not np.isfinite(value).all():
                raise InputError(
                    f"the calibration loader yields values of {name!r} that are not finite. "
                    "Hint: leave these samples out"
                )
        if all(value.size for value in feed.values()):
            yield feed


def _feed(x: Any, session: InferenceSession) -> dict[str, Any]:
    """Return the inputs of a session by name, as arrays, from a batch's x."""
    names = [each.name for each in session.get_inputs()]
    if isinstance(x, Mapping):
        values = dict(x)
    else:
        positional = x if isinstance(x, (tuple, list)) else (x,)
        # Not strict: a file may take fewer inputs than the model did.
        values = dict(zip(names, positional, strict=False))
    feed = {}
    for name in names:
        if not isinstance(values.get(name), Tensor):
            raise InputError(
                f"the loader yields no tensor for the input {name!r}. "
                f"Hint: the file's inputs are {', '.join(names)}"
            )
        feed[name] = _as_array(name, values[name])
    return feed


def _as_array(name: str, value: Tensor) -> np.ndarray[Any, Any]:
    try:
        return value.detach().cpu().numpy()
    except TypeError as error:
        dtype = str(value.dtype).removeprefix("torch.")
        raise InputError(
            f"the loader yields {dtype} for the input {name!r}, which ONNX Runtime does not take. "
            "Hint: yield x.float()"
        ) from error


class _Reader:
    """The form in which ONNX Runtime's calibration asks for its inputs."""

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
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    prepared = draft.with_name("prepared.onnx")
    with _without_advice():
        _prepare(source, prepared)
        quantize_static(
            prepared,
            draft,
            _Reader(feeds),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTIZED),
            per_channel=per_channel,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_float_nodes(onnx.load(prepared, load_external_data=False)),
        )


def _prepare(source: Path, prepared: Path) -> None:
    """Write a file with the shapes of all values, and with batch norms folded away."""
    from onnxruntime.quantization import quant_pre_process

    try:
        quant_pre_process(source, prepared)
    except TypeError:
        # Its search for symbolic shapes knows fewer operators than onnx does, which looks as well.
        quant_pre_process(source, prepared, skip_symbolic_shape=True)


def _float_nodes(model: Any) -> list[str]:
    """Return the names of the nodes of quantised kinds that stay in float.

    These are products of two activations, as in attention and covariances, and sums with constants.
    Such a sum is the bias of a head, or the variance and epsilon of a norm. A variance spans too
    many orders of magnitude for eight bits.
    """
    constants = {each.name for each in model.graph.initializer}
    names = []
    for node in model.graph.node:
        has_constant = bool(constants & set(node.input))
        if node.op_type == "MatMul" and not has_constant:
            names.append(node.name)
        if node.op_type == "Add" and has_constant:
            names.append(node.name)
    return names


@contextmanager
def _without_advice() -> Iterator[None]:
    """Silence the advice about models in general that ONNX Runtime's tools log.

    They log by the root logger itself. Messages of other loggers do not pass its filters.
    """
    # Without a handler, `logging.warning` would add one that writes to stderr, and leave it there.
    handler = logging.NullHandler()
    logging.root.addHandler(handler)
    logging.root.addFilter(_is_serious)
    try:
        yield
    finally:
        logging.root.removeFilter(_is_serious)
        logging.root.removeHandler(handler)


def _is_serious(record: logging.LogRecord) -> bool:
    return record.levelno > logging.WARNING


def _require_scores_of_classes(scores: Tensor) -> None:
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise InputError(
            f"the file returns scores of shape {tuple(scores.shape)}, and the test compares "
            "classes of a sample, (B, J). Hint: leave test_loader out"
        )


def _compared(
    before: InferenceSession, after: InferenceSession, batches: Iterable[Any]
) -> tuple[int, float, float, float]:
    """Return the number of samples, the accuracy of both files, and the share where they agree."""
    samples = right_before = right_after = same = 0
    for batch in batches:
        x, y = split_batch(batch)
        feed = _feed(x, before)
        scores = _tested_scores(before, feed)
        _require_scores_of_classes(scores)
        CLASSIFICATION.check_labels(y, *scores.shape)
        y = y.cpu()
        old = scores.argmax(dim=1)
        new = _tested_scores(after, feed).argmax(dim=1)
        samples += len(y)
        right_before += int((old == y).sum())
        right_after += int((new == y).sum())
        same += int((old == new).sum())
    if not samples:
        raise InputError("the test loader yielded no samples. Hint: leave it out, or pass another")
    return samples, right_before / samples, right_after / samples, same / samples
