from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sffx
from sffx.compiler.verify import verify
from sffx.errors import VerifyError
from tests.toys import Chain, Residual


def test_transform_verifies_the_model_that_it_returns(monkeypatch):
    verified = []
    monkeypatch.setattr("sffx.api.verify", lambda net, batch: verified.append(net))
    net = sffx.transform(Residual())
    assert len(verified) == 1
    assert verified[0] is net


def test_a_pass_that_does_nothing_is_found_by_transform(monkeypatch):
    layers = [nn.Linear(6, 6), nn.Hardtanh(inplace=True), nn.Linear(6, 6), nn.Linear(6, 4)]
    model = nn.Sequential(*layers)
    sffx.transform(model, ["_0"], norm="none")
    monkeypatch.setattr("sffx.api.keep_foreign_values", lambda net: None)
    message = "'block_0' crosses a cut or feeds a head, and is written in place after that"
    with pytest.raises(VerifyError, match=message):
        sffx.transform(model, ["_0"], norm="none")


def test_a_missing_detach_is_found():
    net = sffx.transform(Residual())
    detach = next(node for node in net.graph.nodes if node.name == "detached_0")
    detach.replace_all_uses_with(detach.args[0])
    net.graph.erase_node(detach)
    net.recompile()
    message = (
        r"parameter 'block_0\.stem\.0\.weight' belongs to block_0 "
        "but has gradient from the loss of block_1"
    )
    with pytest.raises(VerifyError, match=message):
        verify(net)


def test_a_write_behind_a_cut_is_found():
    net = sffx.transform(Residual(), norm="none")
    detach = next(node for node in net.graph.nodes if node.name == "detached_0")
    with net.graph.inserting_after(detach):
        net.graph.call_method("mul_", (detach, 2))
    net.recompile()
    message = (
        "the value 'block_0' crosses a cut or feeds a head, and is written in place after that"
    )
    with pytest.raises(VerifyError, match=message):
        verify(net)


def test_scores_of_another_shape_are_found():
    net = sffx.transform(Chain(), example_input=torch.zeros(1, 3, 8, 8))
    net.head_1 = torch.nn.Flatten()
    with pytest.raises(
        VerifyError, match=r"head_1 returns shape \(60, 128\), not \(B, J\) = \(60, 4\)"
    ):
        verify(net)


class OtherInEvalMode(nn.Module):
    """A linear head that gives logits in train mode, and another form of them in eval mode."""

    def __init__(self, channels: int, num_classes: int, form: Callable[[torch.Tensor], Any]):
        super().__init__()
        self.linear = nn.Linear(channels, num_classes)
        self.form = form

    def forward(self, y: torch.Tensor) -> Any:
        logits = self.linear(y.mean((2, 3)))
        return logits if self.training else self.form(logits)


@pytest.mark.parametrize(
    ("form", "returned"),
    [
        (lambda logits: (logits.softmax(1), logits), "a tuple, not a tensor"),
        (lambda logits: {"logits": logits}, "a dict, not a tensor"),
        (lambda logits: None, "a NoneType, not a tensor"),
        (lambda logits: logits.detach().numpy(), "a ndarray, not a tensor"),
        (lambda logits: logits.argmax(1, keepdim=True), "torch.int64, not floats"),
        (lambda logits: logits[:, 1:], r"shape \(60, 3\), not \(B, J\) = \(60, 4\)"),
    ],
)
def test_a_head_that_answers_otherwise_in_eval_mode_is_refused(form, returned):
    def make(block: sffx.Block, num_classes: int) -> nn.Module:
        return OtherInEvalMode(block.channels, num_classes, form)

    with pytest.raises(VerifyError, match=f"in eval mode head_0 returns {returned}"):
        sffx.transform(Chain(), example_input=torch.zeros(1, 3, 8, 8), goodness=make)


def test_a_norm_that_answers_otherwise_in_eval_mode_is_refused():
    class Pooled(nn.Module):
        def forward(self, y: torch.Tensor) -> torch.Tensor:
            return y if self.training else y.mean((2, 3), keepdim=True)

    message = "in eval mode norm_0 returns shape .* for a value of shape"
    with pytest.raises(VerifyError, match=message):
        sffx.transform(Chain(), example_input=torch.zeros(1, 3, 8, 8), norm=lambda block: Pooled())


def test_verification_touches_neither_parameters_nor_buffers_nor_the_generator():
    net = sffx.transform(Residual())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    verify(net)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_time_of_verification_does_not_grow_with_the_batch(monkeypatch):
    monkeypatch.setattr("sffx.kernels.batch_slices._SMALL", 8)  # many slices
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4)]
    net = sffx.transform(nn.Sequential(*layers), ["_2"])
    assert "recomputed" in str(net.block_0)
    counts = []
    for batch in (60, 600):
        operators = Operators()
        with operators:
            verify(net, batch)
        counts.append(operators.count)
    assert counts[0] == counts[1]


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))
