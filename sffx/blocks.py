"""The block plan: where a model is cut, and everything that the rewrite and the drawing need to know of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from html import escape
from typing import Any, TypeAlias

from torch import nn

from sffx.errors import InputError
from sffx.parts import head_name

MIB = 2**20

HEADER = ("block", "modules", "cut after", "output", "parameters", "MACs", "kept/sample")


@dataclass(frozen=True)
class Input:
    """One input of the model, as it was traced.

    Attributes:
        name: the argument of the model's `forward`.
        shape: of one sample, without the batch axis.
        dtype: of the tensor, as torch names it ("float32", "int64").
        high: for integer inputs, one more than the largest value that is valid (an embedding's rows); 0 for float inputs.
        marks_tokens: whether it is an attention mask (B, T), which tells real tokens from padding, the zeros.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    high: int = 0
    marks_tokens: bool = False


@dataclass(frozen=True)
class Value:
    """A value that a block hands to later blocks.

    Attributes:
        name: of the traced node that computes it.
        shape: of a tensor, None in the place of the batch size; () for other values.
        dtype: of a tensor, as torch names it ("float32"); else the Python type ("int", "tuple").
        parts: the values in a tuple or a list, "" as their names.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    parts: tuple[Value, ...] = ()


@dataclass(frozen=True)
class Leaf:
    """A module that the trace did not look into although it has children.

    Attributes:
        qualname: of the module in the original model.
        kind: its class.
        reason: why it could not be traced.
        share: of the model's parameters that it holds, between 0 and 1.
    """

    qualname: str
    kind: str
    reason: str
    share: float


@dataclass(frozen=True)
class Node:
    """One node of a block, as it was traced.

    Attributes:
        name: of the fx node.
        call: what it calls: the qualname of a module, or the name of a function, a method or an attribute.
        is_module: whether that is a module.
        reads: names of the values that it reads, of this block or from outside.
        is_path: whether its value is what the block learns from: a float tensor that depends on an input and on a parameter.
        join: "sum", "cat" or "product" where several paths meet in it, "other" where they meet otherwise, "" elsewhere.
        paths: for each path that meets there, how many layers with parameters it has gone through since they parted.
    """

    name: str
    call: str
    is_module: bool
    reads: tuple[str, ...]
    is_path: bool = True
    join: str = ""
    paths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Block:
    """One block: the nodes between two cuts.

    Attributes:
        name: in the model's own words, the qualname of the module (or the first and last module) that it holds.
        target: the attribute of the cut model that runs it, "block_3" or "classifier".
        nodes: names of its fx nodes, in the order they run.
        output: name of the node whose value leaves it; the cut lies after this node.
        shape: of one sample's output, without the batch axis.
        channel_axis: axis of the channels in the batched output, 1 for (B, C, H, W), 2 for (B, T, C).
        inputs: names of the values that it reads from outside: model inputs, the output of the block before, side values.
        sides: names of values, other than the output, that it computes and later blocks read (masks, positions, skips).
        detached: the side values among `sides` that carry gradient, which the cut stops.
        modules: qualnames of the leaf modules that it calls, in order.
        parameters: names of its parameters in the original model.
        num_parameters: the number of scalars in them.
        macs: multiply-adds for one sample.
        activation_bytes: what its backward pass would keep for one sample as the model is written, without a head and before
            the rewrites that make blocks lean; `sffx.footprint` predicts the peak of a step as it is.
        gives: the values that it hands to later blocks: its output, then its side values.
        mask: name of the model input that tells which tokens of the output are real, "" where none does. Goodness and norm take it.
        graph: the same nodes, with what each of them does and reads.
    """

    name: str
    target: str
    nodes: tuple[str, ...]
    output: str
    shape: tuple[int, ...]
    channel_axis: int
    inputs: tuple[str, ...]
    sides: tuple[str, ...]
    detached: tuple[str, ...]
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    num_parameters: int
    macs: int
    activation_bytes: int
    gives: tuple[Value, ...] = ()
    mask: str = ""
    graph: tuple[Node, ...] = ()

    @property
    def joins(self) -> tuple[Node, ...]:
        """The nodes in which several paths inside the block meet, as a shortcut and what it goes round."""
        return tuple(node for node in self.graph if node.join)

    @property
    def channels(self) -> int:
        """The number of channels of the output."""
        return self.shape[self.channel_axis - 1]


GoodnessMaker: TypeAlias = Callable[[Block, int], nn.Module]
NormMaker: TypeAlias = Callable[[Block], nn.Module | None]


@dataclass(frozen=True)
class NotPickled:
    """The name of a callable, in an unpickled plan: a pickle holds the name alone."""

    name: str

    def __call__(self, *arguments: Any) -> Any:
        raise InputError(
            f"{self.name} is known by name only, since a pickle does not hold callables. "
            "Hint: pass the callable itself"
        )


def option_name(option: Any) -> str:
    """Return the name of a goodness or a norm; for a callable "module.qualname"."""
    if isinstance(option, str):
        return option
    if isinstance(option, NotPickled):
        return option.name
    while isinstance(option, partial):
        option = option.func
    named = option if hasattr(option, "__qualname__") else type(option)
    return f"{named.__module__}.{named.__qualname__}"


@dataclass(frozen=True)
class Options:
    """How the blocks of a cut model learn, and what is done to a value at a cut.

    These are arguments of `transform`, with their defaults. A pickle holds the names of callables
    only; a copy holds the callables.

    Attributes:
        goodness: "sff", an auxiliary convolution; "cwc", groups of channels; "cosine", a direction
            for each class; "mlp", a hidden layer before it; or a callable that makes the heads
            (`sffx.learning.heads`).
        kernel_size: of the auxiliary convolution.
        norm: after the detach: "layer", "none", or a callable that makes the norms
            (`sffx.learning.norms`).
    """

    goodness: str | GoodnessMaker = "sff"
    kernel_size: int = 1
    norm: str | NormMaker = "layer"

    @property
    def custom(self) -> list[str]:
        """The names of the options that are callables."""
        return [name for name in ("goodness", "norm") if callable(getattr(self, name))]

    def record(self) -> dict[str, Any]:
        """Return the options as numbers and strings, with the names of those that are callables."""
        return {
            "goodness": option_name(self.goodness),
            "kernel_size": self.kernel_size,
            "norm": option_name(self.norm),
            "custom": self.custom,
        }

    def __reduce__(self) -> Any:
        goodness = _pickled(self.goodness)
        return Options, (goodness, self.kernel_size, _pickled(self.norm))

    def __copy__(self) -> Options:
        return self

    def __deepcopy__(self, copied: dict[int, Any]) -> Options:
        return self


def _pickled(option: Any) -> str | NotPickled:
    return NotPickled(option_name(option)) if callable(option) else option


@dataclass(frozen=True)
class BlockPlan:
    """Where a model is cut. Frozen; prints as a table; `len` counts the feature blocks.

    Attributes:
        model: class of the original model.
        policy: name of the policy that chose the cuts.
        blocks: the feature blocks, in order.
        classifier: what is left of the model after the last cut.
        num_classes: J, the width of the model's output.
        inputs: the model's inputs as traced.
        leaves: modules with children that were not traced.
        notes: what the reader of the plan must know, one sentence each.
        options: how the blocks learn, and the norm between them.
    """

    model: str
    policy: str
    blocks: tuple[Block, ...]
    classifier: Block
    num_classes: int
    inputs: tuple[Input, ...]
    leaves: tuple[Leaf, ...]
    notes: tuple[str, ...]
    options: Options = Options()

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    @property
    def all_blocks(self) -> tuple[Block, ...]:
        """The feature blocks in order, and the classifier."""
        return (*self.blocks, self.classifier)

    @property
    def parts(self) -> tuple[tuple[str, ...], ...]:
        """The attributes of the cut model that each block is made of, in the order they run: the block and its head; the classifier."""
        feature_parts = [(block.target, head_name(i)) for i, block in enumerate(self.blocks)]
        return (*feature_parts, (self.classifier.target,))

    def record(self) -> dict[str, Any]:
        """Return how the model was cut, in numbers and strings: the entry "sffx_cut" of a checkpoint, for `sffx-viz` and `sffx-export`."""
        return {
            "policy": self.policy,
            "after": [block.output for block in self],
            "inputs": {
                each.name: {"shape": list(each.shape), "dtype": each.dtype} for each in self.inputs
            },
            "num_classes": self.num_classes,
            **self.options.record(),
        }

    @cached_property
    def _most_kept(self) -> int:
        return max(block.activation_bytes for block in self.all_blocks)

    def is_large(self, block: Block) -> bool:
        """Whether a block is among those that set the peak of a block-local step: it keeps more than two thirds of what the largest keeps.

        Computing again what costs little saves no more than about a third, so a smaller block has nothing to gain by it.
        """
        return 3 * block.activation_bytes > 2 * self._most_kept

    def __str__(self) -> str:
        rows = [_row(block) for block in self.all_blocks]
        widths = [max(len(row[i]) for row in (HEADER, *rows)) for i in range(len(HEADER))]
        return "\n".join(
            [self._heading(), *(_align(row, widths) for row in (HEADER, *rows)), *self._remarks()]
        )

    def _repr_html_(self) -> str:
        """The same table for a notebook."""
        head = "".join(f"<th>{escape(name)}</th>" for name in HEADER)
        rows = "".join(_html_row(_row(block)) for block in self.all_blocks)
        remarks = "".join(f"<p>{escape(remark)}</p>" for remark in self._remarks())
        return f"<table><caption>{escape(self._heading())}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{remarks}"

    def _heading(self) -> str:
        return f"{self.model}, policy {self.policy!r}: {len(self)} feature blocks and the classifier, {self.num_classes} classes"

    def _remarks(self) -> list[str]:
        lines = [
            f"crosses the cut after {block.target}: {', '.join(block.sides)}"
            for block in self.blocks
            if block.sides
        ]
        lines += [
            f"not traced: {leaf.qualname} ({leaf.kind}, {leaf.share:.0%} of the parameters): {leaf.reason}"
            for leaf in self.leaves
        ]
        return lines + [f"note: {note}" for note in self.notes]


def _row(block: Block) -> tuple[str, ...]:
    return (
        block.target,
        block.name,
        block.output,
        "x".join(map(str, block.shape)),
        f"{block.num_parameters:,}",
        f"{block.macs:,}",
        f"{block.activation_bytes / MIB:.2f} MiB",
    )


def _html_row(row: tuple[str, ...]) -> str:
    left = "".join(f'<td style="text-align: left">{escape(cell)}</td>' for cell in row[:4])
    return f"<tr>{left}{''.join(f'<td>{escape(cell)}</td>' for cell in row[4:])}</tr>"


def _align(row: tuple[str, ...], widths: list[int]) -> str:
    left = [cell.ljust(width) for cell, width in zip(row[:4], widths[:4], strict=True)]
    right = [cell.rjust(width) for cell, width in zip(row[4:], widths[4:], strict=True)]
    return "  ".join(left + right).rstrip()
