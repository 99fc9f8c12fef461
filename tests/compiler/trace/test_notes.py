from __future__ import annotations

import datetime as dt
import os
from time import perf_counter
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from sffx.compiler.trace.trace import trace
from tests.toys import Chain, Residual


def test_hooks_of_the_model_itself_are_named():
    model = Chain()
    assert trace(model).notes == ()
    model.register_forward_hook(lambda *_: None)
    (note,) = trace(model).notes
    assert note.startswith("the hooks of the model itself are no part of the cut model")


def test_backward_hooks_of_layers_are_named():
    model = Chain()
    name, layer = next((n, m) for n, m in model.named_modules() if n and not any(m.children()))
    layer.register_forward_hook(lambda *_: None)
    assert trace(model).notes == ()
    layer.register_full_backward_hook(lambda *_: None)
    (note,) = trace(model).notes
    assert f"a backward hook of {name} is given None" in note


def test_only_the_outermost_unused_modules_are_named():
    model = Residual()
    model.block1.spare = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    (note,) = trace(model).notes
    assert note == "left out, since the logits do not depend on them: block1.spare"


def _now(m: nn.Module) -> float:
    return dt.datetime.now().timestamp()


def _of_a_file(m: nn.Module) -> float:
    with open(os.devnull) as file:
        return float(file.read() or 2)


def _imported_inside(m: nn.Module) -> float:
    import time

    return time.monotonic()


def _with_names_alone(m: nn.Module) -> float:
    """The words are here, and what they stand for is not read."""
    time = m.inner
    return float(time.in_features + len(os.path.join("now", "environ")))


def _with_attributes(m: nn.Module) -> float:
    """The words are names of attributes, and others than those of the clock and of files."""
    return float(m.time.time + m.input.open + m.environ.getenv)


def main() -> float:
    """A script may have a function with the name of a layer, and the clock in it."""
    return perf_counter()


def _with_an_attribute_named_as_a_function(m: nn.Module) -> float:
    return float(m.main.in_features)


@pytest.mark.parametrize(
    ("read", "named"),
    [
        (lambda m: perf_counter(), "time.perf_counter"),
        (lambda m: float(os.environ.get("SCALE", 2)), "os.environ"),
        (lambda m: float(os.getenv("SCALE", 2)), "os.getenv"),
        (_now, "datetime.now"),
        (_of_a_file, "open"),
        (_imported_inside, "time.monotonic"),
        (_with_names_alone, ""),
        (_with_attributes, ""),
        (_with_an_attribute_named_as_a_function, ""),
        (lambda m: main(), "time.perf_counter"),
    ],
)
def test_what_the_forward_reads_of_its_surroundings_is_named(read, named):
    class Reads(nn.Module):
        read_number = read

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
            self.main = self.inner
            self.time = self.input = self.environ = SimpleNamespace(time=1, open=1, getenv=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.inner(x) * self.read_number())

    notes = trace(Reads(), torch.zeros(2, 6)).notes
    assert len(notes) == bool(named)
    assert all(note.startswith("the forward names") and named in note for note in notes)


class _Padded(nn.Module):
    def __init__(self, *, nests: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 4)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nests)

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        x = self.encoder(self.embed(ids), src_key_padding_mask=keep == 0)
        return self.head(x.mean(1))


@pytest.mark.parametrize("nests", [True, False])
def test_nested_tensors_of_an_encoder_are_noted(nests):
    ids = torch.ones(2, 7, dtype=torch.int64)
    traced = trace(_Padded(nests=nests), {"ids": ids, "keep": ids})
    assert any("nested tensors" in note for note in traced.notes) == nests
