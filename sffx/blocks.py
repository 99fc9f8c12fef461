"""The block plan: where a model is cut, and all facts that the rewrite and the drawing need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from sffx.arguments import Arguments
from sffx.errors import InputError
from sffx.objective import DEFAULT, Objective
from sffx.parts import head_name
from sffx.picklable import import_name
from sffx.plan_table import plan_html, plan_text
from sffx.tasks import CLASSIFICATION, Task, task_record


@dataclass(frozen=True)
class Input:
    """One input of the model, as it was traced.

    Attributes:
        name: the argument of the model's `forward`.
        shape: of one sample, without the batch axis.
        dtype: of the tensor, as torch names it ("float32", "int64").
        high: for integers, one more than the largest valid value (an embedding's rows); else 0.
        marks_tokens: whether it is an attention mask (B, T), with zeros for padding.
        low: for integers, the smallest valid value: 1 for lengths of packed sequences.
        value: its name among the values that blocks read; "" where it is the same.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    high: int = 0
    marks_tokens: bool = False
    low: int = 0
    value: str = ""

    @property
    def shape_in_words(self) -> str:
        """The shape of a batch, such as "(B, 3, 32, 32)"."""
        sizes = ", ".join(["B", *map(str, self.shape)])
        return f"({sizes})"

    @property
    def is_float(self) -> bool:
        """Whether it holds floats."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype.is_floating_point


@dataclass(frozen=True)
class BatchAxis:
    """The axis of a tensor that holds the samples of the batch.

    Attributes:
        axis: its index.
        rows: along it for each sample; more than one where other axes are folded into it.
        slower: how many of them lie whole batches apart. It is 1 where the rows of a sample are
            neighbours, as of (B, N) flattened, and `rows` where they are not, as of (N, B)
            flattened; None where it cannot be told.
        permuted: whether the samples lie in another order than those of the inputs, as after a sort
            by length.
        alike: whether the rows tell nothing about samples, as those of a repeated token, so that
            they have any order. `slower` is None then.
    """

    axis: int
    rows: int = 1
    slower: int | None = 1
    permuted: bool = field(default=False, compare=False)
    alike: bool = field(default=False, compare=False, repr=False)


@dataclass(frozen=True)
class Value:
    """A value that a block hands to later blocks.

    Attributes:
        name: of the traced node that computes it.
        shape: of a tensor, None for sizes that depend on the batch; () for other values.
        dtype: of a tensor, as torch names it ("float32"); else the Python type ("int", "tuple").
        parts: the values in a tuple or a list, "" as their names.
        batch: the batch axis of a tensor; None where it has none or it cannot be told.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    parts: tuple[Value, ...] = ()
    batch: BatchAxis | None = None


@dataclass(frozen=True)
class Output:
    """A value that crosses a cut with the gradient cut off, and normalised.

    Attributes:
        name: of the node that computes it.
        shape: of one sample, without the batch axis.
        channel_axis: of the batched value, 1 for (B, C, H, W), 2 for (B, T, C).
        mask: name of the model input that marks its real tokens, "" for none.
        is_scored: whether the head of the block reads it.
        is_folded: whether the first axis of `shape` counts instances.
    """

    name: str
    shape: tuple[int, ...]
    channel_axis: int
    mask: str = ""
    is_scored: bool = True
    is_folded: bool = False


@dataclass(frozen=True)
class Leaf:
    """A module with children that the trace did not look into.

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
        call: qualname of the module, or name of the function, method or attribute, that it calls.
        is_module: whether that is a module.
        reads: names of the values that it reads, of this block or from outside.
        is_path: whether its value is one that the block learns from: a float tensor that depends
            on an input and on a parameter.
        join: how paths meet in it, "sum", "cat", "product" or "other"; "" where no paths meet.
        paths: for each path that meets there, the number of layers with parameters on it since the
            paths parted.
        arguments: of the call, with "%0" for the first of the values that it reads.
    """

    name: str
    call: str
    is_module: bool
    reads: tuple[str, ...]
    is_path: bool = True
    join: str = ""
    paths: tuple[int, ...] = ()
    arguments: str = ""


@dataclass(frozen=True)
class Block:
    """One block: the nodes between two cuts.

    A side value is a value other than the output that later blocks read: a mask, positions, a skip
    connection. Where streams run side by side, several values take paths across the cut. One of
    them is the output, and the others are `beside` it, and side values too.

    Attributes:
        name: qualname of the module that it holds, or of the first and the last one.
        target: the attribute of the cut model that runs it, "block_3" or "classifier".
        nodes: names of its fx nodes, in the order they run.
        output: name of the node whose value leaves it; the cut lies after this node. Of several
            values, it is the last that is computed with parameters of the block.
        shape: of one sample's output, without the batch axis.
        channel_axis: of the batched output, 1 for (B, C, H, W), 2 for (B, T, C).
        inputs: names of the values that it reads from outside: model inputs, the output of the
            block before, side values.
        sides: names of its side values.
        detached: names of the side values that carry gradient, which the cut stops.
        modules: qualnames of the leaf modules that it calls, in order.
        parameters: names of its parameters in the original model.
        num_parameters: the number of scalars in them.
        macs: multiply-adds for one sample.
        activation_bytes: the bytes that the original model would keep for its backward pass, for
            one sample. Heads and memory-saving rewrites do not count here. `sffx.footprint`
            predicts the peak of a real step.
        gives: the values that it hands to later blocks: its output, then its side values.
        mask: name of the model input that marks the real tokens of the output, "" for none. The
            goodness and the norm read it.
        beside: the values, besides the output, that paths take across the cut. The gradient of
            each is cut off and the value normalised once, here, though it may cross later cuts as
            well. The head reads those that lead to no other of the values, and that a
            parameter of the block leads to.
        graph: a record of each of its nodes: what it calls and reads.
        is_folded: whether the first axis of `shape` counts instances, which the model folds into
            the batch: frames, or images of a bag. A head scores single instances.
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
    is_folded: bool = False
    beside: tuple[Output, ...] = ()

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The output, and then the values beside it."""
        main = Output(
            self.output, self.shape, self.channel_axis, self.mask, is_folded=self.is_folded
        )
        return (main, *self.beside)

    @property
    def scored(self) -> tuple[Output, ...]:
        """The values that the head reads. Each parameter of the block leads to one of them."""
        return tuple(output for output in self.outputs if output.is_scored)

    @property
    def cut(self) -> str | tuple[str, ...]:
        """What names the cut: the output; with values beside it, their names and its name."""
        if not self.beside:
            return self.output
        return (*(output.name for output in self.beside), self.output)

    def seen_from(self, output: Output) -> Block:
        """Return the block as a goodness or a norm sees it, with one output alone."""
        return replace(
            self,
            output=output.name,
            shape=output.shape,
            channel_axis=output.channel_axis,
            mask=output.mask,
            is_folded=output.is_folded,
        )

    @property
    def joins(self) -> tuple[Node, ...]:
        """The nodes in which several paths meet, such as a shortcut and the layers beside it."""
        return tuple(node for node in self.graph if node.join)

    @property
    def channels(self) -> int:
        """The number of channels of the output."""
        return self.shape[self.channel_axis - 1]


GoodnessMaker: TypeAlias = Callable[[Block, int], nn.Module]
NormMaker: TypeAlias = Callable[[Block], nn.Module | None]

# The names that type checkers and editors know. Some take numbers as well: "mlp(256, 4)".
GoodnessName: TypeAlias = Literal["sff", "cwc", "cosine", "mlp", "auto", "shared"]
NormName: TypeAlias = Literal["layer", "length", "none"]


@dataclass(frozen=True)
class NotPickled:
    """Stands for a callable in an unpickled plan, since a pickle holds only the callable's name."""

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
    # A partial has no name of its own.
    while isinstance(option, partial):
        option = option.func
    return import_name(option)


@dataclass(frozen=True)
class Options:
    """How the blocks of a cut model learn, and which norm stands at a cut.

    These are arguments of `transform`, with their defaults. A pickle holds only the names of
    callables. A copy holds the callables.

    Attributes:
        goodness: "sff", an auxiliary convolution; "cwc", groups of channels; "cosine", a direction
            for each class; "mlp", a hidden layer before it; "auto", the same of a size that fits
            the block; or a callable that makes the heads (`sffx.learning.heads`).
        kernel_size: of the auxiliary convolution.
        norm: after the detach: "layer", "none", or a callable that makes the norms
            (`sffx.learning.norms`).
        recompute: whether the largest blocks compute cheap values again in their backward pass.
        objective: how a block learns (`sffx.objective`). Where the heads are the objective's own,
            `goodness` is its name.
    """

    goodness: str | GoodnessMaker = "sff"
    kernel_size: int = 1
    norm: str | NormMaker = "layer"
    recompute: bool = True
    objective: Objective = DEFAULT

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
        norm = _pickled(self.norm)
        return Options, (goodness, self.kernel_size, norm, self.recompute, self.objective)

    # Without these two, copies would be made by `__reduce__` and lose the callables.
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
        classifier: the part of the model after the last cut.
        num_classes: J, the width of the model's output: classes, labels or numbers.
        inputs: the model's inputs as traced.
        arguments: of the model's forward, in which the inputs lie; None where each input is one.
        leaves: modules with children that were not traced.
        notes: remarks for the reader of the plan, one sentence each.
        options: how the blocks learn, and the norm between them.
        task: what the model predicts, and what a target is.
        output_keys: the keys and indices that lead to the output in what the model returns.
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
    arguments: Arguments | None = None
    task: Task = CLASSIFICATION
    output_keys: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    @property
    def objective(self) -> Objective:
        """How the blocks learn."""
        return self.options.objective

    @property
    def all_blocks(self) -> tuple[Block, ...]:
        """The feature blocks in order, and the classifier."""
        return (*self.blocks, self.classifier)

    @property
    def nested(self) -> Arguments | None:
        """The arguments of the model's forward, None where each is one input of the same name."""
        if self.arguments is None or self.arguments.is_flat:
            return None
        return self.arguments

    def call_arguments(
        self, inputs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """Return the arguments of a call of the model, given the inputs by name."""
        if self.arguments is None:
            return (), inputs
        return self.arguments.fill(inputs)

    def input_values(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the values of the inputs, in order, given the arguments of a call.

        Raises:
            InputError: the model was cut for other arguments.
        """
        assert self.arguments is not None
        return tuple(self.arguments.inputs_in(args, kwargs).values())

    @property
    def parts(self) -> tuple[tuple[str, ...], ...]:
        """The attributes of the cut model that make up each block, in the order they run.

        These are a block and its head; for the classifier, itself.
        """
        feature_parts = [(block.target, head_name(i)) for i, block in enumerate(self.blocks)]
        return (*feature_parts, (self.classifier.target,))

    def record(self) -> dict[str, Any]:
        """Return how the model was cut, in numbers and strings.

        It is the entry "sffx_cut" of a checkpoint, which `sffx-viz` and `sffx-export` read.
        """
        inputs = {}
        for value in self.inputs:
            inputs[value.name] = {"shape": list(value.shape), "dtype": value.dtype}
        # None as well where the inputs say it all, or where JSON has no form for an argument.
        arguments = None if self.arguments is None else self.arguments.record()
        record: dict[str, Any] = {
            "policy": self.policy,
            "after": [_as_json(block.cut) for block in self],
            "inputs": inputs,
            "num_classes": self.num_classes,
            **self.options.record(),
        }
        if arguments is not None:
            record["arguments"] = arguments
        # A record without a task is one of classification, as all were once.
        if self.task != CLASSIFICATION:
            record["task"] = task_record(self.task)
        if self.objective != DEFAULT:
            record["objective"] = self.objective.record()
        return record

    @cached_property
    def _most_kept(self) -> int:
        return max(block.activation_bytes for block in self.all_blocks)

    def is_large(self, block: Block) -> bool:
        """Return whether a block is among those that set the peak of a block-local step.

        A block is large if it keeps more than two thirds of what the largest block keeps.
        Recomputation saves a third at most, about. So the largest block still sets the peak, and
        recomputation in a block that is not large would not lower it.
        """
        return 3 * block.activation_bytes > 2 * self._most_kept

    def __str__(self) -> str:
        return plan_text(self)

    def _repr_html_(self) -> str:
        """Return the same table for a notebook."""
        return plan_html(self)


def _as_json(cut: str | tuple[str, ...]) -> str | list[str]:
    return cut if isinstance(cut, str) else list(cut)
