"""Measure the time that tracing, planning and cutting take as models grow, in CPU seconds.

    OMP_NUM_THREADS=1 python -m tools.scaling --out tools/results/scaling

1. `sffx.transform` of torchvision's ResNets, by phase. Each figure is the least of some rounds. A
   small model is cut first, to warm up.
2. The plan by every policy that knows no sizes in bytes, on a chain with 1,000 candidates and
   more, which is traced and analysed already.
3. Trace, analysis and plan of synthetic models of 1,250 to 20,000 nodes. Where the seconds per
   1,000 nodes stay the same, the cost is linear.

CPU time is counted, not wall time, so that other work on the machine matters less.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from sffx.blocks import BlockPlan, Options
from sffx.compiler.analyse import Analysis, analyse
from sffx.compiler.fake import failures_unlogged
from sffx.compiler.inplace import keep_foreign_values
from sffx.compiler.memory import save_memory
from sffx.compiler.partition import partition
from sffx.compiler.policies import select
from sffx.compiler.rewrite import rewrite
from sffx.compiler.trace.trace import trace
from sffx.compiler.verify import verify
from sffx.learning.heads import make_heads
from sffx.learning.norms import make_norms
from sffx.policies import policy_named
from tools.options import at_least

RESNETS = ("resnet50", "resnet101", "resnet152")
POLICIES = ("layer", "residual", "batchnorm", "module(1)", "stages(4)", "stages(64)")
SIZES = (1_250, 2_500, 5_000, 10_000, 20_000)
WIDTH = 8


class Residual(nn.Module):
    """Two linear layers with a shortcut, (B, C) to (B, C); five nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


def chain(nodes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(nodes // 2):
        layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 4))


def residual(nodes: int) -> nn.Module:
    return nn.Sequential(*(Residual() for _ in range(nodes // 5)), nn.Linear(WIDTH, 4))


class Clock:
    """Collects the CPU seconds of named phases, in the order they first ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[name] = time.process_time() - start

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def cells(self) -> str:
        """The seconds of all phases, as cells of a table."""
        return " | ".join(f"{seconds:.2f}" for seconds in self.seconds.values())


class Run(NamedTuple):
    """The clock of a cut, and the numbers of nodes and of feature blocks."""

    clock: Clock
    nodes: int
    blocks: int

    @property
    def per_thousand(self) -> str:
        return f"{1000 * self.clock.total / self.nodes:.2f}"


def analyse_and_plan(
    clock: Clock, model: nn.Module, x: Tensor, policy: str
) -> tuple[Analysis, BlockPlan]:
    with clock.phase("trace"):
        traced = trace(model, x)
    with clock.phase("analyse"):
        analysis = analyse(traced)
        _ = analysis.steps  # computed when it is first read
    with clock.phase("plan"):
        plan = plan_by(analysis, policy)
    return analysis, plan


def plan_by(analysis: Analysis, policy: str) -> BlockPlan:
    """Return the plan of a policy."""
    name, function = policy_named(policy)
    cuts = select(analysis, function, Options())
    return partition(analysis, cuts, Options(), policy=name)


def timed_transform(model: nn.Module, x: Tensor, policy: str = "residual") -> Run:
    """Cut a model as `sffx.transform` does, phase by phase."""
    clock = Clock()
    with torch.inference_mode(False):
        analysis, plan = analyse_and_plan(clock, model, x, policy)
        with clock.phase("rewrite"):
            heads = make_heads(plan, analysis.trace.root)
            norms = make_norms(plan, analysis.trace.root)
            net = rewrite(analysis.trace, plan, heads, norms)
            keep_foreign_values(net)
            save_memory(net)
        with clock.phase("verify"):
            verify(net)
    return Run(clock, len(analysis.nodes), len(plan))


def resnets(rounds: int) -> Iterator[str]:
    yield '### `sffx.transform`, 224 x 224, J = 10, policy "residual"'
    yield ""
    phases = "trace | analyse | plan | rewrite | verify"
    yield f"| model | nodes | blocks | {phases} | in all, s | per 1,000 nodes, s |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    x = torch.zeros(1, 3, 224, 224)
    timed_transform(torchvision.models.resnet18(num_classes=10), x)
    for name in RESNETS:
        model = getattr(torchvision.models, name)(num_classes=10)
        runs = [timed_transform(model, x) for _ in range(rounds)]
        best = min(runs, key=lambda run: run.clock.total)
        cells = f"{best.nodes} | {best.blocks} | {best.clock.cells} | {best.clock.total:.2f}"
        yield f"| {name} | {cells} | {best.per_thousand} |"


def policies(nodes: int, rounds: int) -> Iterator[str]:
    analysis = analyse(trace(chain(nodes), torch.zeros(1, WIDTH)))
    yield f"### Planning alone: a chain of {nodes:,} nodes, {len(analysis.candidates):,} candidates"
    yield ""
    yield "| policy | blocks | seconds |"
    yield "|---|---|---|"
    for policy in POLICIES:
        seconds = []
        for _ in range(rounds):
            start = time.process_time()
            plan = plan_by(analysis, policy)
            seconds.append(time.process_time() - start)
        yield f"| {policy} | {len(plan)} | {min(seconds):.3f} |"


def depths(
    kind: str, build: Callable[[int], nn.Module], policy: str, sizes: list[int]
) -> Iterator[str]:
    yield f'### Depth: {kind}, policy "{policy}"'
    yield ""
    yield "| nodes | blocks | trace | analyse | plan | in all, s | per 1,000 nodes, s |"
    yield "|---|---|---|---|---|---|---|"
    for size in sizes:
        clock = Clock()
        analysis, plan = analyse_and_plan(clock, build(size), torch.zeros(1, WIDTH), policy)
        run = Run(clock, len(analysis.nodes), len(plan))
        cells = f"{run.nodes:,} | {run.blocks:,} | {clock.cells} | {clock.total:.1f}"
        yield f"| {cells} | {run.per_thousand} |"


@failures_unlogged()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("tools/results/scaling"))
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=list(SIZES),
        help="numbers of nodes of the synthetic models",
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    threads = f"{torch.get_num_threads()} thread of {os.cpu_count()} shared cores"
    machine = f"{platform.machine()}, {threads}"
    lines = [
        f"{date.today()}, {machine}, torch {torch.__version__}, CPU seconds:",
        "",
        "    OMP_NUM_THREADS=1 python -m tools.scaling",
        "",
    ]
    sections = (
        resnets(args.rounds),
        policies(2_500, args.rounds),
        depths("a chain of linear layers and ReLUs", chain, "layer", args.sizes),
        depths("residual blocks of two linear layers", residual, "residual", args.sizes),
    )
    for section in sections:
        for line in itertools.chain(section, [""]):
            print(line, flush=True)
            lines.append(line)
            # After each line, so that an interrupted run leaves what it has.
            (args.out / "table.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
