"""The tables of the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tools.parallel_model.counts import BlockCost
from tools.parallel_model.machines import MANY_MACHINES, ONE_MACHINE, Cluster, Link
from tools.parallel_model.models import BY_LAYER, BY_STAGE, MODELS, Model
from tools.parallel_model.sleeping import BATCHES as BATCHES_SLEPT
from tools.parallel_model.sleeping import FORWARD as FORWARD_SLEEP
from tools.parallel_model.sleeping import MICROBATCHES as MICROBATCHES_SLEPT
from tools.parallel_model.validate import FORWARD, LOOPBACK, predictions
from tools.parallel_model.ways import Outcome, all_ways

Costs = dict[tuple[str, str], list[BlockCost]]

CLUSTERS = (ONE_MACHINE, MANY_MACHINES)
# Samples of a step in each machine.
BATCHES = {
    "images": (8, 16, 32, 64, 128, 256, 512, 1024, 2048),
    "sequences": (8, 16, 32, 64, 128),
}
SHOWN = {"images": 512, "sequences": 32}
PIPELINES = ("pipeline, few heads", "pipeline, many heads")


def page(costs: Costs, measured: dict[str, Any] | None, slept: list[dict[str, Any]]) -> str:
    """Return all tables, as Markdown.

    Args:
        costs: of the blocks of each model, by its name and its cut.
        measured: the record of `tools.pipeline`, None if there is none.
        slept: the record of `tools.parallel_model.sleeping`, empty if there is none.
    """
    lines = ["# Training in parallel, on paper: tables", ""]
    lines += ["## What is assumed", "", *_assumptions(), ""]
    lines += ["## What the models cost", "", *_models(costs), ""]
    for name, unit in dict.fromkeys((model.name, model.unit) for model in MODELS):
        for cluster in CLUSTERS:
            lines += _of_cluster(costs, name, unit, cluster)
    lines += ["## Whether a link keeps up", "", *_crossing(costs), ""]
    lines += ["## Loops over parts of a batch", "", *_loops(costs), ""]
    lines += ["## Against stages that sleep", "", *_sleeping(slept), ""]
    lines += ["## Against measured runs", "", *_validation(measured)]
    return "\n".join(lines) + "\n"


def outcomes(costs: Costs, name: str, cluster: Cluster, of_machine: int) -> dict[str, Outcome]:
    """Return what all ways take, with so many samples for each machine."""
    samples = of_machine * cluster.machines
    return all_ways(costs[name, BY_LAYER], costs[name, BY_STAGE], cluster, samples)


def _assumptions() -> list[str]:
    cluster = ONE_MACHINE
    return [
        "| | |",
        "|---|---|",
        f"| matrix products and convolutions | {cluster.flops / 1e12:.0f} TFLOP/s, half of an "
        "H100's peak in TF32 |",
        f"| other operations, and AdamW | {cluster.memory_bandwidth / 1e12:.2f} TB/s, 0.8 of the "
        "memory's peak; each reads its inputs and writes its outputs |",
        f"| an operation takes at least | {cluster.launch * 1e6:.0f} µs |",
        f"| memory of a device | {cluster.memory / 1e9:.0f} GB |",
        f"| links inside a machine, each direction | {_link(cluster.inside)} |",
        f"| links between machines, one for each device | {_link(cluster.between)} |",
        "| values | all in float32 |",
    ]


def _link(link: Link) -> str:
    return f"{link.bandwidth / 1e9:.0f} GB/s, {link.latency * 1e6:.0f} µs"


def _models(costs: Costs) -> list[str]:
    lines = [
        "| model | cut | parameters, M | of heads, M | TFLOP a sample, BP | local | largest cut, "
        "MB a sample |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        lines.append(_model_row(model, costs[model.name, model.cut]))
    return lines


def _model_row(model: Model, costs: Sequence[BlockCost]) -> str:
    parameters = sum(each.parameters for each in costs) / 4e6
    heads = sum(each.head for each in costs) / 4e6
    plain = sum(each.forward.flops.each + each.backward.flops.each for each in costs) / 1e12
    local = sum(each.scoring.flops.each + each.learning.flops.each for each in costs) / 1e12
    largest = max(each.given.each for each in costs) / 1e6
    return (
        f"| {model.name} | {model.cut} | {parameters:.0f} | {heads:.0f} | {plain:.3f} | "
        f"{local:.3f} | {largest:.2f} |"
    )


def _of_cluster(costs: Costs, name: str, unit: str, cluster: Cluster) -> list[str]:
    """Return the tables of a model on a cluster: one batch in detail, and all batches."""
    shown = SHOWN[unit]
    lines = [f"## {name}, {cluster.name}", ""]
    lines += [f"{shown} {unit} a step for each machine.", "", *_detail_header(unit)]
    for way, outcome in outcomes(costs, name, cluster, shown).items():
        lines.append(_detail_row(way, outcome, shown * cluster.machines, cluster))
    lines += ["", f"{unit.capitalize()} a second by their number in a step, for each machine.", ""]
    by_batch = {b: outcomes(costs, name, cluster, b) for b in BATCHES[unit]}
    lines += [
        "| way | " + " | ".join(map(str, by_batch)) + " |",
        "|---" * (len(by_batch) + 1) + "|",
    ]
    for way in next(iter(by_batch.values())):
        cells = []
        for batch, found in by_batch.items():
            cells.append(_rate(found[way], batch * cluster.machines, cluster))
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return [*lines, "", _pays(by_batch, cluster), ""]


def _detail_header(unit: str) -> list[str]:
    return [
        f"| way | step, ms | {unit} a second | busy | MB sent by a device | GB held by a device |",
        "|---|---|---|---|---|---|",
    ]


def _detail_row(way: str, outcome: Outcome, samples: int, cluster: Cluster) -> str:
    name = f"{way}, M = {outcome.microbatches}" if outcome.microbatches else way
    step = outcome.step
    return (
        f"| {name} | {step.seconds * 1e3:.1f} | {_rate(outcome, samples, cluster)} | "
        f"{step.busy:.2f} | {outcome.sent / 1e6:.0f} | {outcome.memory / 1e9:.1f} |"
    )


def _rate(outcome: Outcome, samples: int, cluster: Cluster) -> str:
    """Return the samples a second, in brackets if they do not fit the memory."""
    rate = f"{samples / outcome.step.seconds:,.0f}"
    return rate if fits(outcome, cluster) else f"({rate})"


def fits(outcome: Outcome, cluster: Cluster) -> bool:
    """Return whether a step fits the memory of a device."""
    return outcome.memory <= cluster.memory


def _pays(by_batch: dict[int, dict[str, Outcome]], cluster: Cluster) -> str:
    """Return the sentence on the batches at which the pipeline is ahead of each rival."""
    parts = []
    for rival in ("1F1B", "DDP", "FSDP2", "replicate"):
        ahead = [batch for batch, found in by_batch.items() if _is_ahead(found, rival, cluster)]
        parts.append(f"{rival}: {', '.join(map(str, ahead)) or 'none'}")
    return "Batches at which the better pipeline is faster than " + "; ".join(parts) + "."


def _is_ahead(found: dict[str, Outcome], rival: str, cluster: Cluster) -> bool:
    """Return whether a pipeline that fits is faster than a rival.

    A rival that does not fit may accumulate gradients, and is nearly as fast as if it did.
    """
    seconds = found[rival].step.seconds
    fitting = [found[way] for way in PIPELINES if fits(found[way], cluster)]
    return any(each.step.seconds < seconds for each in fitting)


def _crossing(costs: Costs) -> list[str]:
    """Return the lines of a table: whether a link keeps up with the stages."""
    lines = [
        "| model | samples | step of the pipeline, ms | largest cut in use, MB | "
        "ms inside a machine | ms between machines |",
        "|---|---|---|---|---|---|",
    ]
    for name, unit in dict.fromkeys((model.name, model.unit) for model in MODELS):
        found = outcomes(costs, name, ONE_MACHINE, SHOWN[unit])
        best = min((found[way] for way in PIPELINES), key=_seconds_of)
        inside = ONE_MACHINE.inside.seconds(best.sent) * 1e3
        between = ONE_MACHINE.between.seconds(best.sent) * 1e3
        lines.append(
            f"| {name} | {SHOWN[unit]} | {best.step.seconds * 1e3:.1f} | {best.sent / 1e6:.0f} | "
            f"{inside:.1f} | {between:.1f} |"
        )
    return lines


def _seconds_of(outcome: Outcome) -> float:
    return outcome.step.seconds


def _loops(costs: Costs) -> list[str]:
    """Return the lines of a table: what loops over small parts of a batch would launch."""
    lines = ["| model | cut | launches a step | with small parts |", "|---|---|---|---|"]
    for model in MODELS:
        samples = SHOWN[model.unit]
        work = [each.scoring for each in costs[model.name, model.cut]]
        work += [each.learning for each in costs[model.name, model.cut]]
        kernels = sum(each.kernels.at(samples) for each in work)
        parts = sum(each.parts.at(samples) for each in work)
        lines.append(f"| {model.name} | {model.cut} | {kernels:,.0f} | {parts:,.0f} |")
    return lines


def _sleeping(slept: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table: the model against stages that sleep."""
    forward = ", ".join(f"{1e3 * seconds:.0f}" for seconds in FORWARD_SLEEP)
    lines = [
        f"Each process sleeps for {forward} ms forward and twice as long backward, in "
        f"{BATCHES_SLEPT} batches. GPipe and 1F1B are torch's, with {MICROBATCHES_SLEPT} "
        "microbatches.",
        "",
        "| stages | way | ms a batch, predicted | measured | error |",
        "|---|---|---|---|---|",
    ]
    for each in slept:
        predicted, measured = each["predicted"], each["measured"]
        lines.append(
            f"| {each['stages']} | {each['way']} | {predicted * 1e3:.0f} | {measured * 1e3:.0f} | "
            f"{predicted / measured - 1:+.0%} |"
        )
    return lines


def _validation(measured: dict[str, Any] | None) -> list[str]:
    if measured is None:
        return ["There is no record of `python -m tools.pipeline` to compare with."]
    lines = [
        "Two processes of one thread on the two cores of one machine. The inputs are the CPU "
        f"seconds and the bytes of each process. {FORWARD:.0%} of the seconds are forward. A link "
        f"carries {LOOPBACK.bandwidth / 1e9:g} GB/s, with {LOOPBACK.latency * 1e3:g} ms a message.",
        "",
        "| model | way | images a second, predicted | measured | error |",
        "|---|---|---|---|---|",
    ]
    for model, record in measured.items():
        for each in predictions(record):
            lines.append(
                f"| {model} | {each.way} | {each.predicted:.0f} | {each.measured:.0f} | "
                f"{each.error:+.0%} |"
            )
    return lines
