from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import sffx
from sffx.compiler.rewrite import _detached
from sffx.errors import CutError
from tests.toys import Chain, Residual, Rounding, SharedBias, TwoInputs, step_scores


def code(net: nn.Module) -> str:
    """Return the outer code without what fx adds to free values and without blank lines."""
    lines = [line.partition(";")[0].rstrip() for line in net.code.splitlines()]
    return "\n".join(line for line in lines if line.strip())


def test_the_outer_graph_reads_as_the_method_does():
    net = sffx.transform(Residual())
    assert (
        code(net)
        == """\
def forward(self, x):
    block_0 = self.block_0(x)
    goodness_0 = self.head_0(block_0)
    detached_0 = block_0.detach()
    norm_0 = self.norm_0(detached_0)
    block_1 = self.block_1(norm_0)
    goodness_1 = self.head_1(block_1)
    detached_1 = block_1.detach()
    norm_1 = self.norm_1(detached_1)
    block_2 = self.block_2(norm_1)
    goodness_2 = self.head_2(block_2)
    detached_2 = block_2.detach()
    norm_2 = self.norm_2(detached_2)
    classifier = self.classifier(norm_2)
    readout = self.readout([goodness_0, goodness_1, goodness_2, classifier])
    return readout"""
    )


def test_without_norm_only_the_detach_is_left():
    net = sffx.transform(Chain(), norm="none", example_input=torch.zeros(1, 3, 8, 8))
    assert not [name for name, _ in net.named_children() if name.startswith("norm")]
    assert "block_1 = self.block_1(detached_0)" in code(net)


def test_side_values_cross_the_cut_and_are_detached_where_they_carry_gradient():
    net = sffx.transform(SharedBias(), "layer")
    assert [(block.sides, block.detached) for block in net.plan] == [
        (("tanh",), ("tanh",)),
        ((), ()),
    ]
    assert "tanh_detached = tanh.detach()" in code(net)
    assert "block_1 = self.block_1(tanh_detached, norm_0)" in code(
        net
    ) or "block_1 = self.block_1(norm_0, tanh_detached)" in code(net)
    x = torch.randn(5, 6)
    first, second, _ = step_scores(net.train(), x)
    table = net.block_0.table
    assert (
        torch.autograd.grad(first.sum(), table, retain_graph=True, allow_unused=True)[0] is not None
    )
    assert torch.autograd.grad(second.sum(), table, allow_unused=True)[0] is None


def test_several_inputs_by_position_and_by_name():
    net = sffx.transform(TwoInputs(), "layer", (torch.zeros(1, 6), torch.zeros(1, 5))).eval()
    image, text = torch.randn(3, 6), torch.randn(3, 5)
    assert torch.equal(net(image, text), net(text=text, image=image))


def test_a_rounding_between_blocks_leaves_both_sides_trainable():
    net = sffx.transform(Rounding(), ["relu", "relu_1"]).train()
    sffx.sff_loss(net(torch.randn(16, 6)), torch.randint(0, 4, (16,))).backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


class _InPlaceForms(nn.Module):
    """A cut before each form of in-place operation."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.act = nn.ReLU(inplace=True)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.form == "module":
            x = self.act(x)
        elif self.form == "function":
            x = F.relu(x, inplace=True)
        elif self.form == "function by position":
            x = F.leaky_relu(x, 0.1, True)
        elif self.form == "torch function":
            x = torch.relu_(x)
        elif self.form == "method":
            x = x.relu_()
        elif self.form == "view":
            x = x.view(-1, 6).mul_(2)
        return self.head(self.act(self.second(x)))


@pytest.mark.parametrize(
    "form", ["module", "function", "function by position", "torch function", "method", "view"]
)
def test_an_in_place_operation_after_a_cut_does_not_write_on_the_blocks_output(form):
    model = _InPlaceForms(form).double()
    net = sffx.transform(model, ["first"], norm="none").train()
    x, y = torch.randn(7, 6, dtype=torch.float64), torch.randint(0, 4, (7,))
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
    assert all(
        torch.equal(p.grad, q.grad)
        for p, q in zip(net.parameters(), local.parameters(), strict=True)
    )
    expected = model(x)
    net.readout.mode = "classifier"
    assert torch.equal(net.eval()(x), expected)


def test_the_original_keeps_its_in_place_operations():
    net = sffx.transform(_InPlaceForms("module"), ["first"], norm="none")
    assert not any(getattr(module, "inplace", False) for module in net.classifier.modules())
    assert sffx.extract(net).act.inplace


class _CannotKeepItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(torch.nn.init.constant_(x, 1.0))


def test_a_write_with_no_other_form_is_refused_by_name():
    with pytest.raises(
        CutError, match=r"writes in place on a value that crosses a cut.*has no form that does not"
    ):
        sffx.transform(_CannotKeepItsInput(), ["first"], norm="none")


class _ReadBehind(nn.Module):
    """Writes in place and goes on with the variable that was written to."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.form == "function":
            F.relu_(h)
        elif self.form == "method":
            h.clamp_(min=0)
        else:
            F.silu(h[:, :3], inplace=True)
        return self.head(F.relu(self.second(h)))


@pytest.mark.parametrize("form", ["function", "method", "view"])
def test_a_written_variable_that_is_read_again_is_refused_across_a_cut_and_kept_within(form):
    model = _ReadBehind(form)
    with pytest.raises(CutError, match="the model reads what it wrote by another name"):
        sffx.transform(model, ["first"], norm="none")
    net = sffx.transform(model, ["relu"], norm="none").train()
    x = torch.randn(5, 6)
    net.readout.mode = "classifier"
    assert torch.equal(net(x)[-1], model(x))


def test_a_tuple_that_crosses_a_cut_is_detached_part_by_part():
    class Film(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.film = nn.Parameter(torch.randn(12))
            self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.film.chunk(2)
            return self.head(F.relu(self.second(F.relu(self.first(x) + a)) + b))

    net = sffx.transform(Film(), "layer").train()
    sffx.local_loss(net, torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 0])).backward()
    assert (
        net.block_0.film.grad[6:].abs().sum() == 0
    )  # b is used by the second block only, which the cut keeps from it


class _WritesOnAFlatCopy(nn.Module):
    """Flattens a value that lies transposed, which copies it, and writes on the copy; of a normalised value the same is a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = (
            nn.Conv2d(3, 4, 1),
            nn.Linear(4, 4),
            nn.ReLU(inplace=True),
        )
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).flatten(2).transpose(1, 2)
        x = x * torch.sigmoid(self.second(x))
        return self.head(self.act(x.flatten(1)))


def test_a_write_on_what_was_a_copy_in_the_trace_and_is_a_view_behind_the_norm():
    net = sffx.transform(_WritesOnAFlatCopy(), ["mul"], torch.zeros(1, 3, 4, 4)).train()
    assert not any(getattr(module, "inplace", False) for module in net.classifier.modules())
    x, y = torch.randn(5, 3, 4, 4), torch.arange(5) % 4
    sffx.sff_loss(net(x), y).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_side_value_that_holds_tensors_and_sizes_is_detached_where_it_can_be():
    graph = fx.Graph()
    side = graph.placeholder("side")
    graph.output(_detached(graph, side, (torch.zeros(2), [torch.zeros(3), 5])))
    tensor = torch.ones(2, requires_grad=True)
    first, (second, size) = fx.GraphModule(nn.Module(), graph)((tensor * 2, [tensor * 3, 5]))
    assert not first.requires_grad
    assert not second.requires_grad
    assert size == 5
