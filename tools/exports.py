"""Export torchvision's classifiers to ONNX and compare ONNX Runtime with torch, one process a model; what is recorded is skipped.

    python -m tools.exports                      # the smallest model of every family first, then the table
    python -m tools.exports --only resnet --again
    python -m tools.exports --table              # the table alone, from the records

Each model has 10 classes and random weights, those that start as constants drawn anew and BN calibrated, and is cut by the default policy
at the smallest image size that it accepts. `sffx.export_onnx` is asked to leave height and width open, and where the model does not allow
it, the batch alone. The file and torch are compared on new random images at batch sizes 1 and 3, and at a second image size where the
size is open. A model passes if the largest relative error, max|a - b| / max|b|, is 1e-4 or less.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import re
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torchvision import models

import sffx
from sffx.export.parity import relative_error
from sffx.export.prepare import trial_inputs
from sffx.files import write
from tools.zoo import Entry, build, calibrate, draw_constants, fitting_input, is_open, run_apart

RESULTS = Path(__file__).parent / "results" / "exports"
PACKAGES = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4
MIB = 2**20
# What is not tried, and why.
LEFT_OUT = {
    "regnet_y_128gf": "its weights take 2.4 GiB, and an ONNX file ends at 2 GiB",
    "vit_h_14": "its weights take 2.4 GiB, and an ONNX file ends at 2 GiB",
}


@dataclass
class Record:
    """What was found about one model; `reason` is empty where the file agrees with torch."""

    name: str
    family: str
    reason: str = "not finished"
    parameters: int = 0
    input: str = ""
    error: float | None = None
    opset: int = 0
    nodes: int = 0
    bytes: int = 0
    dynamic_size: bool = False
    fixed: str = ""  # why the size is not open
    seconds: float = 0.0
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def write(self) -> None:
        path_of(self.name).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        write(path_of(self.name), (re.sub(r"/[^\s\"]*/site-packages/", "", text) + "\n").encode())


def path_of(name: str) -> Path:
    return RESULTS / "torchvision" / f"{name}.json"


def family_of(name: str) -> str:
    return str(models.get_model_builder(name).__module__).rpartition(".")[2]


def listed() -> list[str]:
    """Return the models so that each family's smallest come first, then each family's second, and so on."""
    names = models.list_models(module=models)
    size = {name: models.get_model_weights(name).DEFAULT.meta["num_params"] for name in names}
    families = [
        sorted((n for n in names if family_of(n) == family), key=size.__getitem__)
        for family in sorted({*map(family_of, names)})
    ]
    rounds = [
        [members[i] for members in families if i < len(members)]
        for i in range(max(map(len, families)))
    ]
    return [name for names in rounds for name in sorted(names, key=size.__getitem__)]


def cut(name: str) -> fx.GraphModule:
    """Build a model with random weights and cut it."""
    torch.manual_seed(0)
    entry = Entry("torchvision", name, "classification")
    model = build(entry)
    inputs = fitting_input(entry, model)
    draw_constants(model)
    calibrate(model, inputs)
    return sffx.transform(model.eval(), example_input=inputs["x"])


def export(net: fx.GraphModule, path: Path, record: Record) -> None:
    """Write the file, with an open image size if the model allows it, and say in the record how long it took."""
    start = time.monotonic()
    try:
        sffx.export_onnx(net, path, dynamic_size=True)
        record.dynamic_size = True
    except sffx.ExportError as error:
        record.fixed = str(error)
        start = time.monotonic()
        sffx.export_onnx(net, path)
    record.seconds = round(time.monotonic() - start, 1)


def largest_error(net: fx.GraphModule, path: Path, *, dynamic_size: bool) -> float:
    """Return the largest relative error between ONNX Runtime and torch on new random images."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    errors = []
    for inputs, batch, _ in trial_inputs(net.plan.inputs, dynamic_size=dynamic_size):
        x = torch.randn(batch, *inputs[0].shape)
        with torch.no_grad():
            expected = net(x)
        errors.append(
            relative_error(
                torch.from_numpy(session.run(None, {inputs[0].name: x.numpy()})[0]), expected
            )
        )
    return max(errors)


