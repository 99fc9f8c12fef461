"""Labels as a part of the input, as supervised Forward-Forward needs them.

A *code* stands for a class in the input. There are J + 1 codes: one for each class, and a neutral
one that tells of none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from sffx.errors import InputError


class LabelCodes:
    """How a label is put into an input (B, ...).

    Attributes:
        name: as an option of an objective.
    """

    name: ClassVar[str] = ""

    def require(self, shape: Sequence[int], num_classes: int) -> None:
        """Raise an InputError if samples of a shape have no room for a label."""
        raise NotImplementedError

    def codes(self, shape: Sequence[int], num_classes: int) -> Tensor:
        """Return the codes of all classes and the neutral one, (J + 1, ...), in float32.

        Args:
            shape: of one sample.
            num_classes: J.
        """
        raise NotImplementedError

    def put(self, x: Tensor, codes: Tensor) -> Tensor:
        """Return the inputs with their labels.

        Args:
            x: (N, ...).
            codes: one for each, (N, ...).
        """
        raise NotImplementedError


class PixelCodes(LabelCodes):
    """The first J values of a sample are the label, one-hot (arXiv 2212.13345, section 3.3).

    The neutral code is 1 / J everywhere.
    """

    name: ClassVar[str] = "pixels"

    def require(self, shape: Sequence[int], num_classes: int) -> None:
        size = math.prod(shape)
        if size <= num_classes:
            raise InputError(
                f"a sample has {size} values, but a label takes the first {num_classes} of them. "
                "Hint: larger inputs, or labels='waves' for images"
            )

    def codes(self, shape: Sequence[int], num_classes: int) -> Tensor:
        neutral = torch.full((1, num_classes), 1 / num_classes, dtype=torch.float32)
        return torch.cat([torch.eye(num_classes, dtype=torch.float32), neutral])

    def put(self, x: Tensor, codes: Tensor) -> Tensor:
        flat = x.flatten(1)
        labelled = torch.cat([codes, flat[:, codes.shape[1] :]], dim=1)
        return labelled.reshape(x.shape)


class WaveCodes(LabelCodes):
    """A plane wave over the whole image, with frequency, phase and orientation by class.

    So each position knows the label, which convolutions need (arXiv 2312.14924, "spatial labels").
    The neutral code is no wave.
    """

    name: ClassVar[str] = "waves"

    def require(self, shape: Sequence[int], num_classes: int) -> None:
        if len(shape) != 3 or min(shape[1:]) < 4:
            raise InputError(
                f"a sample has shape {tuple(shape)}, but labels='waves' are waves over images of "
                "4 x 4 pixels or more. Hint: labels='pixels'"
            )

    def codes(self, shape: Sequence[int], num_classes: int) -> Tensor:
        height, width = shape[1:]
        rows = torch.linspace(0, 1, height, dtype=torch.float32)[:, None]
        columns = torch.linspace(0, 1, width, dtype=torch.float32)[None, :]
        waves = []
        for label in range(num_classes):
            angle = math.pi * label / num_classes
            frequency = 2 + label % 3
            phase = 2 * math.pi * label / num_classes
            distance = rows * math.sin(angle) + columns * math.cos(angle)
            waves.append(torch.cos(2 * math.pi * frequency * distance + phase))
        waves.append(torch.zeros(height, width, dtype=torch.float32))
        return torch.stack(waves)

    def put(self, x: Tensor, codes: Tensor) -> Tensor:
        return x + codes[:, None]


LABEL_CODES: dict[str, LabelCodes] = {each.name: each for each in (PixelCodes(), WaveCodes())}


class LabelTrials(nn.Module):
    """In eval mode, gives each sample every label in turn, and the neutral code last.

    Row `j * B + n` of the result is sample n with label j. In train mode the input stays as it is.

    Args:
        labels: how a label is put into the input.
        shape: of one sample.
        num_classes: J.
    """

    codes: Tensor

    def __init__(self, labels: LabelCodes, shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.labels = labels
        self.shape = tuple(shape)
        codes = labels.codes(shape, num_classes)
        self.register_buffer("codes", codes, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, ...) in train mode, ((J + 1) * B, ...) in eval mode."""
        if self.training:
            return x
        codes = self._codes_for(x).to(x.dtype)
        tries = len(codes)
        # Not len(x), which would fix the batch size of an exported program.
        samples = x.shape[0]
        code_of_row = codes[:, None].expand(tries, samples, *codes.shape[1:])
        return self.labels.put(repeated(x, tries), code_of_row.flatten(0, 1))

    def _codes_for(self, x: Tensor) -> Tensor:
        """Return the codes for samples of the size of x, which may be another than the example's.

        An exported program has those of the example.
        """
        shape = x.shape[1:]
        is_export = torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()
        if is_export or shape == self.shape:
            return self.codes
        num_classes = len(self.codes) - 1
        self.labels.require(shape, num_classes)
        return self.labels.codes(shape, num_classes).to(x.device)


class Repeated(nn.Module):
    """In eval mode, repeats an input that has no label as often as the one that has.

    Args:
        tries: how often.
    """

    def __init__(self, tries: int) -> None:
        super().__init__()
        self.tries = tries

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, ...) in train mode, (tries * B, ...) in eval mode."""
        return x if self.training else repeated(x, self.tries)


class OneTry(nn.Module):
    """In eval mode, keeps the rows of one of several tries.

    Args:
        tries: rows for each sample.
        chosen: index of the try, from the end if it is negative.
    """

    def __init__(self, tries: int, chosen: int) -> None:
        super().__init__()
        self.tries = tries
        self.chosen = chosen

    def forward(self, value: Tensor) -> Tensor:
        """Return (N, ...) in train mode, (N / tries, ...) in eval mode."""
        if self.training:
            return value
        return value.reshape(self.tries, -1, *value.shape[1:])[self.chosen]


def repeated(x: Tensor, tries: int) -> Tensor:
    """Return a batch, (B, ...), several times behind itself, (tries * B, ...)."""
    return x[None].expand(tries, *x.shape).flatten(0, 1)


def other_labels(y: Tensor, num_classes: int) -> Tensor:
    """Return a label for each sample that is not its own, each equally likely, (B,)."""
    step = torch.randint_like(y, 1, num_classes)
    return (y + step) % num_classes


def likely_other_labels(y: Tensor, scores: Tensor) -> Tensor:
    """Return a label for each sample that is not its own, by the probabilities of scores, (B,).

    Args:
        y: class indices, (B,).
        scores: of the net, (B, J), taken as logits. In a net that diverges some are not finite. The
            loss tells of that, and any other label will do.
    """
    is_own = torch.nn.functional.one_hot(y, scores.shape[1]).bool()
    finite = scores.double().nan_to_num()
    others = finite.masked_fill(is_own, -math.inf).softmax(dim=1)
    return torch.multinomial(others, 1)[:, 0]
