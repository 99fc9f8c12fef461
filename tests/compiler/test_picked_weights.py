"""Weights that an integer input picks for each sample are the classifier's, and no stream.

The oracle is the model itself: the net without norms computes what it computes.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
from sffx.errors import TraceError


class Heads(nn.Module):
    """A trunk of two layers, and a head for each of three tasks."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.heads = nn.Parameter(torch.randn(3, 4, 8))
        self.bias = nn.Parameter(torch.randn(3, 4))
        self.table = nn.Embedding(3, 32)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        return self.answer(self, self.trunk(x), task)


def product(weight: Tensor, x: Tensor) -> Tensor:
    return torch.bmm(weight, x[..., None])[..., 0]


ANSWERS = {
    "bmm": lambda m, x, task: product(m.heads[task], x),
    "bias": lambda m, x, task: product(m.heads[task], x) + m.bias[task],
    "einsum": lambda m, x, task: torch.einsum("bjc,bc->bj", m.heads[task], x),
    "matmul": lambda m, x, task: (m.heads[task] @ x[..., None]).squeeze(-1),
    "index_select": lambda m, x, task: product(m.heads.index_select(0, task), x),
    "gather": lambda m, x, task: product(
        m.heads.gather(0, task[:, None, None].expand(-1, 4, 8)), x
    ),
    "embedding": lambda m, x, task: product(m.table(task).view(-1, 4, 8), x),
    "F.embedding": lambda m, x, task: product(
        F.embedding(task, m.heads.flatten(1)).view(-1, 4, 8), x
    ),
}
X, TASK = (
    torch.randn(5, 6, generator=torch.Generator().manual_seed(0)),
    torch.tensor([0, 2, 1, 1, 0]),
)


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_head_for_each_task_is_the_classifier(answer):
    torch.manual_seed(0)
    model = Heads(ANSWERS[answer])
    net = sffx.transform(model, "layer", (X, TASK), norm="none", check=False)
    assert [block.modules for block in net.plan] == [("trunk.0", "trunk.1"), ("trunk.2", "trunk.3")]
    assert torch.equal(net.train()(X, TASK)[-1], model(X, TASK))
    loss = sffx.local_loss(net, (X, TASK), torch.tensor([0, 1, 2, 3, 0]))
    loss.backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_words_beside_an_image_stay_a_stream():
    class Both(nn.Module):
        """The picked rows go through a layer of their own."""

        def __init__(self):
            super().__init__()
            self.words, self.text = nn.Embedding(9, 8), nn.Linear(8, 8)
            self.image, self.head = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            return self.image(x).relu() * self.text(self.words(ids)).relu()

    # The streams meet at the logits. So no value is one that the classifier is computed from.
    with pytest.raises(sffx.CutError, match="no node to cut at"):
        sffx.plan(Both(), "layer", (X, TASK))


def test_a_weight_for_the_whole_batch_is_refused_with_the_reason():
    model = Heads(lambda m, x, task: F.linear(x, m.heads[task[0]]))
    with pytest.raises(TraceError, match="a number is read from a tensor, which depends on"):
        sffx.plan(model, "layer", (X, TASK))
