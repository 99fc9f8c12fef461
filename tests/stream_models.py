"""Nets whose streams run side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 3


def twice(inputs: int, outputs: int) -> nn.Sequential:
    """Return two convolutions with BN and a ReLU in place."""
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class Up(nn.Module):
    """A decoder stage: the value is enlarged, and a skip connection comes to it."""

    def __init__(self, inputs: int, skip: int, outputs: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
        self.conv = twice(outputs + skip, outputs)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv(torch.cat([self.up(x), skip], 1))


class UNet(nn.Module):
    """Three encoder stages, a bottleneck, three decoder stages, a classifier: on (B, 3, 16, 16)."""

    def __init__(self, width: int = 4, classes: int = CLASSES) -> None:
        super().__init__()
        one, two, four, eight = width, 2 * width, 4 * width, 8 * width
        self.enc1, self.enc2, self.enc3 = twice(3, one), twice(one, two), twice(two, four)
        self.mid = twice(four, eight)
        self.up3, self.up2, self.up1 = Up(eight, four, four), Up(four, two, two), Up(two, one, one)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(one, classes)

    def forward(self, x: Tensor) -> Tensor:
        e1 = self.enc1(x)
        e2 = self.enc2(self.pool(e1))
        e3 = self.enc3(self.pool(e2))
        x = self.mid(self.pool(e3))
        x = self.up1(self.up2(self.up3(x, e3), e2), e1)
        return self.head(x.mean((2, 3)))


class Gate(nn.Module):
    """Gates a skip connection by attention: by itself, and by what comes from below."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.own, self.other, self.weigh = (nn.Conv2d(width, width, 1) for _ in range(3))

    def forward(self, skip: Tensor, x: Tensor) -> Tensor:
        return skip * self.weigh(F.relu(self.own(skip) + self.other(x))).sigmoid()


class AttentionUNet(nn.Module):
    """A U-Net whose decoder gates the skip connections: on (B, 3, 16, 16), for each pixel."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.enc1, self.enc2, self.mid = twice(3, 4), twice(4, 8), twice(8, 16)
        self.up2, self.up1 = (nn.ConvTranspose2d(2 * width, width, 2, stride=2) for width in (8, 4))
        self.gate2, self.gate1 = Gate(8), Gate(4)
        self.dec2, self.dec1 = twice(16, 8), twice(8, 4)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Conv2d(4, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        e1 = self.enc1(x)
        e2 = self.enc2(self.pool(e1))
        x = self.up2(self.mid(self.pool(e2)))
        x = self.up1(self.dec2(torch.cat([self.gate2(e2, x), x], 1)))
        return self.head(self.dec1(torch.cat([self.gate1(e1, x), x], 1)))


class Exchange(nn.Module):
    """A unit of an HRNet: each stream has layers of its own, and then each reads all others."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.streams = nn.ModuleList(twice(width, width) for width in widths)
        self.rows = nn.ModuleList(nn.ModuleList() for _ in widths)
        for i, row in enumerate(self.rows):
            for j, width in enumerate(widths):
                row.append(self._way(width, widths[i], i - j))

    @staticmethod
    def _way(inputs: int, outputs: int, halvings: int) -> nn.Module:
        if halvings == 0:
            return nn.Identity()
        if halvings > 0:
            return nn.Conv2d(inputs, outputs, 3, stride=2**halvings, padding=1)
        return nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.Upsample(scale_factor=2**-halvings))

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        xs = [stream(x) for stream, x in zip(self.streams, xs, strict=True)]
        fused = []
        for row in self.rows:
            ways = [way(x) for way, x in zip(row, xs, strict=True)]
            fused.append(F.relu(sum(ways)))
        return fused


