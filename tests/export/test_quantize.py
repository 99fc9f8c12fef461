"""A small network trained on digits, and its file in eight bits.

That is smaller, and nearly always predicts the same.
"""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import sffx
from sffx.export.quantize import Quantization

Loader = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def loaders() -> tuple[Loader, Loader]:
    """Batches of 1,200 digits to train on, and of 597 to test on."""
    digits = load_digits()
    x, y = (
        torch.tensor(digits.images / 8 - 1, dtype=torch.float32)[:, None],
        torch.tensor(digits.target),
    )
    train, test = (
        list(zip(x[part].split(100), y[part].split(100), strict=True))
        for part in (slice(1200), slice(1200, None))
    )
    return train, test


@pytest.fixture(scope="module")
def source(loaders: tuple[Loader, Loader], tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    layers = [
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
        ),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    ]
    net = sffx.transform(nn.Sequential(*layers), "batchnorm", torch.zeros(1, 1, 8, 8))
    optimizer = torch.optim.AdamW(sffx.parameter_groups(net, 3e-3))
    for _ in range(4):
        for x, y in loaders[0]:
            optimizer.zero_grad()
            sffx.local_loss(net, x, y).backward()
            optimizer.step()
    path = tmp_path_factory.mktemp("digits") / "net.onnx"
    return sffx.export_onnx(net, path, class_names=[str(i) for i in range(10)])


@pytest.fixture(scope="module")
def quantised(source: Path, loaders: tuple[Loader, Loader]) -> Quantization:
    return sffx.quantize_onnx(source, source.with_name("int8.onnx"), loaders[0][:3], loaders[1])


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    path = tmp_path / "int8.onnx"
    path.write_bytes(b"the file of yesterday")
    return path


def assert_untouched(old_file: Path) -> None:
    assert old_file.read_bytes() == b"the file of yesterday"
    assert os.listdir(old_file.parent) == [old_file.name]


def predictions(path: Path, loader: Loader) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return torch.cat(
        [torch.from_numpy(session.run(None, {name: x.numpy()})[0]).argmax(1) for x, _ in loader]
    )


def test_report_is_what_both_files_say(
    quantised: Quantization, source: Path, loaders: tuple[Loader, Loader]
) -> None:
    y = torch.cat([y for _, y in loaders[1]])
    before, after = predictions(source, loaders[1]), predictions(quantised.path, loaders[1])
    assert quantised.samples == len(y) == 597
    assert quantised.accuracy_before == pytest.approx(float((before == y).double().mean()))
    assert quantised.accuracy_after == pytest.approx(float((after == y).double().mean()))
    assert quantised.agreement == pytest.approx(float((before == after).double().mean()))
    assert (quantised.bytes_before, quantised.bytes_after) == (
        source.stat().st_size,
        quantised.path.stat().st_size,
    )


def test_eight_bits_are_enough_for_digits(quantised: Quantization) -> None:
    assert quantised.accuracy_before > 0.9
    assert quantised.agreement > 0.98
    assert quantised.bytes_after < 0.4 * quantised.bytes_before


def test_weights_are_whole_numbers_and_the_squares_are_not_quantised(
    quantised: Quantization, source: Path
) -> None:
    model = onnx.load(quantised.path)
    kinds = Counter(node.op_type for node in model.graph.node)
    convolutions = Counter(node.op_type for node in onnx.load(source).graph.node)["Conv"]
    stored = {each.name: each.data_type for each in model.graph.initializer}
    weights = [
        stored[node.input[0]]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in stored
    ]
    assert kinds["Conv"] == convolutions
    assert kinds["QuantizeLinear"] >= kinds["Conv"]
    assert weights.count(onnx.TensorProto.INT8) >= kinds["Conv"]
    producers = {name: node.op_type for node in model.graph.node for name in node.output}
    assert producers[model.graph.output[0].name] != "DequantizeLinear"


def test_what_the_file_tells_is_kept_and_the_batch_stays_open(quantised: Quantization) -> None:
    session = onnxruntime.InferenceSession(quantised.path)
    assert json.loads(session.get_modelmeta().custom_metadata_map["sffx"])["class_names"] == [
        str(i) for i in range(10)
    ]
    assert [value.shape for value in (*session.get_inputs(), *session.get_outputs())] == [
        ["batch", 1, 8, 8],
        ["batch", 10],
    ]


