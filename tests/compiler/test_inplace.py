"""No block writes in place on a value of another one; before and after as text, then values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import sffx
from sffx.compiler.inplace import keep_foreign_values
from sffx.errors import CutError
from tests.compiler.passes import rewritten, text


class Writes(nn.Module):
    """A layer, an operation that may write on its output, and another layer."""

    def __init__(self, operation: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)
        self.act = nn.ReLU(inplace=True)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        x = self.operation(self, self.first(x))
        return self.head(torch.tanh(self.second(x)))


def add_in_place(model: nn.Module, x: Tensor) -> Tensor:
    x += 1
    return x


def flattened(model: nn.Module, x: Tensor) -> Tensor:
    return x.flatten(1).relu_()


@fx.wrap
def leaky(x: Tensor, inplace: bool = False, slope: float = 0.01) -> Tensor:
    return F.leaky_relu_(x, slope) if inplace else F.leaky_relu(x, slope)


# name: the operation, the block behind the cut before the pass, and after it.
FORMS = {
    "module": (
        lambda model, x: model.act(x),
        "act = ReLU[inplace](first)",
        "act = ReLU(first)",
    ),
    "function": (
        lambda model, x: F.relu(x, inplace=True),
        "relu = relu(first, inplace=True)",
        "relu = relu(first, inplace=False)",
    ),
    "function by position": (
        lambda model, x: F.leaky_relu(x, 0.1, True),
        "leaky_relu = leaky_relu(first, negative_slope=0.1, inplace=True)",
        "leaky_relu = leaky_relu(first, negative_slope=0.1, inplace=False)",
    ),
    "wrapped function with another argument behind": (
        lambda model, x: leaky(x, True, 0.5),
        "leaky = leaky(first, True, 0.5)",
        "leaky = leaky(first, False, 0.5)",
    ),
    "operator": (
        add_in_place,
        "add = iadd(first, 1)",
        "add = add(first, 1)",
    ),
    "torch function": (
        lambda model, x: torch.relu_(x),
        "relu_ = relu_(first)",
        "relu_ = relu(first)",
    ),
    "method": (
        lambda model, x: x.relu_(),
        "relu_ = Tensor.relu_(first)",
        "relu_ = Tensor.relu(first)",
    ),
    "view": (
        lambda model, x: x.view(-1, 6).mul_(2),
        "view = Tensor.view(first, -1, 6)\nmul_ = Tensor.mul_(view, 2)",
        "view = Tensor.view(first, -1, 6)\nmul_ = Tensor.mul(view, 2)",
    ),
    "maybe a view": (
        flattened,
        "flatten = Tensor.flatten(first, 1)\nrelu_ = Tensor.relu_(flatten)",
        "flatten = Tensor.flatten(first, 1)\nrelu_ = Tensor.relu(flatten)",
    ),
    # These write on values of their own block, and stay.
    "own value": (
        lambda model, x: torch.exp(x).relu_(),
        "exp = exp(first)\nrelu_ = Tensor.relu_(exp)",
        "exp = exp(first)\nrelu_ = Tensor.relu_(exp)",
    ),
    "own sum": (
        lambda model, x: model.act(x + 1),
        "add = add(first, 1)\nact = ReLU[inplace](add)",
        "add = add(first, 1)\nact = ReLU[inplace](add)",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_before_and_after(form):
    operation, before, after = FORMS[form]
    net = rewritten(Writes(operation), ["first"], torch.zeros(2, 6))
    assert operation_of(net.classifier) == before
    keep_foreign_values(net)
    assert operation_of(net.classifier) == after


def operation_of(block: Any) -> str:
    """Return the text of a block up to its layer."""
    lines = []
    for line in text(block).splitlines():
        if line.startswith("second"):
            break
        lines.append(line)
    return "\n".join(lines)


@pytest.mark.parametrize("form", FORMS)
def test_a_block_writes_on_no_value_of_another_and_computes_the_same(form):
    model = Writes(FORMS[form][0]).double()
    net = sffx.transform(model, ["first"], norm="none").train()
    x = torch.randn(7, 6, dtype=torch.float64)
    y = torch.randint(0, 4, (7,))
    seen = []
    net.block_0.register_forward_hook(
        lambda module, args, output: seen.append((output, output.clone()))
    )
    sffx.sff_loss(net(x), y).backward()
    ((output, at_once),) = seen
    assert torch.equal(output, at_once)
    local = copy.deepcopy(net)
    local.zero_grad()
    sffx.local_loss(local, x, y).backward()
    for p, q in zip(net.parameters(), local.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    expected = model.eval()(x)
    net.readout.mode = "classifier"
    assert torch.equal(net.eval()(x), expected)


def test_the_original_keeps_its_in_place_operations():
    net = sffx.transform(Writes(FORMS["module"][0]), ["first"], norm="none")
    assert not any(getattr(module, "inplace", False) for module in net.classifier.modules())
    assert sffx.extract(net).act.inplace


class CallsTwice(nn.Module):
    """One in-place module that is called on a foreign value, and again on one of its own block."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.second(self.act(self.first(x)))))