class HRNet(nn.Module):
    """A stem, then two and three streams of halved size: on (B, 3, 16, 16)."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.stem = twice(3, 4)
        self.first = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 8, 3, stride=2, padding=1)])
        self.stage2 = Exchange([4, 8])
        self.third = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.stage3 = nn.Sequential(Exchange([4, 8, 12]), Exchange([4, 8, 12]))
        self.head = nn.Linear(24, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        xs = self.stage2([layer(x) for layer in self.first])
        xs = self.stage3([*xs, self.third(xs[-1])])
        return self.head(torch.cat([x.mean((2, 3)) for x in xs], 1))


class TwoStreams(nn.Module):
    """A video net that reads frames (B, 3, T, H, W) and their flow (B, 2, T, H, W)."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.frames, self.flow = self._stream(3), self._stream(2)
        self.head = nn.Linear(16, classes)

    @staticmethod
    def _stream(channels: int) -> nn.Sequential:
        stages = []
        for inputs, outputs in [(channels, 6), (6, 8), (8, 8)]:
            layer = nn.Conv3d(inputs, outputs, 3, padding=1, bias=False)
            stages.append(nn.Sequential(layer, nn.BatchNorm3d(outputs), nn.ReLU()))
        return nn.Sequential(*stages)

    def forward(self, frames: Tensor, flow: Tensor) -> Tensor:
        both = [self.frames(frames).mean((2, 3, 4)), self.flow(flow).mean((2, 3, 4))]
        return self.head(torch.cat(both, 1))


class Pair(nn.Module):
    """A unit of two streams, each with a residual branch that reads both."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2 * width, width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat((x, y), -1)
        return x + self.one(both).relu(), y + self.two(both).relu()


class Pairs(nn.Module):
    """Two streams of tokens that meet only at the end: on (B, T, 3)."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.inp = nn.Linear(3, 16)
        self.pairs = nn.ModuleList([Pair(8), Pair(8), Pair(8)])
        self.out = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.inp(x).chunk(2, -1)
        for pair in self.pairs:
            x, y = pair(x, y)
        return self.out(torch.cat((x, y), -1).mean(1))


class Towers(nn.Module):
    """Three nets that meet at the logits alone, each with a last layer of its own.

    Args:
        inputs: how many inputs they read, 1 or 3.
        meet: how their logits meet.
    """

    def __init__(self, inputs: int, meet: Callable[[list[Tensor]], Tensor]) -> None:
        super().__init__()
        self.inputs = inputs
        self.meet = meet
        self.nets = nn.ModuleList(self._net() for _ in range(3))

    @staticmethod
    def _net() -> nn.Sequential:
        tail = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1)
        return nn.Sequential(twice(3, 4), twice(4, 4), *tail, nn.Linear(4, CLASSES))

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        images = [x, *others] if others else [x, x, x]
        return self.meet([net(image) for net, image in zip(self.nets, images, strict=True)])


class Fusion(nn.Module):
    """A net for images and one for rows of a table, and several layers for what both see."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.image = nn.Sequential(twice(3, 4), twice(4, 8), *pool)
        self.table = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 24))
        self.fuse = nn.Sequential(nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, classes))

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        return self.fuse(torch.cat([self.image(image), self.table(table)], 1))


class Siamese(nn.Module):
    """Runs the same layers on two images, (B, 3, 16, 16), and compares what they see."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        first, second = twice(3, 4), twice(4, 8)
        dropped = nn.Dropout(0.5), nn.Dropout(0.5)
        self.encoder = nn.Sequential(first, nn.MaxPool2d(2), dropped[0], second, dropped[1])
        self.head = nn.Linear(16, classes)

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        both = [self.encoder(image).mean((2, 3)) for image in (one, two)]
        return self.head(torch.cat(both, 1))


class Spiking(nn.Module):
    """Runs its layers at each of three steps in time; the neurons keep a potential: on (B, 6).

    Args:
        feeds_back: whether the last layer feeds the first one in the next step.
    """

    def __init__(self, feeds_back: bool = False, classes: int = CLASSES) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 6)])
        self.head = nn.Linear(6, classes)
        self.feeds_back = feeds_back

    def forward(self, x: Tensor) -> Tensor:
        potentials: list[Any] = [0.0] * len(self.layers)
        value = total = x * 0
        for _ in range(3):
            value = x + value if self.feeds_back else x
            for i, layer in enumerate(self.layers):
                potentials[i] = 0.5 * potentials[i] + layer(value)
                value = torch.sigmoid(4 * potentials[i] - 2)
            total = total + value
        return self.head(total)


