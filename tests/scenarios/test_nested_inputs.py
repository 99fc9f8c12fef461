"""Inputs in lists, tuples, mappings and dataclasses, and constants among them."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import sffx
from sffx.draw.graph import block_graph
from sffx.errors import InputError
from sffx.inputs import bind
from tests.compiler.trace.oracle import cut_without_norms

Pair = namedtuple("Pair", ["left", "right"])


@dataclasses.dataclass(frozen=True)
class Record:
    slow: Tensor
    fast: Tensor
    scale: float = 2.0


class _Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slow, self.fast = nn.Linear(6, 8), nn.Linear(5, 8)
        self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def scores(self, slow: Tensor, fast: Tensor, scale: float = 1.0) -> Tensor:
        x = (self.slow(slow) + scale * self.fast(fast)).relu()
        return self.head(self.hidden(x).relu())


class _List(_Base):
    def forward(self, x):
        return self.scores(x[0], x[1])


class _Nested(_Base):
    def forward(self, slow, others, scale=1.0):
        for name, value in others.items():
            if name == "fast":
                return self.scores(slow, value[0]["deep"], scale)
        raise KeyError


class _Star(_Base):
    def forward(self, *xs, scale=1.0):
        return self.scores(xs[0][0] + xs[1], xs[0][1], scale)


class _Keywords(_Base):
    def forward(self, **batch):
        return self.scores(batch["slow"], batch["fast"][0])


class _Pair(_Base):
    def forward(self, x):
        return self.scores(x.left, x.right)


class _Record(_Base):
    def forward(self, x, mask=None):
        assert mask is None
        return self.scores(x.slow, x.fast, x.scale)


class _Mapping(_Base):
    def forward(self, batch):
        return self.scores(batch["slow"], batch["fast"], 1.0 if batch.get("flag") else 3.0)


# The model, its arguments of slow and fast, and the names of the inputs.
CASES = {
    "list": (_List, lambda s, f: ([s, f],), ["x_0", "x_1"]),
    "tuple": (_List, lambda s, f: ((s, f),), ["x_0", "x_1"]),
    "nested": (
        _Nested,
        lambda s, f: (s, {"name": "a", "fast": [{"deep": f}]}, 2.0),
        ["slow", "others_fast_0_deep"],
    ),
    "star": (_Star, lambda s, f: ((s, f), s), ["xs_0_0", "xs_0_1", "xs_1"]),
    "keywords": (_Keywords, lambda s, f: {"slow": s, "fast": (f,)}, ["slow", "fast_0"]),
    "named tuple": (_Pair, lambda s, f: (Pair(s, f),), ["x_left", "x_right"]),
    "dataclass": (_Record, lambda s, f: (Record(s, f), None), ["x_slow", "x_fast"]),
    "mapping": (
        _Mapping,
        lambda s, f: (OrderedDict(slow=s, fast=f, flag=False),),
        ["batch_slow", "batch_fast"],
    ),
}


def _called(model: nn.Module, x: Any) -> Tensor:
    return model(**x) if isinstance(x, dict) else model(*x)


@pytest.fixture(params=CASES)
def case(request):
    kind, make, names = CASES[request.param]
    torch.manual_seed(0)
    model = kind().eval()
    net = cut_without_norms(model, example=make(torch.randn(2, 6), torch.randn(2, 5)))
    return model, net, make, names


def test_a_nested_call_is_that_of_the_model(case):
    model, net, make, names = case
    assert [each.name for each in net.plan.inputs] == names
    x = make(torch.randn(7, 6), torch.randn(7, 5))
    expected = _called(model, x)
    for each in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net)), sffx.extract(net)):
        assert torch.equal(_called(each, x), expected)
    # The inputs alone, by position and by name.
    tensors = tuple(bind(net.plan, x).values())
    assert torch.equal(net(*tensors), expected)
    assert torch.equal(net(**dict(zip(names, tensors, strict=True))), expected)
    assert sffx.check(model, net).passed


def test_a_nested_batch_is_trained_on_and_evaluated(case):
    _, net, make, _ = case
    x, y = make(torch.randn(7, 6), torch.randn(7, 5)), torch.randint(0, 4, (7,))
    flat = tuple(bind(net.plan, x).values())
    net.train()
    loss = sffx.local_loss(net, x, y)
    assert torch.equal(loss, sffx.local_loss(net, flat, y))
    assert torch.equal(loss, sffx.sff_loss(_called(net, x), y))
    optimizer = torch.optim.SGD(sffx.parameter_groups(net, lr=0.1))
    sffx.local_step(net, x, y, optimizer)
    evaluation = sffx.evaluate(net, [(x, y)])
    assert evaluation.samples == 7
    assert str(evaluation) == str(sffx.evaluate(net, [(flat, y)]))
    exits = sffx.EarlyExit(net, threshold=2.0)
    assert torch.equal(exits(x).scores, exits(flat).scores)
    assert sffx.footprint(net, 8).peak > 0
    graph = block_graph(net.plan).source
    assert all(f"input_{each.name}" in graph for each in net.plan.inputs)


@pytest.mark.parametrize("name", ["list", "tuple", "nested", "star", "keywords"])
def test_a_nested_cut_is_saved_and_loaded(name, tmp_path):
    """A record holds lists, tuples and dictionaries."""
    kind, make, _ = CASES[name]
    model = kind().eval()
    net = cut_without_norms(model, example=make(torch.randn(2, 6), _fast(2)))
    sffx.save_checkpoint(tmp_path / "net.pt", net)
    loaded = sffx.load_checkpoint(tmp_path / "net.pt").net(type(model)())
    x = make(torch.randn(7, 6), torch.randn(7, 5))
    assert loaded.plan.record() == net.plan.record()
    loaded.readout.mode = "classifier"
    assert torch.equal(_called(loaded.eval(), x), _called(net.eval(), x))


def test_batches_of_a_data_loader_fit():
    """Its collate function makes lists of tuples, and leaves dictionaries."""
    net = cut_without_norms(_Nested(), example=CASES["nested"][1](torch.zeros(2, 6), _fast(2)))
    samples = []
    for label in range(4):
        x = (torch.randn(6), {"name": "a", "fast": [{"deep": torch.randn(5)}]})
        samples.append(((x[0], {"fast": x[1]["fast"]}), label))
    with pytest.raises(InputError, match="others is a dict of 'fast', but the model was cut for"):
        sffx.evaluate(net, DataLoader(samples, batch_size=2))
    pairs = [((torch.randn(6), torch.randn(5)), label) for label in range(4)]
    net = cut_without_norms(_List(), example=([torch.zeros(2, 6), _fast(2)],))
    assert sffx.evaluate(net, DataLoader(pairs, batch_size=2)).samples == 4


def _fast(samples: int) -> Tensor:
    return torch.randn(samples, 5)


def test_the_files_take_the_inputs_by_their_paths(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    _, make, names = CASES["nested"]
    net = cut_without_norms(_Nested(), example=make(torch.zeros(2, 6), _fast(2)))
    session = onnxruntime.InferenceSession(sffx.export_onnx(net, tmp_path / "net.onnx"))
    assert [each.name for each in session.get_inputs()] == names
    x = make(torch.randn(3, 6), _fast(3))
    program = torch.export.load(sffx.export_program(net, tmp_path / "net.pt2")).module()
    torch.testing.assert_close(program(*bind(net.plan, x).values()), net.eval()(*x))
    sffx.export_early_exit(net, tmp_path / "exit")
    loaded = sffx.EarlyExit.load(tmp_path / "exit")
    torch.testing.assert_close(loaded.cumulative(x), sffx.EarlyExit(net).cumulative(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: (*x[:2], 3.0), r"scale is 3.0, but the model was cut for 2.0"),
        (lambda x: (x[0], {**x[1], "name": "b"}, 2.0), r"others\['name'\] is 'b', but"),
        (lambda x: (x[0], {"fast": x[1]["fast"]}, 2.0), "others is a dict of 'fast', but"),
        (lambda x: (x[0], {**x[1], "fast": x[1]["fast"] * 2}, 2.0), r"others\['fast'\] is a list"),
        (lambda x: (x[0], {**x[1], "fast": [{"deep": 1}]}, 2.0), "is a int, not a tensor"),
        (lambda x: x[:1], "x lacks the argument 'others'"),
        (lambda x: (*x, 1), "x holds 4 arguments, but the model was cut for 3"),
        (lambda x: (*x[:2], x[0]), "scale is a Tensor, but the model was cut for 2.0"),
    ],
)
def test_what_differs_from_the_example_is_refused_by_its_path(change, message):
    make = CASES["nested"][1]
    net = cut_without_norms(_Nested(), example=make(torch.zeros(2, 6), _fast(2)))
    x, y = change(make(torch.randn(3, 6), _fast(3))), torch.zeros(3, dtype=torch.int64)
    for use in (lambda: net(*x), lambda: sffx.local_loss(net.train(), x, y)):
        with pytest.raises(InputError, match=message):
            use()


def test_constants_are_noted_and_may_be_left_out():
    make = CASES["nested"][1]
    net = cut_without_norms(_Nested(), example=make(torch.zeros(2, 6), _fast(2)))
    (note,) = net.plan.notes
    assert note == "settled as in the example: others['name'] is 'a', scale is 2.0"
    x = make(torch.randn(3, 6), _fast(3))
    assert torch.equal(net.eval()(*x[:2]), net(*x))
