"""Structures that models are known by, small and cut.

The trunk of each stays the model, and each parameter learns from one block.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx


class DenseLayers(nn.Module):
    """DenseNet: every layer reads all values before it, so that no cut lies inside."""

    def __init__(self, width: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(width * (i + 1)),
                nn.ReLU(),
                nn.Conv2d(width * (i + 1), width, 3, padding=1),
            )
            for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for layer in self.layers:
            values.append(layer(torch.cat(values, 1)))
        return torch.cat(values, 1)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block1, self.block2 = (
            nn.Conv2d(3, 4, 3, padding=1),
            DenseLayers(),
            DenseLayers(),
        )
        self.transition = nn.Sequential(
            nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1), nn.AvgPool2d(2)
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.transition(self.block1(self.stem(x))))
        return self.head(F.relu(x).mean((2, 3)))


class Branches(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.one, self.three = nn.Conv2d(inputs, width, 1), nn.Conv2d(inputs, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x)), F.max_pool2d(x, 3, 1, 1)], 1)


class Inception(nn.Module):
    """Inception with an auxiliary classifier that only train mode asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mixed1, self.mixed2 = (
            nn.Conv2d(3, 4, 3, padding=1),
            Branches(4, 2),
            Branches(8, 4),
        )
        self.aux, self.head = nn.Linear(8, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.mixed1(F.relu(self.stem(x)))
        aux = self.aux(x.mean((2, 3))) if self.training else None
        logits = self.head(self.mixed2(x).mean((2, 3)))
        return (logits, aux) if self.training else logits


class UNet(nn.Module):
    """Nested skips from the way down to the way up.

    Between the first of them and its join no value dominates the output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.down1, self.down2 = nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1)
        self.up1, self.up2 = nn.ConvTranspose2d(8, 6, 2, 2), nn.ConvTranspose2d(12, 4, 2, 2)
        self.out, self.head = nn.Conv2d(8, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        top = self.stem(x)
        middle = F.relu(self.down1(top))
        low = F.relu(self.down2(middle))
        middle = torch.cat([F.relu(self.up1(low)), middle], 1)
        x = F.relu(self.out(torch.cat([F.relu(self.up2(middle)), top], 1)))
        return self.head(x.mean((2, 3)))


class Albert(nn.Module):
    """One layer applied three times over, between an embedding and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up = nn.Embedding(20, 6), nn.Linear(6, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.pooler, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.embedding(x))
        for _ in range(3):
            x = self.layer(x)
        return self.head(torch.tanh(self.pooler(x[:, 0])))


class AttentionBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.ln1(x)
        x = x + self.attention(y, y, y, key_padding_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln2(x))


class ViT(nn.Module):
    """Class token and positions joined to the patches; the classifier reads the token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token, self.positions = (
            nn.Parameter(torch.randn(1, 1, 8)),
            nn.Parameter(torch.randn(1, 5, 8)),
        )
        self.blocks, self.head = nn.ModuleList(AttentionBlock(8) for _ in range(2)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


class ScaledBlock(nn.Module):
    """ConvNeXt: depthwise convolution, channels last, layer scale, stochastic depth."""

    def __init__(self, width: int, drop: float = 0.0) -> None:
        super().__init__()
        self.depthwise, self.norm = (
            nn.Conv2d(width, width, 3, padding=1, groups=width),
            nn.LayerNorm(width),
        )
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale, self.drop = nn.Parameter(torch.full((width,), 0.3)), drop

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = (self.narrow(F.gelu(self.wide(y))) * self.scale).permute(0, 3, 1, 2)
        if self.drop:
            y = y * F.dropout(torch.ones_like(y[:, :1, :1, :1]), self.drop, self.training)
        return x + y


class ConvNeXt(nn.Module):
    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 4)
        self.blocks = nn.Sequential(ScaledBlock(8, drop), ScaledBlock(8, drop))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class ShuffleUnit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            nn.Conv2d(half, half, 3, padding=1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        one, two = x.chunk(2, 1)
        x = torch.cat([one, self.branch(two)], 1)
        b, c, h, w = x.size()
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


class ShuffleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.unit1, self.unit2, self.head = ShuffleUnit(8), ShuffleUnit(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.unit2(self.unit1(self.stem(x))).mean((2, 3)))


class Signal(nn.Module):
    """1-D convolutions, then an LSTM as one atomic block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 6, 3, padding=1), nn.BatchNorm1d(6)
        self.lstm, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        x, _ = self.lstm(x.transpose(1, 2))
        return self.head(x[:, -1])


