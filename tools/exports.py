"""Export torchvision's classifiers to ONNX, and compare ONNX Runtime with torch.

    python -m tools.exports                      # the smallest model of every family first
    python -m tools.exports --only resnet --again
    python -m tools.exports --table              # the table alone, from the records

Each model runs in a process of its own. A model with a record is skipped. It has 10 classes and
random weights; weights that start as constants are drawn anew, and BN is calibrated. It is cut by
the default policy at the smallest image size that it accepts. `sffx.export_onnx` is asked to leave
height and width open. Where the model does not allow it, only the batch stays open.

The file and torch are compared on new random images at batch sizes 1 and 3, and at a second image
size where the size is open. A model passes if the largest relative error, max|a - b| / max|b|, is
1e-4 or less.
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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torchvision import models

import sffx
from sffx.comparison.weights import calibrate, draw_constants
from sffx.export.parity import relative_error
from sffx.export.sizes import trial_batches
from sffx.files import write
from sffx.net import CutModel
from sffx.tables import MIB
from tools.zoo.entries import Entry, build, fitting_input
from tools.zoo.records import is_open
from tools.zoo.sweep import run_apart

RESULTS = Path(__file__).parent / "results" / "exports"
PACKAGES = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4
# Models that are not tried, and why.
TOO_LARGE = "its weights take 2.4 GiB, and an ONNX file ends at 2 GiB"
LEFT_OUT = {"regnet_y_128gf": TOO_LARGE, "vit_h_14": TOO_LARGE}


@dataclass
class Record:
    """The result for one model.

    Attributes:
        reason: why the model does not pass; empty where the file agrees with torch.
        fixed: why the image size is not open; empty where it is.
    """

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
    fixed: str = ""
    seconds: float = 0.0
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def write(self) -> None:
        path = path_of(self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        # Reasons quote file names, and the folders of one machine are of no use to others.
        text = re.sub(r"/[^\s\"]*/site-packages/", "", text)
        write(path, f"{text}\n".encode())


def path_of(name: str) -> Path:
    return RESULTS / "torchvision" / f"{name}.json"


def family_of(name: str) -> str:
    return str(models.get_model_builder(name).__module__).rpartition(".")[2]


def listed() -> list[str]:
    """Return the models in rounds: the smallest of each family, then each family's second, ..."""
    families: dict[str, list[str]] = {}
    for name in sorted(models.list_models(module=models), key=_size):
        families.setdefault(family_of(name), []).append(name)
    order = []
    for members in zip_longest(*families.values()):
        round_of_one_each = [name for name in members if name is not None]
        order += sorted(round_of_one_each, key=_size)
    return order


def _size(name: str) -> tuple[int, str, str]:
    """Return the number of parameters; models of the same size go by family and name."""
    parameters = models.get_model_weights(name).DEFAULT.meta["num_params"]
    return parameters, family_of(name), name


def cut(name: str) -> CutModel:
    """Build a model with random weights and cut it."""
    torch.manual_seed(0)
    entry = Entry("torchvision", name, "classification")
    model = build(entry)
    inputs = fitting_input(entry, model)
    draw_constants(model)
    calibrate(model, lambda twin: twin(inputs["x"]))
    return sffx.transform(model.eval(), example_input=inputs["x"])


def export(net: CutModel, path: Path, record: Record) -> None:
    """Write the file, with an open image size if the model allows it.

    The record takes whether it does, and how long the export took.
    """
    start = time.monotonic()
    try:
        sffx.export_onnx(net, path, dynamic_size=True)
        record.dynamic_size = True
    except sffx.ExportError as error:
        record.fixed = str(error)
        start = time.monotonic()
        sffx.export_onnx(net, path)
    record.seconds = round(time.monotonic() - start, 1)