def test_a_module_called_several_times_is_replaced_in_the_whole_block():
    net = rewritten(CallsTwice(), ["first"], torch.zeros(2, 6))
    keep_foreign_values(net)
    assert text(net.classifier) == (
        "act = ReLU(first)\n"
        "second = Linear(act)\n"
        "act_1 = ReLU(second)\n"
        "head = Linear(act_1)\n"
        "return head"
    )


class CannotKeepItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(torch.nn.init.constant_(x, 1.0))


def test_a_write_with_no_other_form_is_refused_by_name():
    message = r"writes in place on a value that crosses a cut.*has no form that does not"
    with pytest.raises(CutError, match=message):
        sffx.transform(CannotKeepItsInput(), ["first"], norm="none")


class ReadBehind(nn.Module):
    """Writes in place and goes on with the variable that was written to."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.form == "function":
            F.relu_(h)
        elif self.form == "method":
            h.clamp_(min=0)
        else:
            h[:, 1] = 0.5
            h[:, 2] = h[:, 1] + 1
        return self.head(F.relu(self.second(h)))


@pytest.mark.parametrize("form", ["function", "method", "item"])
def test_a_written_variable_that_is_read_again_is_read_as_it_was_written(form):
    model = ReadBehind(form)
    net = sffx.transform(model, ["first"], norm="none").train()
    x = torch.randn(5, 6)
    net.readout.mode = "classifier"
    assert torch.equal(net(x)[-1], model(x))


def first_half(h):
    h[:, :3].relu_()
    return h


def every_second(h):
    h.view(-1)[::2].mul_(0.5)
    return h


def transposed(h):
    h.t()[0].add_(1)
    return h


def of_itself(h):
    h[:, :2].copy_(h[:, 2:4])
    return h.tanh()


def scaled(h):
    half = h.narrow(1, 0, 4)
    half *= 2
    return torch.cat([half, h[:, 2:4]], 1)


def function(h):
    F.silu(h[:, :3], inplace=True)
    return h


class WritesOnViews(nn.Module):
    """Writes on views of the first layer's output, and reads that itself; again if `late`."""

    def __init__(self, write, late=False) -> None:
        super().__init__()
        self.write, self.late = write, late
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.third(self.second(self.write(h)).relu()).relu()
        return self.head(y * (h > 0) if self.late else y)


@pytest.mark.parametrize("cuts", [["first"], ["first", "second"], ["relu"]])
@pytest.mark.parametrize(
    "write", [first_half, every_second, transposed, of_itself, scaled, function]
)
def test_a_value_that_is_written_through_a_view_is_copied_behind_a_cut(write, cuts):
    model = WritesOnViews(write)
    x = torch.randn(5, 6)
    net = sffx.transform(model, cuts, x, norm="none").train()
    expected = model.first(x)
    found = net.get_submodule("block_0")(x)
    if cuts[0] == "first":
        # The head scores what the layer has returned, and nobody writes over it.
        net(x)
        assert torch.equal(found, expected)
    assert torch.equal(net(x)[-1], model(x))
    y = torch.arange(5) % 4
    losses = [sffx.local_loss(net, x, y), sffx.sff_loss(net(x), y)]
    gradients = [torch.autograd.grad(loss, list(net.parameters())) for loss in losses]
    assert losses[0] == losses[1]
    torch.testing.assert_close(gradients[0], gradients[1])