def test_report_prints_as_two_lines() -> None:
    report = Quantization(Path("int8.onnx"), 4 * 2**20, 2**20, 200, 0.95, 0.94, 0.98)
    assert str(report).splitlines() == [
        "int8.onnx: 4.00 MiB -> 1.00 MiB (0.25)",
        "accuracy 95.00% -> 94.00%, the same prediction for 98.00% of 200 samples",
    ]
    assert str(Quantization(Path("int8.onnx"), 4, 2)).endswith("\naccuracy not tested")


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], r"the calibration loader yielded no samples"),
        ([torch.zeros(2, 1, 8, 8)], r"the loader yielded a Tensor, not a pair \(x, y\)"),
        (
            [({"image": torch.zeros(2, 1, 8, 8)}, torch.zeros(2))],
            r"yields no tensor for the input 'input'\. Hint: the file's inputs are input",
        ),
        ([(torch.zeros(0, 1, 8, 8), torch.zeros(0))], r"the calibration loader yielded no samples"),
        (
            [(torch.full((2, 1, 8, 8), float("nan")), torch.zeros(2))],
            r"values of 'input' that are not finite\. Hint: leave these samples out",
        ),
        (
            [(torch.zeros(2, 1, 8, 8, dtype=torch.bfloat16), torch.zeros(2))],
            r"yields bfloat16 for the input 'input', .*Hint: yield x\.float\(\)",
        ),
    ],
)
def test_loader_that_does_not_fit_is_refused(
    source: Path, old_file: Path, loader: Any, message: str
) -> None:
    with pytest.raises(sffx.InputError, match=message):
        sffx.quantize_onnx(source, old_file, loader)
    assert_untouched(old_file)


def test_a_later_batch_of_the_test_that_does_not_fit_is_refused(
    source: Path, loaders: tuple[Loader, Loader], old_file: Path
) -> None:
    x, y = loaders[1][0]
    with pytest.raises(sffx.InputError, match=r"cannot run on what the test loader yields: "):
        sffx.quantize_onnx(source, old_file, loaders[0][:1], [(x, y), (x[:, :, :4], y)])
    assert_untouched(old_file)


def test_inputs_of_another_shape_are_refused(source: Path, old_file: Path) -> None:
    with pytest.raises(
        sffx.ExportError,
        match=r"cannot be quantised: .*Hint: the loader must yield what the file takes: "
        r"input \['batch', 1, 8, 8\]",
    ):
        sffx.quantize_onnx(source, old_file, [(torch.zeros(2, 3, 8, 8), torch.zeros(2))])
    assert_untouched(old_file)


def test_what_is_no_onnx_file_is_refused(old_file: Path, loaders: tuple[Loader, Loader]) -> None:
    with pytest.raises(
        sffx.InputError,
        match=r"there is no file '.*none\.onnx'\. Hint: write it with sffx\.export_onnx",
    ):
        sffx.quantize_onnx(old_file.with_name("none.onnx"), old_file, loaders[0])
    with pytest.raises(sffx.InputError, match=r"int8\.onnx' is no ONNX file that can be used"):
        sffx.quantize_onnx(old_file, old_file, loaders[0])
    assert_untouched(old_file)


def test_full_disk_leaves_the_old_file(
    source: Path, old_file: Path, loaders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("onnxruntime.quantization.quantize_static", full)
    with pytest.raises(
        sffx.ExportError, match=r"cannot write '.*int8\.onnx': No space left on device"
    ):
        sffx.quantize_onnx(source, old_file, loaders[0][:1])
    assert_untouched(old_file)


def test_what_cannot_be_tested_is_said_before_the_calibration(
    source: Path, loaders: tuple[Loader, Loader], old_file: Path
) -> None:
    for x in (loaders[1][0][0][:, :, :4], loaders[1][0][0].double()):
        with pytest.raises(
            sffx.InputError, match=r"cannot run on what the test loader yields: .*Hint: it takes "
        ):
            sffx.quantize_onnx(source, old_file, iter(()), [(x, loaders[1][0][1])])
    with pytest.raises(sffx.InputError, match="the test loader yielded no samples"):
        sffx.quantize_onnx(source, old_file, iter(()), iter(()))
    assert_untouched(old_file)


def test_the_source_is_no_target(source: Path, loaders: tuple[Loader, Loader]) -> None:
    before = source.read_bytes()
    with pytest.raises(sffx.InputError, match=r"is the source itself.*Hint: name another file"):
        sffx.quantize_onnx(source, source, loaders[0])
    assert source.read_bytes() == before
