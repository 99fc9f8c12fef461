"""The record as a page and as plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sffx.tables import MIB
from tools.bench.counting import parts_when_timed
from tools.bench.ways import WAYS

# Counted columns, relative to BP, with their titles.
RELATIVE = {
    "peak": "peak",
    "activations": "activations",
    "macs": "multiply-adds",
    "operations": "operations",
    "bytes_moved": "bytes moved",
}


def table(record: dict[str, Any]) -> str:
    """Return one workload as a table. Everything but the bytes is relative to BP."""
    base = record["counts"]["BP"]
    batches = f"memory at batch {record['batch']}, time at {record.get('time_batch', '–')}"
    titles = ["way", "time", *RELATIVE.values(), "peak, MiB", "activations, MiB", "gradients, MiB"]
    lines = [
        f"### {record['name']} ({batches})",
        "",
        f"| {' | '.join(titles)} |",
        "|" + "---|" * len(titles),
    ]
    for way in WAYS:
        if way in record["counts"] or way in record.get("time", {}):
            lines.append(_row(way, record))
    parameters = base["parameters"] / MIB
    state = base["optimizer_state"] / MIB
    lines += [
        "",
        _limit(record),
        f"BP holds {parameters:.1f} MiB of parameters and {state:.1f} MiB of optimizer state.",
        "",
    ]
    return "\n".join(lines)


def _limit(record: dict[str, Any]) -> str:
    """Return the sentence on the limit."""
    limit = record["limit"]
    # Once only the multiply-adds were counted. The operations of a free head are not free.
    macs = limit["macs"] if isinstance(limit, dict) else limit
    share = macs / record["counts"]["BP"]["macs"]
    return f"The limit of the multiply-adds, heads left aside, is {share:.2f} of BP's."


def _row(way: str, record: dict[str, Any]) -> str:
    base = record["counts"]["BP"]
    counts = record["counts"].get(way, {})
    name = f"{way} ({_parts(record)})" if way == "accumulation" else way
    times = record.get("time", {})
    cells = [name, f"{times[way]:.2f}" if way in times else "–"]
    for key in RELATIVE:
        is_counted = key in counts and key in base
        cells.append(f"{counts[key] / base[key]:.2f}" if is_counted else "–")
    for key in ("peak", "activations", "gradients"):
        cells.append(f"{counts[key] / MIB:.1f}" if key in counts else "–")
    return f"| {' | '.join(cells)} |"


def _parts(record: dict[str, Any]) -> str:
    """Return into how many parts accumulation divides a batch, and the batch that is timed."""
    parts = record["parts"]
    if "accumulation" in record.get("time", {}):
        timed = parts_when_timed(parts, record["time_batch"])
        if timed != parts:
            return f"{parts} parts, timed with {timed}"
    return f"{parts} parts"


def report(record: dict[str, Any]) -> str:
    """Return the record as a page."""
    lines = [
        "AdamW, float32. Time, peak, activations, multiply-adds, operations and bytes moved are "
        "relative to BP. Operations are those that forward and backward dispatch, without views. "
        "Bytes moved are what they read and write.",
        "",
    ]
    for workload in record.get("workloads", {}).values():
        lines += [table(workload), f"{workload['date']}, {workload['hardware']}.", ""]
    small = record.get("small")
    if small is not None:
        for workload in small["found"].values():
            lines += [table(workload), f"{small['date']}, {small['hardware']}.", ""]
    for name, part in record.items():
        if name in ("workloads", "small"):
            continue
        text = json.dumps(part["found"], indent=1)
        stamp = f"{part['date']}, {part['hardware']}:"
        lines += [f"### {name}", "", stamp, "", "```", text, "```", ""]
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw activations over depth, the peak over classes, and the largest batch of each way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    plot_depth(left, record["depth"]["found"])
    plot_classes(middle, record["classes"]["found"])
    plot_batches(right, record["batch"]["found"])
    figure.savefig(path, dpi=120)


def plot_depth(axes: Any, by_depth: dict[str, Any]) -> None:
    layers = [int(each) for each in by_depth]
    for way in ("BP", "checkpoint", "local"):
        activations = [counts[way] / MIB for counts in by_depth.values()]
        axes.plot(layers, activations, marker="o", label=way)
    axes.set(
        xlabel="layers of a bottleneck ResNet",
        ylabel="activations, MiB (224 x 224, batch 16)",
        xscale="log",
        yscale="log",
    )
    axes.legend(frameon=False)


def plot_classes(axes: Any, by_classes: dict[str, Any]) -> None:
    peaks = [counts["peak"] / MIB for counts in by_classes.values()]
    axes.plot([int(j) for j in by_classes], peaks, marker="o")
    axes.set(
        xlabel="classes",
        ylabel="peak of a local step, MiB (resnet18, batch 64)",
        xscale="log",
        ylim=(0, None),
    )


def plot_batches(axes: Any, by_workload: dict[str, Any]) -> None:
    width = 0.2
    for i, way in enumerate(("BP", "checkpoint", "local", "step")):
        places = [j + width * i - 0.3 for j in range(len(by_workload))]
        fits = [ways[way]["fits"] for ways in by_workload.values()]
        axes.bar(places, fits, width, label=way)
    names = [name.split(",")[0] for name in by_workload]
    axes.set(
        ylabel="largest batch in 8 GiB (224 x 224)", xticks=range(len(names)), xticklabels=names
    )
    axes.tick_params(axis="x", labelrotation=15)
    axes.legend(frameon=False)