class UnrolledCells(nn.Module):
    """Runs two recurrent cells, one after the other, at each step in time: on (B, T, 6).

    Args:
        cell: `nn.GRUCell` or `nn.LSTMCell`.
    """

    def __init__(self, cell: type[nn.GRUCell | nn.LSTMCell], classes: int = CLASSES) -> None:
        super().__init__()
        self.cells = nn.ModuleList([cell(6, 8), cell(8, 8)])
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        states: list[Any] = [None, None]
        value = x[:, 0]
        for step in range(x.shape[1]):
            value = x[:, step]
            for i, cell in enumerate(self.cells):
                states[i] = cell(value, states[i])
                value = states[i][0] if isinstance(cell, nn.LSTMCell) else states[i]
        return self.head(value)


def residual(width: int) -> nn.Module:
    return Sum(nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU()))


class Sum(nn.Module):
    """A residual block."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class CrossStage(nn.Module):
    """A CSP stage: half of the channels pass two residual blocks by, between two layers."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(inputs, width, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(residual(width // 2), residual(width // 2))
        self.out = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.down(x).chunk(2, 1)
        return self.out(torch.cat((left, self.blocks(right)), 1))


class Dense(nn.Module):
    """A dense block: a layer reads what all layers before it gave, and a transition ends it."""

    def __init__(self, inputs: int, growth: int, width: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(inputs + i * growth, growth, 3, padding=1) for i in range(2))
        self.layers = nn.ModuleList([first, second])
        self.transition = nn.Conv2d(inputs + 2 * growth, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)).relu())
        return self.transition(torch.cat(found, 1))


class Words(nn.Module):
    """A unit of a TNT: words of each sentence, (B * 5, 3, 8), and the sentences, (B, 5, 24).

    The words are read in the unit and behind it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.words, self.sentences = nn.Linear(8, 8), Sum(nn.Linear(24, 24))
        self.read = nn.Linear(24, 24)

    def forward(self, words: Tensor, sentences: Tensor) -> tuple[Tensor, Tensor]:
        words = words + self.words(words)
        sentences = sentences + self.read(words.reshape(sentences.shape[0], 5, 24))
        return words, self.sentences(sentences)


class Nested(nn.Module):
    """Two streams, of which one folds its sentences into the batch: on (B, 5, 3, 2)."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.inp, self.first = nn.Linear(2, 8), nn.Linear(24, 24)
        self.units = nn.ModuleList([Words(), Words(), Words()])
        self.out = nn.Linear(24, classes)

    def forward(self, x: Tensor) -> Tensor:
        words = self.inp(x.flatten(0, 1))
        sentences = self.first(words.reshape(x.shape[0], 5, 24))
        for unit in self.units:
            words, sentences = unit(words, sentences)
        return self.out(sentences.mean(1))


class _Mixes(nn.Module):
    """A layer of an encoder, or of a decoder that also reads an encoder's output."""

    def __init__(self, is_decoder: bool) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.cross = nn.Linear(8, 8) if is_decoder else None
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor, encoded: Tensor | None = None) -> Tensor:
        x = x + self.mix(x)
        if self.cross is not None and encoded is not None:
            x = x + self.cross(encoded).mean(1, keepdim=True)
        return x + self.down(self.up(x).relu())


class _Stack(nn.Module):
    def __init__(self, embedding: nn.Embedding, layers: int, is_decoder: bool) -> None:
        super().__init__()
        self.embedding = embedding
        self.norm = nn.LayerNorm(8)
        self.layers = nn.ModuleList(_Mixes(is_decoder) for _ in range(layers))

    def forward(self, ids: Tensor, encoded: Tensor | None = None) -> Tensor:
        x = self.norm(self.embedding(ids))
        for layer in self.layers:
            x = layer(x, encoded)
        return x


class EncoderDecoder(nn.Module):
    """An encoder and a decoder that share their embedding, as in BART and T5.

    Args:
        per_token: whether it predicts each token of the decoder, and not the sample.
    """

    def __init__(self, per_token: bool = False) -> None:
        super().__init__()
        embedding = nn.Embedding(20, 8)
        self.encoder = _Stack(embedding, 3, is_decoder=False)
        self.decoder = _Stack(embedding, 4, is_decoder=True)
        self.head = nn.Linear(8, 4)
        self.per_token = per_token

    def forward(self, ids: Tensor, decoder_ids: Tensor) -> Tensor:
        x = self.decoder(decoder_ids, self.encoder(ids))
        return self.head(x if self.per_token else x[:, -1])
