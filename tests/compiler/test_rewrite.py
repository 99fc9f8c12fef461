from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import sffx
from sffx.compiler.rewrite import _detached
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


def test_a_side_value_that_holds_tensors_and_sizes_is_detached_where_it_can_be():
    graph = fx.Graph()
    side = graph.placeholder("side")
    graph.output(_detached(graph, side, (torch.zeros(2), [torch.zeros(3), 5])))
    tensor = torch.ones(2, requires_grad=True)
    first, (second, size) = fx.GraphModule(nn.Module(), graph)((tensor * 2, [tensor * 3, 5]))
    assert not first.requires_grad
    assert not second.requires_grad
    assert size == 5
