"""Count the operations that a computation dispatches, and the bytes that they move.

On a GPU each operation is a launch of at least one kernel. A step of small operations takes the
time of its launches. A step of large ones takes at least the time of its bytes or of its
multiply-adds. Counts are exact, and need neither a GPU nor time: they are taken on fake tensors.

    python -m tools.operations --out tools/results/operations

Views and `prim` operations launch nothing, and are left out. The source of an operation is the part
of a block-local step that it comes from: the block, its head, the norm behind it, the loss, or
handing the gradients over. An operation of a backward pass has the source of the operation in the
forward pass that it belongs to.
"""

from __future__ import annotations

import argparse
import bisect
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sffx
import sffx.runtime.learn
import sffx.runtime.step
from sffx.compiler.fake import fake_copy
from sffx.files import write
from sffx.runtime.stage import Stage

# Where operations come from. "gradients" is what belongs to no part of a block-local step: handing
# the gradients to the parameters.
SOURCES = ("block", "head", "norm", "loss", "gradients")

# These make a tensor like another one, and do not read it.
_CREATIONS = ("zeros", "ones", "full", "scalar_tensor")


@dataclass
class Operations:
    """What a computation dispatched.

    Attributes:
        forward: the number of operations by source, outside of backward passes.
        backward: the same in backward passes.
        names: the number of operations by name.
        moved: bytes that the operations read and wrote, as if none of them stayed in a cache.
    """

    forward: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)
    names: Counter[str] = field(default_factory=Counter)
    moved: int = 0

    @property
    def total(self) -> int:
        return self.names.total()


class _Counting(TorchDispatchMode):
    """Counts every operation that is dispatched inside."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = Operations()
        self._source = "gradients"
        # Autograd numbers its functions in the order in which the forward pass makes them. So a
        # function has the source that began last before its number.
        self._beginnings = [0]
        self._sources = [self._source]

    @contextmanager
    def source(self, name: str) -> Iterator[None]:
        """Let the operations inside, and those of their backward pass, have a source."""
        outer = self._source
        self._begin(name)
        try:
            yield
        finally:
            self._begin(outer)

    def _begin(self, name: str) -> None:
        self._source = name
        self._beginnings.append(torch.autograd._get_sequence_nr())
        self._sources.append(name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "prim" or func.is_view:
            return result
        operations = self.operations
        operations.names[str(func)] += 1
        operations.moved += bytes_moved(func, args, kwargs, result)
        function = torch._C._current_autograd_node()
        if function is None:
            operations.forward[self._source] += 1
        else:
            operations.backward[self._source_of(function)] += 1
        return result

    def _source_of(self, function: Any) -> str:
        """Return the source of an autograd function."""
        # What adds to `.grad` has no place in the order of the forward pass.
        if "AccumulateGrad" in function.name():
            return "gradients"
        place = bisect.bisect_right(self._beginnings, function._sequence_nr())
        return self._sources[place - 1]


def bytes_moved(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Return the bytes of the tensors that an operation reads, plus those that it writes."""
    name = func._schema.name.split("::")[1].removeprefix("new_")
    if name.startswith("empty"):
        return 0
    # A `foreach` in place returns nothing. It writes on its first argument.
    written = _size(result) if func._schema.returns else _size(args[0])
    if name.startswith(_CREATIONS):
        return written
    only_written = [each.name for each in func._schema.arguments if each.is_out]
    read = [value for name, value in kwargs.items() if name not in only_written]
    return written + _size([args, read])


def _size(values: Any) -> int:
    """Return the bytes in memory of all tensors in a structure. A broadcast value counts once."""
    size = 0
    for value in tree_leaves(values):
        if isinstance(value, Tensor):
            lengths = zip(value.shape, value.stride(), strict=True)
            distinct = [length for length, stride in lengths if stride or not length]
            size += math.prod(distinct) * value.itemsize
    return size


