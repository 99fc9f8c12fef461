"""Count what compiled steps call and what it takes to compile them, without a compiler of C++.

    python -m tools.compiled --out tools/results/operations

torch's inductor turns each graph into Python code that calls fused kernels, whose C++ is a part of
that code, and single operators of torch, such as convolutions. Here it writes this code, which is
counted. The graphs then run as they are, so neither time nor a C++ compiler is needed.
"""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import fresh_cache

import sffx
from sffx.files import write

# The C++ of a kernel, the call of a kernel, and that of an operator of torch.
_SOURCE = re.compile(r"async_compile\.cpp_pybinding\(.*?r'''(.*?)'''\)", re.DOTALL)
_KERNEL = re.compile(r"^\s+cpp_fused\w*\(", re.MULTILINE)
_OPERATOR = re.compile(r"(?:extern_kernels\.\w+|torch\.ops\.[\w.]+)\(")

# Where the kernels of a graph end and the function that calls them begins.
_CALLER = "def call("


@dataclass
class Compiled:
    """What inductor made of the graphs of a step.

    Attributes:
        graphs: how many there are.
        nodes: the operations in them, before they are fused.
        sources: the C++ of the distinct kernels, each of which is compiled.
        kernels: the calls of kernels, in the last step.
        operators: the calls of single operators, such as convolutions, in the last step.
    """

    graphs: int = 0
    nodes: int = 0
    sources: set[str] = field(default_factory=set)
    kernels: int = 0
    operators: int = 0

    @property
    def calls(self) -> int:
        return self.kernels + self.operators

    def note(self, graph: GraphLowering, code: str) -> Callable[[Any], Any]:
        """Add a graph and the code that was made of it; return what runs it and counts its calls.

        Blocks that are alike run the same graph.
        """
        self.graphs += 1
        self.nodes += sum(node.op == "call_function" for node in graph.orig_gm.graph.nodes)
        kernels, _, caller = code.partition(_CALLER)
        self.sources.update(_SOURCE.findall(kernels))
        run = graph.orig_gm
        calls_of_kernels = len(_KERNEL.findall(caller))
        calls_of_operators = len(_OPERATOR.findall(caller))

        def call(inputs: Any) -> Any:
            self.kernels += calls_of_kernels
            self.operators += calls_of_operators
            return list(run(*inputs))

        return call


@contextmanager
def counted_code() -> Iterator[Compiled]:
    """Count the code that inductor writes inside, and run the graphs as they are."""
    found = Compiled()

    def module_of(graph: GraphLowering) -> Any:
        code, _ = graph.codegen()
        return SimpleNamespace(call=found.note(graph, code.value), __file__="", key="")

    with fresh_cache(), mock.patch.object(GraphLowering, "_compile_to_module", module_of):
        torch.compiler.reset()
        yield found


def by_backpropagation(model: nn.Module, x: Tensor, y: Tensor) -> Compiled:
    """Count the compiled step of a model."""
    module = copy.deepcopy(model)
    module.compile()
    return _count(lambda: F.cross_entropy(module(x), y))


def by_local_loss(model: nn.Module, x: Tensor, y: Tensor, goodness: str = "sff") -> Compiled:
    """Count the step of a model that is cut and compiled by `sffx.compile`."""
    net = sffx.transform(model, example_input=x[:1], goodness=goodness, check=False)
    sffx.compile(net)
    return _count(lambda: sffx.local_loss(net, x, y))


def _count(loss: Callable[[], Tensor]) -> Compiled:
    with counted_code() as found:
        for _ in range(2):  # blocks are compiled in the second step
            found.kernels = found.operators = 0
            loss().backward()
    return found


# The workloads of `python -m tools.bench --parts compiled`.
CASES = (("resnet18", 32, 128), ("mobilenet_v3_small", 64, 64))


def table() -> str:
    lines = [
        "| step | calls | / BP | kernels | operators | graphs | operations | distinct kernels |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, size, batch in CASES:
        torch.manual_seed(0)
        model = getattr(torchvision.models, name)(num_classes=10).train()
        x, y = torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))
        base = by_backpropagation(model, x, y)
        lines.append(_row(f"{name}, {size}, J = 10, BP", base, base))
        lines.append(_row("`sff`", by_local_loss(model, x, y), base))
    return "\n".join(lines)


def _row(name: str, found: Compiled, base: Compiled) -> str:
    cells = [name, found.calls, f"{found.calls / base.calls:.2f}", found.kernels, found.operators]
    cells += [found.graphs, found.nodes, len(found.sources)]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("tools/results/operations"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    heading = f"Counted on {date.today()} with torch {torch.__version__}, for a CPU."
    write(args.out / "compiled.md", f"{heading}\n\n{table()}\n".encode())


if __name__ == "__main__":
    main()
