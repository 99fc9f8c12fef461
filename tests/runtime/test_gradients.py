from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
from sffx.runtime.gradients import block_gradients


def test_each_gradient_has_memory_of_its_own():
    ids = torch.tensor([0, 2, 2])
    weights = [nn.Parameter(torch.randn(4, 3)) for _ in range(5)]
    summed, other, broadcast, sparse, another = weights
    loss = ((summed + other) * torch.arange(3)).sum() + broadcast.sum()
    # A weight that is a sum: both terms get one sparse gradient.
    loss = loss + F.embedding(ids, sparse + another, sparse=True).square().sum()
    expected = torch.autograd.grad(loss, weights, retain_graph=True)
    gradients = block_gradients(loss, weights)
    dense = [gradients[weight].to_dense() for weight in weights]
    torch.testing.assert_close(dense, [each.to_dense() for each in expected])
    gradients[summed].mul_(2)
    gradients[sparse].mul_(2)
    gradients[broadcast][0] = 7
    for weight, before in zip((other, another), (dense[1], dense[4]), strict=True):
        assert torch.equal(gradients[weight].to_dense(), before)
    assert (gradients[broadcast][1:] == 1).all()


class Bag(nn.Module):
    """The mean of words, whose embedding has sparse gradients or dense ones."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 6, sparse=sparse)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.embedding(ids).mean(1))))


def trained(sparse: bool, *, in_steps: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    net = sffx.transform(Bag(sparse).double(), "layer", torch.zeros(2, 4, dtype=torch.int64))
    optimizer = torch.optim.SGD(sffx.parameter_groups(net, lr=0.1))
    ids, y = torch.arange(12).reshape(3, 4) % 5, torch.arange(3)
    for _ in range(2):
        if in_steps:
            sffx.local_step(net, ids, y, optimizer)
            continue
        optimizer.zero_grad()
        sffx.local_loss(net, ids, y).backward()
        optimizer.step()
    return net.state_dict()


def test_an_embedding_with_sparse_gradients_learns_as_one_with_dense_ones():
    expected = trained(False, in_steps=True)
    for in_steps in (False, True):
        torch.testing.assert_close(trained(True, in_steps=in_steps), expected)
