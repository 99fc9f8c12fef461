"""Predict how fast ways to train in parallel are, by a discrete-event model.

    OMP_NUM_THREADS=1 python -m tools.parallel_model --out tools/results/parallel

The costs of blocks are counted on fake tensors. The machines are assumed. What the model predicts
of two processes on a CPU stands beside what `python -m tools.pipeline` measured. What it predicts
of stages that sleep stands beside what `python -m tools.parallel_model.sleeping` measured before.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from sffx.files import write
from tools.parallel_model.counts import BlockCost
from tools.parallel_model.models import MODELS
from tools.parallel_model.page import BATCHES, CLUSTERS, Costs, outcomes, page


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("tools/results/parallel"))
    parser.add_argument(
        "--measured",
        type=Path,
        default=Path("tools/results/pipeline/record.json"),
        help="the record of tools.pipeline",
    )
    parser.add_argument("--costs", type=Path, help="a record whose counts are used again")
    args = parser.parse_args(arguments)
    costs = _counted() if args.costs is None else _read(args.costs)
    measured = json.loads(args.measured.read_text()) if args.measured.exists() else None
    sleeping = args.out / "sleeping.json"
    slept = json.loads(sleeping.read_text()) if sleeping.exists() else []
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "table.md", page(costs, measured, slept).encode())
    record = {"costs": _to_json(costs), "outcomes": _outcomes(costs)}
    write(args.out / "record.json", (json.dumps(record, indent=1) + "\n").encode())


def _counted() -> Costs:
    return {(model.name, model.cut): model.count() for model in MODELS}


def _to_json(costs: Costs) -> list[dict[str, Any]]:
    """Return the costs for a record. Blocks that are alike stand there once."""
    entries = []
    for (name, cut), blocks in costs.items():
        runs = []
        for block, alike in groupby(blocks):
            runs.append({"times": len(list(alike)), "block": block.to_json()})
        entries.append({"model": name, "cut": cut, "blocks": runs})
    return entries


def _read(path: Path) -> Costs:
    """Return the costs in a record."""
    costs: Costs = {}
    for entry in json.loads(path.read_text())["costs"]:
        blocks: list[BlockCost] = []
        for run in entry["blocks"]:
            blocks += [BlockCost.from_json(run["block"])] * run["times"]
        costs[entry["model"], entry["cut"]] = blocks
    return costs


def _outcomes(costs: Costs) -> list[dict[str, Any]]:
    entries = []
    for name, unit in dict.fromkeys((model.name, model.unit) for model in MODELS):
        for cluster in CLUSTERS:
            for batch in BATCHES[unit]:
                ways = outcomes(costs, name, cluster, batch)
                by_way = {way: asdict(outcome) for way, outcome in ways.items()}
                entries.append(
                    {"model": name, "cluster": cluster.name, "of_machine": batch, "ways": by_way}
                )
    return entries


if __name__ == "__main__":
    main()
