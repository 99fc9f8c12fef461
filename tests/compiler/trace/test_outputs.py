from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
from sffx.compiler.trace.trace import trace
from sffx.errors import TraceError


class _Auxiliary(nn.Module):
    """Returns a second output in train mode, as GoogLeNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aux, self.head = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = F.relu(self.body(x))
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


def test_auxiliary_outputs_are_left_out_and_that_is_said():
    traced = trace(_Auxiliary())
    assert "aux" not in {node.target for node in traced.graph.nodes}
    assert traced.notes == ("left out, since the logits do not depend on them: aux",)


def test_an_output_that_is_no_logits_is_refused():
    message = (
        r"returns a tensor of shape \(B, 4, 8, 8\), but logits are of shape \(B, J\)\. "
        r"Hint: sffx cuts classifiers"
    )
    with pytest.raises(TraceError, match=message):
        trace(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), torch.zeros(1, 3, 8, 8))


class _TwoOutputs(nn.Module):
    def __init__(self, as_mapping: bool) -> None:
        super().__init__()
        self.as_mapping = as_mapping
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        embedding = self.b(torch.relu(self.a(x)))
        logits = self.c(embedding)
        if self.as_mapping:
            return {"embedding": embedding, "scores": logits}
        return embedding, logits


@pytest.mark.parametrize("as_mapping", [False, True])
def test_the_logits_among_several_outputs_are_told_by_the_number_of_classes(as_mapping):
    model, x = _TwoOutputs(as_mapping), torch.randn(4, 6)
    message = r"could be its logits, of shapes \(B, 5\), \(B, 3\)\. Hint: pass num_classes"
    with pytest.raises(TraceError, match=message):
        sffx.plan(model, "layer", x)
    with pytest.raises(TraceError, match=r"none with num_classes=4"):
        sffx.plan(model, "layer", x, num_classes=4)
    assert sffx.plan(model, "layer", x, num_classes=3).num_classes == 3