def largest_error(net: CutModel, path: Path, *, dynamic_size: bool) -> float:
    """Return the largest relative error between ONNX Runtime and torch on new random images."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    errors = []
    for inputs, (x,), _ in trial_batches(net, net.plan.inputs, dynamic_size=dynamic_size):
        with torch.no_grad():
            expected = net(x)
        scores = session.run(None, {inputs[0].name: x.numpy()})[0]
        errors.append(relative_error(torch.from_numpy(scores), expected))
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
    today = date.today().isoformat()
    return Record(name, family_of(name), reason, date=today, versions=versions)


def sweep(todo: list[str], limit: float) -> None:
    """Export models one after the other, each for at most `limit` seconds."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["__main__", "torch.onnx", "torchvision", "onnxscript", "onnxruntime"]
    )
    for i, name in enumerate(todo, start=1):
        exitcode, was_killed = run_apart(context, measure, name, limit)
        if was_killed:
            new_record(name, f"no answer after {limit:.0f} s").write()
        elif exitcode:
            new_record(name, f"the process died, exit code {exitcode}").write()
        record = json.loads(path_of(name).read_text())
        result = record["reason"] or record["error"]
        print(f"{i:3}/{len(todo)}  {name}  {record['seconds']} s  {result}", flush=True)


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the records as Markdown, the counts first."""
    done = [record for record in records if record["date"]]
    good = [record for record in done if not record["reason"]]
    dates = " to ".join(sorted({record["date"] for record in done}))
    families = len({record["family"] for record in done})
    largest = max((record["error"] for record in good), default=0)
    open_sizes = sum(record["dynamic_size"] for record in good)
    lines = [
        "# ONNX files of torchvision's classifiers",
        "",
        f"`python -m tools.exports`, {dates},",
        f"x86_64, two shared cores, {_versions(done)}.",
        "What is compared is said at the top of [tools/exports.py](../../exports.py).",
        "",
        f"{len(done)} of {len(records)} models, of {families} families, were tried; "
        f"{len(good)} agree with torch",
        f"within {TOLERANCE:g}, the largest relative error being {largest:.1e}; "
        f"{open_sizes} leave height and width open.",
        "",
        "| model | parameters | input | relative error | opset | nodes | MiB | size open "
        "| seconds | |",
        "|---|--:|---|--:|--:|--:|--:|---|--:|---|",
    ]
    for record in records:
        lines.append(_row(record))
    return "\n".join(lines) + "\n"


def _versions(records: list[Mapping[str, Any]]) -> str:
    """Return all packages with all versions that the records were made with."""
    versions = set()
    for record in records:
        versions |= set(record["versions"].items())
    return ", ".join(f"{package} {version}" for package, version in sorted(versions))


def _row(record: Mapping[str, Any]) -> str:
    why = record["reason"] or record["fixed"]
    if why:
        why = why.splitlines()[0][:200].replace("|", "\\|")
    if record["error"] is None:
        return f"| {record['name']} | {' | '.join(8 * ['–'])} | {why} |"
    cells = (
        record["name"],
        f"{record['parameters']:,}",
        record["input"],
        f"{record['error']:.1e}",
        record["opset"],
        record["nodes"],
        f"{record['bytes'] / MIB:.1f}",
        "yes" if record["dynamic_size"] else "no",
        record["seconds"],
        why,
    )
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def main() -> None:
    options = _parser().parse_args()
    if not options.table:
        todo = []
        for name in listed():
            is_wanted = options.only in f"{family_of(name)}/{name}" and name not in LEFT_OUT
            if is_wanted and (options.again or is_open(path_of(name), options.failed)):
                todo.append(name)
        sweep(todo, options.limit)
    records = [_record_of(name) for name in models.list_models(module=models)]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "table.md").write_text(table(records))


def _record_of(name: str) -> dict[str, Any]:
    if path_of(name).exists():
        return dict(json.loads(path_of(name).read_text()))
    reason = f"left out: {LEFT_OUT[name]}" if name in LEFT_OUT else "not run"
    return asdict(Record(name, family_of(name), reason))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default="", metavar="SUBSTRING", help="models whose family or name contains this"
    )
    parser.add_argument("--limit", type=float, default=300, help="seconds for one model")
    parser.add_argument("--again", action="store_true", help="export models with a record again")
    parser.add_argument(
        "--failed", action="store_true", help="export models again whose record is a failure"
    )
    parser.add_argument("--table", action="store_true", help="write the table only")
    return parser


if __name__ == "__main__":
    main()
