"""Random models for property tests.

They are programs of layers, branches, joins, shared layers, in-place operations and changes of
shape.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

CLASSES = 3
POINTWISE = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x, inplace=True),
    "relu_": lambda x: x.relu_(),
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "scaled": lambda x: x * 0.5 + 0.1,
    "scaled in place": lambda x: x.mul_(0.7),
}


class Program(nn.Module):
    """Runs a program; instructions are plain data, so that a copy of the model runs its own layers.

    Args:
        code: of the model, instructions in order.
        layers: that the instructions name by index.
    """

    def __init__(self, code: list[tuple[Any, ...]], layers: list[nn.Module]) -> None:
        super().__init__()
        self.code, self.layers = code, nn.ModuleList(layers)
        self.scales = nn.Parameter(torch.linspace(0.5, 1.5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.code, x, x.abs().flatten(1).mean(1) > 0.5, self.scales.tanh())

    def run(self, code: list[tuple[Any, ...]], x: Tensor, mask: Tensor, scales: Tensor) -> Tensor:
        for name, *args in code:
            if name == "layer":
                x = self.layers[args[0]](x)
            elif name == "pointwise":
                x = POINTWISE[args[0]](x)
            elif name == "dropout":
                x = F.dropout(x, 0.3, self.training)
            elif name == "sum":
                x = self.joined(args[0], x, self.run(args[1], x, mask, scales))
            elif name == "cat":
                x = torch.cat([self.run(branch, x, mask, scales) for branch in args[0]], args[1])
            elif name == "gate":
                x = x * torch.sigmoid(self.run(args[0], x, mask, scales))
            elif name == "shuffle":
                x = (
                    x.view(x.shape[0], 2, x.shape[1] // 2, *x.shape[2:])
                    .transpose(1, 2)
                    .flatten(1, 2)
                )
            elif (
                name == "scale"
            ):  # a value computed from a parameter once and read all over the model
                x = x * scales[args[0]]
            elif name == "mask":  # a value computed from the input that has no gradient
                x = x + mask.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
            elif name == "tokens":
                x = x.flatten(2).transpose(1, 2)
            elif name == "attention":
                x = torch.softmax(x @ x.transpose(1, 2), -1) @ x
            elif name == "first token":
                x = x[:, 0]
            elif name == "mean":
                x = x.flatten(2).mean(2) if args[0] == 1 else x.mean(1)
            elif name == "flatten":
                x = x.flatten(1)
        return x

    @staticmethod
    def joined(how: str, x: Tensor, y: Tensor) -> Tensor:
        if how == "y += x":
            y += x
            return y
        return x + y if how == "x + y" else torch.add(y, x)

    def extra_repr(self) -> str:
        return repr(self.code)


class Writer:
    """Writes a program and draws every choice.

    It follows the shape of the value: (C, H, W), (T, C) or (C,).
    """

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.layers: list[nn.Module] = []
        self.shared: dict[tuple[int, ...], int] = {}

    def choice(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def layer(self, module: nn.Module) -> tuple[Any, ...]:
        self.layers.append(module)
        return ("layer", len(self.layers) - 1)

    def model(self) -> tuple[Program, tuple[int, ...]]:
        start = self.choice((3, 6, 6), (5, 3), (6,))
        code, shape = self.code(start, self.draw(st.integers(2, 5)))
        while len(shape) > 1:
            turn, shape = self.turn(shape)
            more, shape = self.code(shape, self.draw(st.integers(0, 3)))
            code += [turn, *more]
        return Program([*code, self.layer(nn.Linear(shape[0], CLASSES))], self.layers), start

    def turn(self, shape: tuple[int, ...]) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        """Write a change to fewer axes."""
        if len(shape) == 3:
            kind = self.choice("tokens", "mean", "flatten")
            after = {
                "tokens": (shape[1] * shape[2], shape[0]),
                "mean": (shape[0],),
                "flatten": (shape[0] * shape[1] * shape[2],),
            }
            return ((kind, 1) if kind == "mean" else (kind,)), after[kind]
        kind = self.choice("first token", "mean", "flatten")
        return ((kind, 2) if kind == "mean" else (kind,)), (
            (shape[0] * shape[1],) if kind == "flatten" else (shape[1],)
        )

    def code(
        self, shape: tuple[int, ...], length: int, *, depth: int = 0, keep: bool = False
    ) -> tuple[list[Any], tuple[int, ...]]:
        """Write instructions; `keep` asks for the shape to be the same at the end."""
        code: list[Any] = []
        for _ in range(length):
            more, shape = self.instruction(shape, depth, keep)
            code += more
        return code, shape

    def instruction(
        self, shape: tuple[int, ...], depth: int, keep: bool
    ) -> tuple[list[Any], tuple[int, ...]]:
        kinds = [
            "weight",
            "weight",
            "weight",
            "norm",
            "pointwise",
            "dropout",
            "scale",
            "mask",
            "shared",
        ]
        kinds += ["sum", "sum", "cat", "gate"] if depth < 2 else []
        kinds += (
            ["pool", "shuffle"] if len(shape) == 3 else ["attention"] if len(shape) == 2 else []
        )
        kind = self.choice(*kinds)
        if kind == "weight":
            return self.weight(shape, keep)
        if kind == "pool" and (keep or shape[1] < 2):
            return [], shape
        if kind == "pool":
            pool = self.layer(nn.MaxPool2d(2))
            return [
                self.choice(
                    ("pointwise", "relu"), ("pointwise", "relu in place"), ("pointwise", "gelu")
                ),
                pool,
            ], (
                shape[0],
                shape[1] // 2,
                shape[2] // 2,
            )
        return self.same_shape(kind, shape, depth, keep)

    def weight(self, shape: tuple[int, ...], keep: bool) -> tuple[list[Any], tuple[int, ...]]:
        """Write a layer with a weight, as often as not with its norm and activation."""
        axis = 0 if len(shape) == 3 else -1
        width = shape[axis] if keep else self.choice(4, 6)
        if len(shape) == 3:
            size = self.choice(1, 3)
            layer: nn.Module = nn.Conv2d(
                shape[0], width, size, padding=size // 2, bias=self.draw(st.booleans())
            )
            shape = (width, *shape[1:])
        else:
            layer = nn.Linear(shape[-1], width)
            shape = (*shape[:-1], width)
        follow = (
            [*self.norm(shape), ("pointwise", self.choice(*POINTWISE))]
            if self.draw(st.booleans())
            else []
        )
        return [self.layer(layer), *follow], shape

    def norm(self, shape: tuple[int, ...]) -> list[Any]:
        kinds = {3: nn.BatchNorm2d, 2: nn.LayerNorm, 1: nn.BatchNorm1d}
        return [self.layer(kinds[len(shape)](shape[0] if len(shape) == 3 else shape[-1]))]

    def same_shape(
        self, kind: str, shape: tuple[int, ...], depth: int, keep: bool
    ) -> tuple[list[Any], tuple[int, ...]]:
        width = shape[0] if len(shape) == 3 else shape[-1]
        if kind == "norm":
            return self.norm(shape), shape
        if kind == "pointwise":
            return [("pointwise", self.choice(*POINTWISE))], shape
        if kind == "scale":
            return [("scale", self.draw(st.integers(0, 3)))], shape
        if kind == "shared":
            return [self.reused(shape, width)], shape
        if kind in ("sum", "gate"):
            inner, _ = self.code(shape, self.draw(st.integers(1, 3)), depth=depth + 1, keep=True)
            return [
                ("sum", self.choice("x + y", "y += x", "add(y, x)"), inner)
                if kind == "sum"
                else ("gate", inner)
            ], shape
        if kind == "cat":
            return ([], shape) if keep else self.cat(shape, depth)
        if kind == "shuffle" and width % 2:
            return [], shape
        return [(kind,)], shape

    def cat(self, shape: tuple[int, ...], depth: int) -> tuple[list[Any], tuple[int, ...]]:
        axis = 0 if len(shape) == 3 else len(shape) - 1
        branches = [
            self.code(shape, self.draw(st.integers(0, 2)), depth=depth + 1, keep=True)[0]
            for _ in range(2)
        ]
        wide = tuple(2 * size if i == axis else size for i, size in enumerate(shape))
        return [("cat", branches, axis + 1)], wide

    def reused(self, shape: tuple[int, ...], width: int) -> tuple[Any, ...]:
        """Write a call of a layer that other places call as well."""
        key = (len(shape), width)
        if key not in self.shared:
            self.shared[key] = self.layer(
                nn.Conv2d(width, width, 1) if len(shape) == 3 else nn.Linear(width, width)
            )[1]
        return ("layer", self.shared[key])


@st.composite
def models(draw: Any) -> tuple[Program, tuple[int, ...]]:
    """Draw a model and the shape of one sample of its input."""
    return Writer(draw).model()