def measure(name: str) -> None:
    """Export one model, in this process, and write its record."""
    import onnx

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    record = new_record(name)
    try:
        net = cut(name)
        record.parameters = sum(p.numel() for p in net.parameters())
        record.input = " x ".join(map(str, net.plan.inputs[0].shape))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net.onnx"
            export(net, path, record)
            record.error = largest_error(net, path, dynamic_size=record.dynamic_size)
            record.bytes = path.stat().st_size
            model = onnx.load(path, load_external_data=False)
            record.opset, record.nodes = model.opset_import[0].version, len(model.graph.node)
        record.reason = "" if record.error <= TOLERANCE else f"relative error {record.error:.1e}"
    except Exception as failure:
        record.reason = f"{type(failure).__name__}: {failure}"
    record.write()


def new_record(name: str, reason: str = "not finished") -> Record:
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return Record(name, family_of(name), reason, date=date.today().isoformat(), versions=versions)


def sweep(todo: list[str], limit: float) -> None:
    """Export models one after the other, each in a process of its own and for at most `limit` seconds."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["__main__", "torch.onnx", "torchvision", "onnxscript", "onnxruntime"]
    )
    for i, name in enumerate(todo, start=1):
        exitcode, late = run_apart(context, measure, name, limit)
        if late or exitcode:
            new_record(
                name,
                f"no answer after {limit:.0f} s"
                if late
                else f"the process died, exit code {exitcode}",
            ).write()
        found = json.loads(path_of(name).read_text())
        print(
            f"{i:3}/{len(todo)}  {name}  {found['seconds']} s  {found['reason'] or found['error']}",
            flush=True,
        )


def table(records: list[Mapping[str, Any]]) -> str:
    """Write the records as Markdown, the counts first."""
    done = [r for r in records if r["date"]]
    good = [r for r in done if not r["reason"]]
    versions = ", ".join(
        f"{package} {version}"
        for package, version in sorted({(k, v) for r in done for k, v in r["versions"].items()})
    )
    lines = [
        "# ONNX files of torchvision's classifiers",
        "",
        f"`python -m tools.exports`, {' to '.join(sorted({r['date'] for r in done}))},",
        f"x86_64, two shared cores, {versions}.",
        "What is compared is said at the top of [tools/exports.py](../../exports.py).",
        "",
        f"{len(done)} of {len(records)} models, of {len({r['family'] for r in done})} families, were tried; {len(good)} agree with torch",
        f"within {TOLERANCE:g}, the largest relative error being {max((r['error'] for r in good), default=0):.1e}; "
        f"{sum(r['dynamic_size'] for r in good)} leave height and width open.",
        "",
        "| model | parameters | input | relative error | opset | nodes | MiB | size open | seconds | |",
        "|---|--:|---|--:|--:|--:|--:|---|--:|---|",
        *(_row(r) for r in records),
    ]
    return "\n".join(lines) + "\n"


def _row(r: Mapping[str, Any]) -> str:
    why = (
        (r["reason"] or r["fixed"]).splitlines()[0][:200].replace("|", "\\|")
        if r["reason"] or r["fixed"]
        else ""
    )
    if r["error"] is None:
        return f"| {r['name']} | {' | '.join(8 * ['–'])} | {why} |"
    cells = (
        f"{r['parameters']:,}",
        r["input"],
        f"{r['error']:.1e}",
        r["opset"],
        r["nodes"],
        f"{r['bytes'] / MIB:.1f}",
    )
    return f"| {r['name']} | {' | '.join(map(str, cells))} | {'yes' if r['dynamic_size'] else 'no'} | {r['seconds']} | {why} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default="", metavar="SUBSTRING", help="models whose family or name contains this"
    )
    parser.add_argument("--limit", type=float, default=300, help="seconds for one model")
    parser.add_argument(
        "--again", action="store_true", help="export what is recorded already once more"
    )
    parser.add_argument(
        "--failed", action="store_true", help="export what is recorded as failed once more"
    )
    parser.add_argument("--table", action="store_true", help="write the table only")
    options = parser.parse_args()
    if not options.table:
        wanted = [
            name
            for name in listed()
            if options.only in f"{family_of(name)}/{name}" and name not in LEFT_OUT
        ]
        sweep(
            [name for name in wanted if options.again or is_open(path_of(name), options.failed)],
            options.limit,
        )
    records = [_found(name) for name in models.list_models(module=models)]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "table.md").write_text(table(records))


def _found(name: str) -> dict[str, Any]:
    if path_of(name).exists():
        return dict(json.loads(path_of(name).read_text()))
    return asdict(
        Record(
            name, family_of(name), f"left out: {LEFT_OUT[name]}" if name in LEFT_OUT else "not run"
        )
    )


if __name__ == "__main__":
    main()
