from __future__ import annotations

import pytest
import torch
from torch import nn

from sffx.compiler.trace.trace import trace
from tests.toys import Chain, Tokens


def test_integer_inputs_know_how_many_values_there_are():
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Flatten(), nn.Linear(8 * 16, 3))
    (record,) = trace(model).inputs
    assert (record.name, record.shape, record.dtype, record.high) == ("input", (16,), "int64", 50)


def test_float_inputs_have_no_number_of_values():
    (record,) = trace(Chain()).inputs
    assert (record.shape, record.dtype, record.high) == ((3, 8, 8), "float32", 0)


@pytest.mark.parametrize(("dtype", "marks"), [(torch.int64, True), (torch.float32, False)])
def test_an_attention_mask_marks_tokens_unless_it_may_be_added_to_scores(dtype, marks):
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    mask = torch.ones(1, 5, dtype=dtype)
    records = trace(Tokens(), {"input_ids": tokens, "attention_mask": mask}).inputs
    assert [(each.name, each.high, each.marks_tokens) for each in records] == [
        ("input_ids", 20, False),
        ("attention_mask", 0 if dtype.is_floating_point else 2, marks),
    ]