class WritesOnAView(nn.Module):
    """Writes on a view that was made early, and reads the whole afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        half = h[:, :3]
        y = self.second(x).relu()
        half.mul_(2)
        return self.head(self.third(y + h) * h)


# The block that writes has two values of the memory; or a later one reads it by its first name.
@pytest.mark.parametrize(
    "cuts", [[("first", "getitem", "relu")], [("first", "second"), ("first", "mul_", "add")]]
)
def test_a_write_on_a_view_is_refused_where_a_copy_would_not_be_read(cuts):
    with pytest.raises(CutError, match=r"the model reads what it wrote by another name.*Hint: "):
        sffx.transform(WritesOnAView(), cuts, torch.randn(5, 6), norm="none")


@pytest.mark.parametrize("cuts", [["first"], ["first", "second"], ["second"]])
def test_a_later_block_reads_a_value_as_it_was_written_through_a_view(cuts):
    model = WritesOnViews(transposed, late=True)
    x = torch.randn(5, 6)
    net = sffx.transform(model, cuts, x, norm="none").train()
    assert torch.equal(net(x)[-1], model(x))


class WritesOnAFlatCopy(nn.Module):
    """Flattens a value that lies transposed, which copies it, and writes on the copy.

    Of a normalised value the same is a view.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.second = nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).flatten(2).transpose(1, 2)
        x = x * torch.sigmoid(self.second(x))
        return self.head(self.act(x.flatten(1)))


def test_a_write_on_what_was_a_copy_in_the_trace_and_is_a_view_behind_the_norm():
    net = sffx.transform(WritesOnAFlatCopy(), ["mul"], torch.zeros(1, 3, 4, 4)).train()
    assert not any(getattr(module, "inplace", False) for module in net.classifier.modules())
    x = torch.randn(5, 3, 4, 4)
    sffx.sff_loss(net(x), torch.arange(5) % 4).backward()
    assert all(p.grad is not None for p in net.parameters())


class ReluOnDropout(nn.Module):
    """A shortcut around a ReLU that writes, in eval mode only, on what the shortcut carries."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.relu = nn.ReLU(inplace=True)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.relu(self.drop(x))) + x


@pytest.mark.parametrize("norm", ["none", "layer"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_write_in_eval_mode_only_is_the_models(norm: str, depth: int) -> None:
    torch.manual_seed(0)
    parts = [nn.Linear(4, 8), nn.BatchNorm1d(8), *(ReluOnDropout() for _ in range(depth))]
    model = nn.Sequential(*parts, nn.Linear(8, 3))
    net = sffx.transform(model, "residual", torch.zeros(2, 4), norm=norm, check=False)
    report = sffx.check(model, net)
    assert any(name.startswith("eval mode") for name in report.errors)


class WritesInEvalMode(nn.Module):
    """Writes on the first layer's output behind dropout, so in eval mode only, and adds it late."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)
        self.drop = nn.Dropout(0.3)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = F.alpha_dropout(h, 0.3, self.training) if self.form == "alpha" else self.drop(h)
        written = F.relu_(y)
        if self.form != "ignored":
            y = written
        return self.head(torch.tanh(self.second(y)) + h)


@pytest.mark.parametrize("form", ["module", "alpha", "ignored"])
def test_a_value_that_one_mode_writes_on_is_read_by_the_same_block_or_refused(form):
    model = WritesInEvalMode(form)
    x = torch.randn(5, 6)
    net = sffx.transform(model, ["first"], x, norm="none")
    net.readout.mode = "classifier"
    assert torch.equal(net.eval()(x), model.eval()(x))
    message = r"'relu_' writes in place on the value 'first' in one mode only.*Hint: cut elsewhere"
    with pytest.raises(CutError, match=message):
        sffx.transform(model, ["first", "second"], x, norm="none", check=False)
