"""Functions without a name: those that a forward maps are pickled, and others refused by name."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
from sffx.errors import InputError


class Net(nn.Module):
    """Three layers, and between them what a test wants."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.between(self.a(x).relu())))


class MapsLambda(Net):
    def between(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: self.a.bias * row)(x)


class MapsNested(Net):
    def between(self, x: Tensor) -> Tensor:
        size = x.shape[1]

        def scaled(row: Tensor, by: float = 2.0) -> Tensor:
            times = lambda value: value * by  # noqa: E731
            return times(row) / size

        return torch.vmap(scaled)(x)


class MapsPartial(Net):
    def between(self, x: Tensor) -> Tensor:
        return torch.vmap(functools.partial(lambda row, by: row * by, by=3.0))(x)


class Differentiates(Net):
    def between(self, x: Tensor) -> Tensor:
        return torch.func.grad(lambda value: (self.a.weight.sum() * value**2).sum())(x)


thrice = lambda row: row * 3  # noqa: E731


class MapsNamedLambda(Net):
    def between(self, x: Tensor) -> Tensor:
        return torch.vmap(thrice)(x)


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "kind", [MapsLambda, MapsNested, MapsPartial, Differentiates, MapsNamedLambda]
)
def test_what_a_forward_maps_is_pickled(kind):
    model = kind()
    net = sffx.transform(model, "layer", X, norm="none", check=False)
    for twin in (net, copy.deepcopy(net)):
        again = pickle.loads(pickle.dumps(twin))
        assert torch.equal(again.train()(X)[-1], model(X))
        # Its functions are those of the file, and can be pickled once more.
        assert torch.equal(pickle.loads(pickle.dumps(again)).train()(X)[-1], model(X))


def test_a_function_that_has_changed_since_is_refused(monkeypatch):
    text = pickle.dumps(sffx.transform(MapsLambda(), "layer", X, check=False))
    monkeypatch.setattr(MapsLambda, "between", Net.between)
    with pytest.raises(InputError, match=r"MapsLambda.between .* is another one"):
        pickle.loads(text)


def _with(name: str, value) -> nn.Module:
    model = Net()
    setattr(model, name, value)
    return model


def _hooked() -> nn.Module:
    model = Net()
    model.b.register_forward_hook(lambda module, given, returned: returned * 2)
    return model


def _of_local_class() -> nn.Module:
    class Local(nn.Linear):
        """A class without a name to import it by."""

    return _with("b", Local(8, 8))


NAMELESS = {
    "an attribute": (lambda: _with("scale", lambda x: x), "'scale' of the model Net"),
    "a list": (lambda: _with("all", [1, {"f": lambda x: x}]), "'all' of the model Net"),
    "a partial": (
        lambda: _with("f", functools.partial(lambda x, y: x, y=1)),
        "'f' of the model Net",
    ),
    "a layer": (
        lambda: _with("b", nn.TransformerEncoderLayer(8, 2, 8, activation=lambda x: x.relu())),
        "'activation' of the module 'b'",
    ),
    "a hook": (_hooked, "'_forward_hooks' of the module 'b'"),
    "a class": (_of_local_class, "the module 'b' is of the class"),
}


@pytest.mark.parametrize("case", NAMELESS)
def test_what_has_no_name_is_named(case):
    make, place = NAMELESS[case]
    net = sffx.transform(make(), "layer", X, check=False)
    for write in (pickle.dumps, lambda value: torch.save(value, io.BytesIO())):
        with pytest.raises(InputError, match=rf"{place} .*<locals>.* Hint: define .* at the top"):
            write(net)
    copy.deepcopy(net)


def doubled(layer: nn.Linear, x: Tensor) -> Tensor:
    return 2 * F.linear(x, layer.weight, layer.bias)


def _bound() -> nn.Module:
    model = Net()
    model.b.forward = types.MethodType(doubled, model.b)
    return model


def _parametrized() -> nn.Module:
    model = Net()
    nn.utils.parametrizations.weight_norm(model.b)
    return model


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_bound, "'forward' of the module 'b' holds .*doubled as a method of a Linear, whose"),
        (_parametrized, "because of the module 'b'.*: Serialization of parametrized modules"),
        (lambda: _with("b", torch.jit.script(nn.Linear(8, 8))), "the module 'b'.* is a script"),
    ],
)
def test_what_torch_or_pickle_would_refuse_itself_is_named(make, reason):
    net = sffx.transform(make(), "layer", X, check=False)
    for write in (pickle.dumps, lambda value: torch.save(value, io.BytesIO())):
        with pytest.raises(InputError, match=rf"{reason}.*Hint: .*sffx\.save_checkpoint"):
            write(net)
    copy.deepcopy(net)


def test_a_module_that_leaves_out_its_function_is_pickled():
    net = sffx.transform(_with("b", LeavesOut()), "layer", X, check=False)
    assert pickle.loads(pickle.dumps(net)).origin.model.b.function is None


class LeavesOut(nn.Linear):
    """Drops its function when it is pickled."""

    def __init__(self):
        super().__init__(8, 8)
        self.function = lambda x: x

    def __getstate__(self):
        return {**vars(self), "function": None}
