"""The models of the page, and how they are cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import sffx
from tools.parallel_model.counts import BlockCost, count_blocks

VOCABULARY = 32_000
TOKENS = 2048


class Layer(nn.Module):
    """A layer of a decoder, with the layer norms in front."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer, (B, T, C)."""
        batch, tokens, width = x.shape
        joined = self.attention(self.norm_1(x)).view(batch, tokens, 3, self.heads, -1)
        query, key, value = joined.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.norm_2(x))


class Decoder(nn.Module):
    """A language model: 1.3 billion parameters with 24 layers of width 2048."""

    def __init__(self, layers: int, width: int = 2048, heads: int = 16) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of the next tokens, (B, T, V)."""
        logits: Tensor = self.output(self.norm(self.layers(self.tokens(ids))))
        return logits


def vision_transformer(layers: int) -> nn.Module:
    """Return vit_h_14 with so many layers; 32 are those of torchvision."""
    return torchvision.models.VisionTransformer(
        image_size=224,
        patch_size=14,
        num_layers=layers,
        num_heads=16,
        hidden_dim=1280,
        mlp_dim=5120,
    )


@dataclass(frozen=True)
class Model:
    """A model, cut in one way.

    A deep transformer is counted by a shallow one. Its layers are alike, so one block in the middle
    stands for the others.

    Attributes:
        name: as the page calls it.
        cut: how it is cut, in words.
        unit: of a batch, "images" or "sequences".
        build: returns the module, on the meta device.
        example: returns an input of one sample.
        options: of `sffx.transform`.
        batches: two batch sizes to count with.
        repeated: index of the block that stands for others, None if all blocks are there.
        times: how often it is there in the whole model.
    """

    name: str
    cut: str
    unit: str
    build: Callable[[], nn.Module]
    example: Callable[[], Tensor]
    options: dict[str, Any]
    batches: tuple[int, int] = (8, 16)
    repeated: int | None = None
    times: int = 1

    def count(self) -> list[BlockCost]:
        """Return the costs of all its blocks."""
        with torch.device("meta"):
            model = self.build()
            example = self.example()
        # Memory-saving recomputation is left out, for both ways to learn.
        net = sffx.transform(
            model, example_input=example, check=False, recompute=False, **self.options
        )
        costs = count_blocks(net, self.batches)
        if self.repeated is not None:
            costs[self.repeated : self.repeated + 1] = [costs[self.repeated]] * self.times
        return costs


def _image() -> Tensor:
    return torch.zeros(1, 3, 224, 224)


def _ids() -> Tensor:
    return torch.zeros(1, TOKENS, dtype=torch.int64)


_LANGUAGE = {"task": sffx.tasks.LanguageModel(), "goodness": "shared"}
BY_LAYER = "a head for each layer"
BY_STAGE = "a head for each stage"

MODELS = (
    Model("resnet50", BY_LAYER, "images", torchvision.models.resnet50, _image, {}),
    Model(
        "resnet50",
        BY_STAGE,
        "images",
        torchvision.models.resnet50,
        _image,
        {"policy": "stages(8)"},
    ),
    Model(
        "vit_h_14",
        BY_LAYER,
        "images",
        lambda: vision_transformer(3),
        _image,
        {},
        repeated=2,
        times=30,
    ),
    Model(
        "vit_h_14",
        BY_STAGE,
        "images",
        lambda: vision_transformer(12),
        _image,
        {"policy": ["add_8", "add_16"]},
        repeated=1,
        times=6,
    ),
    Model(
        "decoder, 1.3 B",
        BY_LAYER,
        "sequences",
        lambda: Decoder(3),
        _ids,
        dict(_LANGUAGE),
        batches=(1, 2),
        repeated=1,
        times=22,
    ),
    Model(
        "decoder, 1.3 B",
        BY_STAGE,
        "sequences",
        lambda: Decoder(9),
        _ids,
        {**_LANGUAGE, "policy": ["add_5", "add_11"]},
        batches=(1, 2),
        repeated=1,
        times=6,
    ),
)
