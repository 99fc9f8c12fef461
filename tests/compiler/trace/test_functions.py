"""Functions and methods that cannot be traced: the graph calls them, and they run for real."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
import tests.compiler.trace
from sffx.errors import TraceError
from tests.compiler.trace import wrapped_functions
from tests.compiler.trace.oracle import cut_without_norms, leaf_names


def masked_rows(shape: tuple[int, int], share: float) -> np.ndarray:
    """Draw which entries are masked, as SpecAugment does: sample by sample, with NumPy."""
    mask = np.zeros(shape, dtype=bool)
    for row in mask:
        row[np.random.choice(len(row), int(share * len(row)), replace=False)] = True
    return mask


def scaled_by_largest(x: Tensor) -> Tensor:
    """Read a value of a tensor."""
    return x / x.abs().max().item()


def longest(x: Tensor) -> int:
    return int(x.abs().max().item()) + 1


class _Calls(nn.Module):
    """A row of layers, with other code between."""

    def __init__(self, code: Any) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.last = nn.Linear(6, 4)
        self.mask = nn.Parameter(torch.randn(6))
        self.code = code
        self.share = 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = getattr(self, self.code)(x)
        x = self.second(x).relu()
        return self.last(x)

    def augment(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = masked_rows((x.shape[0], x.shape[1]), share=self.share)
        x[torch.tensor(mask, dtype=torch.bool)] = self.mask[0].to(x.dtype)
        return x

    def scale(self, x: Tensor) -> Tensor:
        return scaled_by_largest(x)

    def own_draw(self, x: Tensor) -> Tensor:
        """Draw in the method itself."""
        return x * (random.choice([1.0, 2.0]) + self.share) if self.training else x

    def length(self, x: Tensor) -> Tensor:
        return x * sum(1 for _ in range(longest(x)))


@pytest.mark.parametrize(("code", "name"), [("augment", "masked_rows"), ("scale", None)])
def test_a_function_that_cannot_be_traced_runs_for_real(code, name):
    model = _Calls(code)
    net = sffx.transform(model, "layer", torch.zeros(2, 6), check=False)
    assert not leaf_names(net)
    assert len(net.plan) == 2
    assert sffx.check(model, net, torch.randn(5, 6), raises=False).difference is None
    if name:
        (note,) = net.plan.notes
        assert note.startswith(f"{name} runs as a whole")


def test_a_method_that_cannot_be_traced_runs_for_real():
    model = _Calls("own_draw")
    net = sffx.transform(model, "layer", torch.zeros(2, 6), check=False)
    assert not leaf_names(net)
    assert sffx.check(model, net, torch.randn(5, 6), raises=False).difference is None


class _CallsWrapped(nn.Module):
    """Calls functions of a module by their names there, between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.shift, self.scale = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = wrapped_functions.shifted(self.first(x), self.shift).relu()
        x = tests.compiler.trace.wrapped_functions.scaled(self.second(x), self.scale).relu()
        return self.last(wrapped_functions.scaled(x, self.scale))


def test_functions_of_one_decorator_run_for_real_each_by_itself():
    model = _CallsWrapped()
    net = sffx.transform(model, "layer", torch.zeros(2, 6), check=False)
    assert not leaf_names(net)
    notes = [note.partition(" runs as a whole")[0] for note in net.plan.notes]
    assert notes[:2] == ["shifted", "scaled"]
    assert sffx.check(model, net, torch.randn(5, 6)).difference is None


def test_draws_are_new_in_each_call():
    torch.manual_seed(0)  # with other weights all units may be zero
    model = nn.Sequential(_Calls("own_draw"), nn.Linear(4, 4))
    net = cut_without_norms(model).train()
    x = torch.randn(5, 6)
    found = {float(net(x)[-1].detach().sum()) for _ in range(20)}
    assert len(found) == 2


def test_a_net_with_such_functions_is_saved_and_copied(tmp_path):
    model = _Calls("augment")
    net = sffx.transform(model, "layer", torch.zeros(2, 6), check=False).eval()
    x = torch.randn(3, 6)
    torch.save(net, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=False)
    assert torch.equal(loaded(x), net(x))
    assert torch.equal(sffx.extract(net).eval()(x), model.eval()(x))


