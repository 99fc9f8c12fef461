from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.errors import CutError


class _ReadsValues(nn.Module):
    """Layers whose number of uses depends on the data, which no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.sum() > 0:
            x = self.b(x)
        return self.c(x)


class _Recurrent(nn.Module):
    """Feeds what its last layer computes to its first one again."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for _ in range(3):
            x = self.head(self.cell(x).relu())
            outputs.append(x)
        return torch.stack(outputs).mean(0)


class _Product(nn.Module):
    """A layer of its own kind: nothing tells where the channels of its value are."""

    def __init__(self, pattern: str, *sizes: int) -> None:
        super().__init__()
        self.pattern, self.weight = pattern, nn.Parameter(torch.ones(sizes))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.pattern, x, self.weight)


class _Tied(nn.Module):
    """Scores words by the weight of their embedding: on (B, 5) of 9 words."""

    def __init__(self, by_layer: bool) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(9, 8), nn.Linear(8, 8)
        if by_layer:
            self.head = nn.Linear(8, 9, bias=False)
            self.head.weight = self.embed.weight
        self.by_layer = by_layer

    def forward(self, words: Tensor) -> Tensor:
        x = self.layer(self.embed(words)).relu()
        return self.head(x) if self.by_layer else x @ self.embed.weight.T


def test_a_weight_that_is_tied_by_a_product_is_to_be_tied_by_a_layer():
    words = torch.zeros(2, 5, dtype=torch.int64)
    task = sffx.tasks.LanguageModel()
    said = r"calls embed and computes with its weight.*head\.weight = embed\.weight"
    with pytest.raises(CutError, match=said):
        sffx.plan(_Tied(by_layer=False), "layer", words, task=task)
    assert len(sffx.plan(_Tied(by_layer=True), "layer", words, task=task)) == 2


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Sequential(_ReadsValues()), r"0 \(_ReadsValues\) holds 100% .*branch depends on the"),
        (_Recurrent(), "cell runs more than once.*the uses of a layer that runs again"),
        (
            nn.Sequential(_Product("bi,ijk->bjk", 6, 3, 2), _Product("bjk,jkc->bc", 3, 2, 4)),
            "the channel axis is told by the layers",
        ),
        (nn.Sequential(nn.Linear(6, 4)), "a value that everything after it is computed from"),
    ],
)
def test_a_model_with_nowhere_to_cut_is_told_what_to_do(model, said):
    with pytest.raises(CutError, match=f"(?s)no node to cut at.*{said}.*") as caught:
        sffx.plan(model, example_input=torch.randn(2, 6))
    assert str(caught.value).count("Hint: ") == 1
