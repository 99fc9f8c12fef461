"""Measure what tracing, planning and cutting cost as models grow: CPU seconds, of a benchmark, not of a test.

    OMP_NUM_THREADS=1 python tools/scaling.py --out tools/results/scaling

1. `sffx.transform` of torchvision's ResNets, by phase. Each is the least of some rounds, after a small model has been cut to warm up.
2. `make_plan` by every policy that knows no sizes in bytes, on a chain with 1,000 candidates and more, already traced and analysed.
3. Trace, analysis and plan of synthetic models of 1,250 to 20,000 nodes. Where the seconds per 1,000 nodes stay the same, cost is linear.

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
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from sffx.compiler.analyse import Analysis, analyse
from sffx.compiler.partition import make_plan
from sffx.compiler.rewrite import rewrite
from sffx.compiler.trace import trace
from sffx.compiler.verify import verify
from sffx.learning.heads import make_heads
from sffx.learning.norms import SampleNorm
from sffx.policies import policy_named

_RESNETS = ("resnet50", "resnet101", "resnet152")
_POLICIES = ("layer", "residual", "batchnorm", "module(1)", "stages(4)", "stages(64)")
_SIZES = (1_250, 2_500, 5_000, 10_000, 20_000)
_WIDTH = 8


class Residual(nn.Module):
    """Two linear layers with a shortcut, (B, C) to (B, C); five nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(_WIDTH, _WIDTH), nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


def chain(nodes: int) -> nn.Module:
    layers = [layer for _ in range(nodes // 2) for layer in (nn.Linear(_WIDTH, _WIDTH), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(_WIDTH, 4))


def residual(nodes: int) -> nn.Module:
    return nn.Sequential(*(Residual() for _ in range(nodes // 5)), nn.Linear(_WIDTH, 4))


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


def planned(clock: Clock, model: nn.Module, x: Tensor, policy: str) -> tuple[Analysis, Any]:
    with clock.phase("trace"):
        traced = trace(model, x)
    with clock.phase("analyse"):
        analysis = analyse(traced)
        _ = analysis.steps
    with clock.phase("plan"):
        plan = make_plan(analysis, *policy_named(policy))
    return analysis, plan


def transformed(model: nn.Module, x: Tensor, policy: str = "residual") -> tuple[Clock, int, int]:
    """Do what `sffx.transform` does, phase by phase.

    Returns:
        The clock, and the numbers of nodes and of feature blocks.
    """
    clock = Clock()
    with torch.inference_mode(False):
        analysis, plan = planned(clock, model, x, policy)
        with clock.phase("rewrite"):
            heads = make_heads(plan, analysis.trace.root)
            net = rewrite(analysis.trace, plan, heads, [SampleNorm() for _ in plan])
        with clock.phase("verify"):
            verify(net, plan)
    return clock, len(analysis.nodes), len(plan)


def resnets(rounds: int) -> Iterator[str]:
    yield '### `sffx.transform`, 224 x 224, J = 10, policy "residual"'
    yield ""
    yield "| model | nodes | blocks | trace | analyse | plan | rewrite | verify | in all, s | per 1,000 nodes, s |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    x = torch.zeros(1, 3, 224, 224)
    transformed(torchvision.models.resnet18(num_classes=10), x)
    for name in _RESNETS:
        model = getattr(torchvision.models, name)(num_classes=10)
        clock, nodes, blocks = min(
            (transformed(model, x) for _ in range(rounds)), key=lambda run: run[0].total
        )
        phases = " | ".join(f"{seconds:.2f}" for seconds in clock.seconds.values())
        yield f"| {name} | {nodes} | {blocks} | {phases} | {clock.total:.2f} | {1000 * clock.total / nodes:.2f} |"


def policies(nodes: int, rounds: int) -> Iterator[str]:
    analysis = analyse(trace(chain(nodes), torch.zeros(1, _WIDTH)))
    yield f"### Planning alone: a chain of {nodes:,} nodes, {len(analysis.candidates):,} candidates"
    yield ""
    yield "| policy | blocks | seconds |"
    yield "|---|---|---|"
    for policy in _POLICIES:
        runs = [
            _timed(lambda policy=policy: make_plan(analysis, *policy_named(policy)))
            for _ in range(rounds)
        ]
        plan, seconds = min(runs, key=lambda run: run[1])
        yield f"| {policy} | {len(plan)} | {seconds:.3f} |"


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    result = run()
    return result, time.process_time() - start


def depths(
    kind: str, build: Callable[[int], nn.Module], policy: str, sizes: list[int]
) -> Iterator[str]:
    yield f'### Depth: {kind}, policy "{policy}"'
    yield ""
    yield "| nodes | blocks | trace | analyse | plan | in all, s | per 1,000 nodes, s |"
    yield "|---|---|---|---|---|---|---|"
    for size in sizes:
        clock = Clock()
        analysis, plan = planned(clock, build(size), torch.zeros(1, _WIDTH), policy)
        nodes = len(analysis.nodes)
        phases = " | ".join(f"{seconds:.2f}" for seconds in clock.seconds.values())
        yield f"| {nodes:,} | {len(plan):,} | {phases} | {clock.total:.1f} | {1000 * clock.total / nodes:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("tools/results/scaling"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=list(_SIZES),
        help="numbers of nodes of the synthetic models",
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    machine = (
        f"{platform.machine()}, {torch.get_num_threads()} thread of {os.cpu_count()} shared cores"
    )
    lines = [f"{date.today()}, {machine}, torch {torch.__version__}, CPU seconds:", ""]
    lines += ["    OMP_NUM_THREADS=1 python tools/scaling.py", ""]
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
            (args.out / "table.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
