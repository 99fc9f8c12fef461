"""The oracle is torch, on samples where only a small number keeps a result finite."""

from __future__ import annotations

import onnxruntime
import torch
from torch import Tensor, nn

from sffx.export.onnx import onnx_program


class Guarded(nn.Module):
    """Quotients, logarithms and roots of values that may be 0."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("eps", torch.tensor(1e-9))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (
            (x + 1e-10).log(),
            x / (x.norm(dim=1, keepdim=True) + 1e-8),
            x / (self.eps + x.sum(1, keepdim=True)),
            (x - -1e-12).rsqrt(),
            1 - x * (1 - 1e-6),
        )


def test_a_small_number_that_keeps_a_result_finite_is_in_the_file() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 4.0]])
    model = Guarded().eval()
    expected = model(x)
    names = [f"y{i}" for i in range(len(expected))]
    program = onnx_program(model, (x,), ["x"], names, ({0: torch.export.Dim("batch")},), None)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    answers = session.run(None, {"x": x.numpy()})
    for name, answer, wanted in zip(names, answers, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(answer), wanted, msg=f"{name}: {answer}")


class Whole(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu() * 1 + 0.0


def test_an_operation_that_changes_nothing_is_left_out() -> None:
    x = torch.ones(2, 3)
    program = onnx_program(Whole().eval(), (x,), ["x"], ["y"], ({0: None},), None)
    kinds = [node.op_type for node in program.model.graph]
    assert kinds == ["Relu"]