def test_a_number_that_a_function_reads_from_a_tensor_is_not_frozen():
    """The function around it, or the module, reads it in each call."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), _Calls("length"), nn.ReLU(), nn.Linear(4, 4))
    net = sffx.transform(model, "layer", torch.zeros(2, 6), check=False)
    assert sffx.check(model, net, torch.randn(5, 6) * 10, raises=False).difference is None


class _RarelyUsesALayer(nn.Module):
    """Has a method that uses a child in one branch, which a trace may not see."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.maybe(self.first(x)))

    def maybe(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() < -1e9 else x


def test_a_method_that_uses_a_layer_in_a_branch_is_not_called_as_a_function():
    with pytest.raises(TraceError, match=r"branch depends on the values of a tensor"):
        cut_without_norms(_RarelyUsesALayer())


def test_a_method_without_layers_is_noted_by_its_name():
    class Root(_RarelyUsesALayer):
        maybe = lambda self, x: x * 2 if x.sum() > 0 else x  # noqa: E731

    net = cut_without_norms(Root(), "layer")
    assert any(note.startswith("maybe runs as a whole") for note in net.plan.notes)


class _Reversed(torch.autograd.Function):
    """Turns the gradient round, as in domain adaptation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return -ctx.scale * gradient, None


_reversed = _Reversed.apply


class _Clamped(torch.autograd.Function):
    """Writes on what it is given; all gradients pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.clamp_(-1, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _ScaledAndShifted(torch.autograd.Function):
    """Takes a parameter, and returns two values with gradients of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        return x * weight, x + weight

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return 2 * first * weight + second, (3 * first * x + second).sum(0)


class _OwnCode(nn.Module):
    """Three layers; between the first two, code of the model's own forward: on (B, 6)."""

    of_class = _Reversed.apply

    def __init__(self, code: Any) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.weight = nn.Parameter(torch.randn(6))
        self.array = np.array([3.0, 1.0, 0.0, 2.0, 5.0, 4.0])
        self.code, self.reverse = code, _Reversed.apply

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.code(self, self.a(x))).relu())


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: _Reversed.apply(x, 0.5),
        lambda m, x: _reversed(x, 0.5),
        lambda m, x: m.reverse(x, 0.5),
        lambda m, x: m.of_class(x, 0.5),
        lambda m, x: _Clamped.apply(2 * x),
        lambda m, x: sum(_ScaledAndShifted.apply(x, m.weight)),
    ],
)
def test_an_autograd_function_in_the_models_own_forward_keeps_its_gradients(code):
    torch.manual_seed(0)
    model = _OwnCode(code)
    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    # The cut lies before the function, so the classifier's gradients pass through it.
    net = sffx.transform(model, ["a"], x, norm="none", check=True)
    assert not leaf_names(net)
    sffx.local_loss(net, x, y).backward()
    hidden = model.a(x).detach()
    F.cross_entropy(model.head(model.b(code(model, hidden)).relu()), y).backward()
    for name, parameter in net.get_submodule("classifier").named_parameters():
        assert torch.allclose(parameter.grad, model.get_parameter(name).grad), name


class _ReversedLayer(nn.Module):
    """A layer that holds the autograd function by a name of its own, as spiking layers do."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(6, 6), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x), 0.5)


def test_a_layer_may_hold_an_autograd_function_by_any_name():
    torch.manual_seed(0)
    layers = [_ReversedLayer(_Reversed.apply) for _ in range(2)]
    model = nn.Sequential(*layers, nn.Linear(6, 3))
    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    net = sffx.transform(model, "layer", x, norm="none", check=True)
    assert len(net.plan) == 2
    sffx.local_loss(net, x, y).backward()
    hidden = model[0](x).detach()
    F.cross_entropy(net.head_1(model[1](hidden)), y).backward()
    assert torch.allclose(
        net.block_1.get_submodule("1").linear.weight.grad, layers[1].linear.weight.grad
    )


def test_the_own_gradient_of_an_autograd_function_trains_the_block_before_it():
    torch.manual_seed(0)
    model = _OwnCode(lambda m, x: _Reversed.apply(x, 0.5))
    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    net = sffx.transform(model, ["function_0"], x, norm="none")
    sffx.local_loss(net, x, y).backward()
    goodness = net.head_0(_Reversed.apply(model.a(x), 0.5))
    (gradient,) = torch.autograd.grad(F.cross_entropy(goodness, y), [model.a.weight])
    assert torch.allclose(net.block_0.a.weight.grad, gradient)


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: x + x.new_tensor(m.array.astype(np.float32)),
        lambda m, x: x + torch.tensor(m.array, dtype=x.dtype),
        lambda m, x: x * torch.as_tensor(m.array, device=x.device).float(),
        lambda m, x: x + torch.as_tensor(m.array.astype(np.float32), device=x.device).mul_(2),
        lambda m, x: x[:, m.array.argsort()],
    ],
)
def test_an_array_of_the_model_may_be_an_argument(code):
    torch.manual_seed(0)
    model = _OwnCode(code).eval()
    net = cut_without_norms(model, ["a"], torch.zeros(2, 6))
    assert not leaf_names(net)
    back = sffx.extract(net)
    for x in (torch.randn(3, 6), torch.randn(1, 6)):
        assert torch.equal(net(x), model(x))
        assert torch.equal(back(x), model(x))


def _by_both(m: Any, x: Tensor) -> Tensor:
    return _Reversed.apply(x + torch.tensor(m.array, dtype=x.dtype), 0.5)


def test_a_net_with_an_autograd_function_and_an_array_can_be_pickled():
    net = cut_without_norms(_OwnCode(_by_both).eval(), ["a"], torch.zeros(2, 6))
    x = torch.randn(3, 6)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))


def _kept(bank: Tensor, place: Tensor, x: Tensor) -> None:
    bank[int(place)] = x.detach()[0]


class _Bank(nn.Module):
    """Writes into a buffer at a place that another one holds, by a function of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("bank", torch.zeros(4, 6))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        _kept(self.bank, self.place, x)
        return self.head(x + self.bank.mean(0))


class _ReadsValue(_Bank):
    """Reads a value in its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x) * float(self.place))


def test_a_hint_does_not_send_code_where_it_is_already():
    with pytest.raises(sffx.TraceError, match="submodule") as raised:
        sffx.plan(_Bank(), "layer", torch.zeros(2, 6))
    assert "function of the file" not in str(raised.value)
    with pytest.raises(sffx.TraceError, match="function of the file"):
        sffx.plan(_ReadsValue(), "layer", torch.zeros(2, 6))
