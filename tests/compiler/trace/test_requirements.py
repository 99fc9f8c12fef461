from __future__ import annotations

import pytest
import torch
from torch import nn

import sffx
from sffx.compiler.trace.trace import trace
from sffx.errors import InputError
from tests.toys import Chain


def test_a_class_is_no_model():
    with pytest.raises(InputError, match=r"model is a type, not a torch\.nn\.Module"):
        trace(Chain)


def test_a_cut_model_is_not_cut_again():
    with pytest.raises(InputError, match=r"cut already\. Hint: sffx\.extract\(net\)"):
        trace(sffx.transform(Chain(), "layer"))


def in_place(model: nn.Module) -> nn.Module:
    """Return a model that holds one which is compiled in place."""
    model.compile(backend="eager")
    return nn.Sequential(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (
            lambda model: torch.compile(model, backend="eager"),
            r"model is compiled\. Hint: pass the plain one, model\._orig_mod",
        ),
        (
            lambda model: model.compile(backend="eager") or model,
            r"model is compiled in place.*Hint: cut the model before that",
        ),
        (
            in_place,
            r"'0' is compiled in place",
        ),
        (nn.DataParallel, r"wrapped in DataParallel\. Hint: pass model\.module"),
        (
            lambda model: torch.jit.trace(model, torch.zeros(2, 3, 8, 8)),
            r"whose code cannot be traced\. Hint: pass the module",
        ),
        (
            lambda model: nn.Sequential(nn.LazyConv2d(8, 3), model),
            r"'0\.weight' has no shape yet.*Hint: run the model once",
        ),
    ],
)
def test_what_is_wrapped_round_a_model_is_named(wrap, message):
    with pytest.raises(InputError, match=message):
        sffx.transform(wrap(Chain()), example_input=torch.zeros(2, 3, 8, 8))