@contextmanager
def counted_operations() -> Iterator[Operations]:
    """Count what is dispatched inside, by source where it is a block-local step."""
    counting = _Counting()
    run_node = Stage._run

    def run(stage: Stage, node: fx.Node, values: Any) -> None:
        with counting.source(_source_of_node(node)):
            run_node(stage, node, values)

    def with_loss(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with counting.source("loss"):
                return function(*args)

        return call

    with ExitStack() as contexts:
        contexts.enter_context(mock.patch.object(Stage, "_run", run))
        for owner, name in ((sffx.runtime.learn, "learn_stage"), (sffx.runtime.step, "total")):
            patched = with_loss(getattr(owner, name))
            contexts.enter_context(mock.patch.object(owner, name, patched))
        contexts.enter_context(counting)
        yield counting.operations


def _source_of_node(node: fx.Node) -> str:
    """Return what a node of a cut model's outer graph belongs to."""
    for source in ("head", "norm"):
        if node.op == "call_module" and str(node.target).startswith(source):
            return source
    return "block"


# The record


@dataclass(frozen=True)
class Case:
    """A step to count, by `local_loss` or by backpropagation.

    Attributes:
        model: its name in torchvision.
        size: height and width of an image.
        classes: J.
        batch: B. With many classes, heads take a batch in as many parts as it has to.
        goodness: of the heads; None for backpropagation.
    """

    model: str
    size: int
    classes: int
    batch: int
    goodness: str | None = "sff"

    def count(self, device: str = "cpu") -> Operations:
        """Count forward and backward of a step, without computing anything.

        Args:
            device: "cpu", whose operations are taken on fake tensors; or "meta", which takes the
                way of a GPU wherever there are two.
        """
        torch.manual_seed(0)
        model = getattr(torchvision.models, self.model)(num_classes=self.classes).train()
        net: nn.Module = model
        if self.goodness is not None:
            example = torch.zeros(1, 3, self.size, self.size)
            net = sffx.transform(model, example_input=example, goodness=self.goodness)
        if device == "meta":
            return self._count(net.to("meta"))
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fake = fake_copy(net, mode)
        with mode:
            return self._count(fake)

    def _count(self, net: nn.Module) -> Operations:
        device = next(net.parameters()).device
        x = torch.randn(self.batch, 3, self.size, self.size, device=device)
        y = torch.randint(0, self.classes, (self.batch,), device=device)
        with counted_operations() as operations:
            self._loss(net, x, y).backward()
        return operations

    def _loss(self, net: Any, x: Tensor, y: Tensor) -> Tensor:
        if self.goodness is None:
            return F.cross_entropy(net(x), y)
        return sffx.local_loss(net, x, y)


CASES = (
    Case("resnet18", 32, 10, 128),
    Case("resnet18", 32, 10, 128, "mlp"),
    Case("resnet18", 32, 10, 128, "mlp(256, 4)"),
    Case("resnet50", 224, 1000, 64),
    Case("resnet50", 224, 1000, 64, "mlp"),
    Case("mobilenet_v3_large", 224, 10, 64),
    Case("mobilenet_v3_large", 224, 10, 64, "mlp"),
)


def table(device: str) -> str:
    """Count all cases, and return them as a table."""
    columns = "operations | / BP | bytes / BP"
    for source in SOURCES:
        columns += f" | {source}"
    lines = [f"| step | {columns} |", "|---" * (len(SOURCES) + 4) + "|"]
    bases: dict[Case, Operations] = {}
    for case in CASES:
        alone = replace(case, goodness=None)
        if alone not in bases:
            bases[alone] = alone.count(device)
            name = f"{case.model}, {case.size}, J = {case.classes}, BP"
            lines.append(_row(name, bases[alone], bases[alone]))
        base = bases[alone]
        lines.append(_row(f"`{case.goodness}`", case.count(device), base))
    return "\n".join(lines)


def _row(name: str, found: Operations, base: Operations) -> str:
    cells = [name, str(found.total)]
    cells += [f"{found.total / base.total:.2f}", f"{found.moved / base.moved:.2f}"]
    for source in SOURCES:
        forward, backward = found.forward[source], found.backward[source]
        cells.append(f"{forward} + {backward}" if found is not base else "–")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("tools/results/operations"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    page = [
        f"Counted on {date.today()} with torch {torch.__version__}. Forward + backward by source.",
        f"### On a CPU\n\n{table('cpu')}",
        f"### On a GPU\n\n{table('meta')}",
    ]
    write(args.out / "table.md", ("\n\n".join(page) + "\n").encode())


if __name__ == "__main__":
    main()
