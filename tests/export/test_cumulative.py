"""One file with an answer for every block. The oracle is the runner on torch, block by block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import onnx.utils
import onnxruntime
import pytest
import torch
from torch import Tensor, fx

import sffx

BLOCKS = 3
OUTPUTS = [f"scores_{i}" for i in range(BLOCKS)]


@pytest.fixture(scope="module")
def path(net: fx.GraphModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sffx.export_onnx(
        net, tmp_path_factory.mktemp("cumulative") / "net.onnx", "cumulative", dynamic_size=True
    )


@pytest.mark.parametrize("size", [8, 12])
def test_each_output_is_the_ensemble_of_the_blocks_up_to_it(
    net: fx.GraphModule, path: Path, size: int
) -> None:
    x = torch.randn(5, 3, size, size)
    session = onnxruntime.InferenceSession(path)
    found = torch.stack(
        [torch.from_numpy(scores) for scores in session.run(OUTPUTS, {"x": x.numpy()})]
    )
    expected = sffx.EarlyExit(net).cumulative(x)
    assert len(expected) == BLOCKS
    assert not torch.allclose(expected[0], expected[-1], rtol=1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert [each.name for each in session.get_outputs()] == OUTPUTS
    assert (
        json.loads(session.get_modelmeta().custom_metadata_map["sffx"])["readout"] == "cumulative"
    )


def test_what_leads_to_an_answer_can_be_taken_out_as_a_shorter_network(
    net: fx.GraphModule, path: Path, tmp_path: Path, x: Tensor
) -> None:
    sizes = []
    for output, expected in zip(OUTPUTS, sffx.EarlyExit(net).cumulative(x), strict=True):
        onnx.utils.extract_model(path, tmp_path / output, ["x"], [output])
        session = onnxruntime.InferenceSession(tmp_path / output)
        torch.testing.assert_close(
            torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), expected, rtol=1e-4, atol=1e-5
        )
        sizes.append((tmp_path / output).stat().st_size)
    assert sizes == sorted(set(sizes))


def test_program_returns_all_answers(net: fx.GraphModule, tmp_path: Path, x: Tensor) -> None:
    loaded: Any = torch.export.load(
        sffx.export_program(net, tmp_path / "net.pt2", "cumulative")
    ).module()
    torch.testing.assert_close(
        torch.stack(loaded(x)), sffx.EarlyExit(net).cumulative(x), rtol=1e-4, atol=1e-5
    )


def products_of_activations(path: Path) -> list[set[str]]:
    """Return, for each product of two computed values, the operators that computed them."""
    graph = onnx.load(path).graph
    stored = {each.name for each in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    products = []
    for node in graph.node:
        factors = [producers[name] for name in node.input if name in producers]
        computed = [factor for factor in factors if factor.input[0] not in stored]
        if node.op_type == "MatMul" and len(computed) == 2:
            products.append({factor.op_type for factor in computed})
    return products


def test_quantised_file_is_judged_by_its_last_answer_and_keeps_covariances_in_float(
    net: fx.GraphModule, tmp_path: Path, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sffx.kernels.goodness.moment_is_cheaper", lambda *sizes: True)
    path = sffx.export_onnx(net, tmp_path / "net.onnx", "cumulative")
    cumulative = sffx.EarlyExit(net).cumulative(x)
    first, last = cumulative[0].argmax(1), cumulative[-1].argmax(1)
    assert (first != last).any()
    report = sffx.quantize_onnx(path, tmp_path / "int8.onnx", [(x, last)], [(x, last)])
    assert report.accuracy_before == 1
    # The heads of this net have covariances, products of two activations, which stay in float.
    before, after = products_of_activations(path), products_of_activations(report.path)
    assert len(before) == len(after) > 0
    assert not any("DequantizeLinear" in operators for operators in after)


def test_name_of_one_of_several_outputs_may_not_be_that_of_an_input(
    net: fx.GraphModule, tmp_path: Path
) -> None:
    class Renamed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(
                torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 5), torch.nn.ReLU()
            )
            self.fc = torch.nn.Linear(5, 3)

        def forward(self, y_1: Tensor) -> Tensor:
            return self.fc(self.net(y_1))

    cut = sffx.transform(Renamed(), "layer", torch.zeros(1, 4))
    with pytest.raises(sffx.InputError, match="output_name 'y_1' is the name of an input"):
        sffx.export_onnx(cut, tmp_path / "net.onnx", "cumulative", output_name="y")