class Masked(nn.Module):
    """Tokens and a mask of padding, which every block reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(AttentionBlock(8) for _ in range(2))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x, padding = self.embedding(tokens), mask == 0
        for block in self.blocks:
            x = block(x, padding)
        return self.head(x[:, 0])


class Gated(nn.Module):
    """A gate that the first layer computes and later ones read: a side value with gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(6))
        self.layers, self.head = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate)
        for layer in self.layers:
            x = F.relu(layer(x)) * gate
        return self.head(x)


class SpectralBlock(nn.Module):
    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(width, size, size // 2 + 1, dtype=torch.complex128))
        self.conv = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        filtered = torch.fft.irfft2(
            torch.fft.rfft2(x, norm="ortho") * self.filter, s=x.shape[-2:], norm="ortho"
        )
        return F.gelu(filtered + self.conv(x))


class Fourier(nn.Module):
    """A Fourier neural operator: half of a block's paths are complex in between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 1), nn.Linear(6, 4)
        self.blocks = nn.Sequential(SpectralBlock(6, 8), SpectralBlock(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def image(size: int = 8) -> tuple[Tensor, ...]:
    return (torch.randn(6, 3, size, size),)


def tokens() -> tuple[Tensor, ...]:
    return (torch.randint(0, 20, (6, 5)),)


# The model, its input, the policy, and the names of its blocks.
STRUCTURES = {
    # Inside a dense block there is no candidate. The BN of the transition belongs to what feeds it.
    "DenseNet": (
        DenseNet,
        image,
        "residual",
        ["stem", "block1 … transition.1", "transition.2 … transition.3", "block2"],
    ),
    "Inception with an auxiliary output": (
        Inception,
        image,
        "residual",
        ["stem", "mixed1", "mixed2"],
    ),
    # From the stem to the last join is one block.
    "U-Net": (UNet, image, "layer", ["stem", "down1 … up2", "out"]),
    "ALBERT": (Albert, tokens, "layer", ["embedding", "up", "layer", "pooler"]),
    "ViT with a class token": (ViT, image, "residual", ["patches", "blocks.0", "blocks.1"]),
    "ConvNeXt with layer scale": (ConvNeXt, image, "residual", ["stem", "blocks.0", "blocks.1"]),
    "stochastic depth": (
        lambda: ConvNeXt(0.5),
        image,
        "residual",
        ["stem", "blocks.0", "blocks.1"],
    ),
    "channel shuffle": (ShuffleNet, image, "residual", ["stem", "unit1", "unit2"]),
    "signal, LSTM": (Signal, lambda: (torch.randn(6, 2, 7),), "layer", ["conv … norm", "lstm"]),
    "mask": (
        Masked,
        lambda: (*tokens(), torch.ones(6, 5, dtype=torch.int64)),
        "residual",
        ["embedding", "blocks.0", "blocks.1"],
    ),
    "Fourier": (Fourier, image, "residual", ["stem", "blocks.0", "blocks.1"]),
    "gate": (Gated, lambda: (torch.randn(6, 6),), "layer", ["layers.0", "layers.1", "layers.2"]),
}
LABELS = torch.arange(6) % 4


def built(
    name: str, **options: object
) -> tuple[nn.Module, torch.fx.GraphModule, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    kind, inputs, policy, _ = STRUCTURES[name]
    model, x = kind().double(), inputs()
    x = tuple(value.double() if value.is_floating_point() else value for value in x)
    return model, sffx.transform(model, policy, tuple(value[:1] for value in x), **options), x


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_blocks_are_the_expected_ones(name):
    _, net, _ = built(name)
    assert [block.name for block in net.plan] == STRUCTURES[name][3]
    assert not net.plan.leaves


@pytest.mark.sampled(10)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", STRUCTURES)
def test_without_norm_the_trunk_is_the_model(name, training):
    model, net, x = built(name, norm="none")
    net.readout.mode = "classifier"
    with torch.no_grad():
        torch.manual_seed(1)
        expected = model.train(training)(*x)
        torch.manual_seed(1)
        found = net.train(training)(*x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(found[-1] if training else found, expected)


@pytest.mark.parametrize("name", STRUCTURES)
def test_each_parameter_learns_from_exactly_one_block(name):
    _, net, x = built(name)
    parameters = dict(net.train().named_parameters())
    sources: dict[str, list[int]] = {name: [] for name in parameters}
    for k, scores in enumerate(step_scores_of(net, x)):
        found = torch.autograd.grad(
            F.cross_entropy(scores, LABELS),
            list(parameters.values()),
            allow_unused=True,
            retain_graph=True,
        )
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                sources[parameter].append(k)
    assert all(len(blocks) == 1 for blocks in sources.values()), sources


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_block_local_step_is_the_deferred_one(name):
    _, net, x = built(name)
    net.train()
    found = []
    for loss in (lambda: sffx.sff_loss(net(*x), LABELS), lambda: sffx.local_loss(net, x, LABELS)):
        net.zero_grad()
        torch.manual_seed(1)
        value = loss()
        value.backward()
        found.append([value.detach(), *(p.grad for p in net.parameters())])
    for deferred, local in zip(*found, strict=True):
        torch.testing.assert_close(local, deferred)


def step_scores_of(net: torch.fx.GraphModule, x: tuple[Tensor, ...]) -> list[Tensor]:
    seen: list[Tensor] = []
    handle = net.get_submodule("readout").register_forward_pre_hook(
        lambda _, args: seen.extend(args[0])
    )
    net(*x)
    handle.remove()
    return seen


def test_a_mask_crosses_every_cut_and_is_not_detached():
    _, net, _ = built("mask")
    sides = [(block.sides, block.detached) for block in net.plan]
    assert all(not detached for _, detached in sides)
    crossing = {name for names, _ in sides for name in names} | {
        name for block in net.plan for name in block.inputs
    }
    assert "mask" in crossing or "eq" in crossing
    lines = [
        line for line in str(net.plan).splitlines() if line.startswith("crosses the cut after")
    ]
    assert len(lines) == sum(bool(names) for names, _ in sides)


def test_a_side_value_that_carries_gradient_is_detached_for_every_later_block_and_listed():
    _, net, _ = built("gate")
    assert [(block.sides, block.detached) for block in net.plan] == [
        (("sigmoid",), ("sigmoid",)),
        ((), ()),
        ((), ()),
    ]
    assert "crosses the cut after block_0: sigmoid" in str(net.plan)
    assert (
        "sigmoid_detached" in net.plan.blocks[0].inputs or net.code.count("sigmoid_detached") >= 3
    )


class Reshaped(nn.Module):
    """Reads the sizes of its input at the start and uses them behind every cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = (
            nn.Conv2d(3, 4, 1),
            nn.Conv2d(4, 4, 1),
            nn.Linear(64, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        x = F.relu(self.first(x)).view(b, 4, h, w)
        x = F.relu(self.second(x))
        return self.head(x.view(b, 4 * h * w))


def test_sizes_cross_a_cut():
    net = sffx.transform(Reshaped(), "layer", torch.zeros(1, 3, 4, 4)).train()
    assert all(not block.detached for block in net.plan)
    sffx.local_loss(net, torch.randn(6, 3, 4, 4), LABELS).backward()
    assert all(p.grad is not None for p in net.parameters())
