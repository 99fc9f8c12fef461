"""Cut every model of a zoo and verify the result, one process for each model.

    python -m tools.zoo --jobs 2                     # all zoos that are installed, then the table
    python -m tools.zoo --zoo timm --only vit --again
    python -m tools.zoo --table                      # the table alone, from the records

A model with a record is skipped. A model is verified when all of this holds (`verify_model`):

- `sffx.transform` cuts it by the default policy, with no exception made for it. Two feature blocks
  or more come out, or the plan says why not.
- `sffx.check` finds no difference: the trunk computes the same as the original, in train and in
  eval mode, for other batch sizes and other sizes, with the same gradients and buffers, and the
  original comes back. Weights that start as constants (zeroed heads, layer scales) are drawn anew,
  and BN is calibrated before. Outputs must differ between samples.
- Each trainable parameter that backpropagation reaches has a gradient from exactly one block's
  loss, and has it after a `local_loss` step.
- For a sample of families, the ONNX file agrees with torch.

Models are built with 10 classes and random weights. They run at the smallest image size that they
accept.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import random
import re
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import sffx
from sffx.comparison.weights import calibrate, draw_constants
from sffx.files import write
from sffx.learning.losses import block_loss

RESULTS = Path(__file__).parent / "results" / "zoo"
FAMILIES = Path(__file__).parent / "zoo_timm.txt"
ZOOS = ("torchvision", "timm", "transformers")
CLASSES = 10
SAMPLES = 3
IMAGES = (64, 96, 128, 160, 192, 224, 240, 256, 288, 299, 320, 384, 448, 512, 56)
CLIPS = ((4, 32), (8, 64), (16, 64), (16, 112), (16, 224))
REFUSED_GROUPS = ("detection", "segmentation", "optical_flow")

# Models whose ONNX file is compared with torch as well.
ONNX = {
    "torchvision/resnet18",
    "torchvision/mobilenet_v3_small",
    "torchvision/densenet121",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/vit_b_32",
    "torchvision/efficientnet_b0",
    "torchvision/googlenet",
    "torchvision/regnet_y_400mf",
    "torchvision/r3d_18",
    "timm/resnet10t",
    "timm/ghostnet_050",
    "timm/test_convnext",
    "timm/test_vit",
}

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """One model of a zoo.

    Attributes:
        zoo: the package that it comes from.
        name: in that package; unique in the zoo.
        group: the kind that the table lists it under. Models of `REFUSED_GROUPS` are no
            classifiers, and must be refused with a helpful error.
    """

    zoo: str
    name: str
    group: str

    @property
    def path(self) -> Path:
        return RESULTS / self.zoo / f"{self.name}.json"

    @property
    def refused(self) -> bool:
        return self.group in REFUSED_GROUPS


@dataclass
class Record:
    """The result for one model.

    Attributes:
        reason: why the model is not verified; empty where it is.
        leaves: of each leaf its class, its share of the parameters, and the reason.
    """

    zoo: str
    name: str
    group: str
    reason: str = "not finished"
    parameters: int = 0
    blocks: int = 0
    leaves: list[tuple[str, float, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    input: str = ""
    onnx: bool = False
    seconds: float = 0.0
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        # Reasons quote file names, and the folders of one machine are of no use to others.
        text = re.sub(r"/[^\s\"]*/site-packages/", "", text)
        write(path, f"{text}\n".encode())


class Unverified(AssertionError):
    """A model breaks one of the promises. The message is the reason in the table."""


# The zoos


def entries(zoo: str) -> list[Entry]:
    """Return the models of a zoo; of timm, the smallest architectures of each module only."""
    if zoo == "torchvision":
        return _torchvision_entries()
    if zoo == "timm":
        return _timm_entries()
    return [Entry(zoo, name, "classification") for name in TRANSFORMERS]


def _torchvision_entries() -> list[Entry]:
    from torchvision import models

    parts = {
        "classification": models,
        "video": models.video,
        "quantizable": models.quantization,
        "detection": models.detection,
        "segmentation": models.segmentation,
        "optical_flow": models.optical_flow,
    }
    listed = []
    for group, part in parts.items():
        for name in models.list_models(module=part):
            listed.append(Entry("torchvision", name, group))
    return listed


def _timm_entries() -> list[Entry]:
    listed = []
    for line in FAMILIES.read_text().splitlines():
        if line and not line.startswith("#"):
            module, name = line.split()
            listed.append(Entry("timm", name, module))
    return listed


def build(entry: Entry) -> nn.Module:
    """Build a model with random weights."""
    if entry.zoo == "torchvision":
        return _build_torchvision(entry)
    if entry.zoo == "timm":
        import timm

        return timm.create_model(entry.name, pretrained=False, num_classes=CLASSES)
    import transformers

    class_name, options = TRANSFORMERS[entry.name]
    model_class = getattr(transformers, class_name)
    return model_class(model_class.config_class(num_labels=CLASSES, **options))


def _build_torchvision(entry: Entry) -> nn.Module:
    from torchvision import models

    options: dict[str, Any] = {} if entry.refused else {"num_classes": CLASSES}
    if entry.group in ("detection", "segmentation"):
        options["weights_backbone"] = None
    if entry.name.startswith("vit_"):
        options["image_size"] = 4 * int(entry.name[-2:])  # 16 patches
    return models.get_model(entry.name, weights=None, **options)


_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", _TEXT),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64, "vocab_size": 100},
    ),
    "roberta": ("RobertaForSequenceClassification", _TEXT),
    "electra": ("ElectraForSequenceClassification", {**_TEXT, "embedding_size": 32}),
    "albert": ("AlbertForSequenceClassification", {**_TEXT, "embedding_size": 16}),
    "gpt2": (
        "GPT2ForSequenceClassification",
        {"n_embd": 32, "n_layer": 3, "n_head": 2, "vocab_size": 100, "pad_token_id": 0},
    ),
    "vit": ("ViTForImageClassification", _VISION),
    "deit": ("DeiTForImageClassification", _VISION),
    "swin": (
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]},
    ),
    "convnext": (
        "ConvNextForImageClassification",
        {"depths": [2, 2, 2, 2], "hidden_sizes": [8, 16, 24, 32]},
    ),
    "resnet": (
        "ResNetForImageClassification",
        {"depths": [2, 2], "hidden_sizes": [16, 32], "embedding_size": 8},
    ),
    "mobilenet_v2": ("MobileNetV2ForImageClassification", {}),
    "segformer": ("SegformerForImageClassification", {}),
    "wav2vec2": (
        "Wav2Vec2ForSequenceClassification",
        {
            **_TEXT,
            "conv_dim": (16, 16, 16),
            "conv_stride": (5, 2, 2),
            "conv_kernel": (10, 3, 3),
            "num_conv_pos_embeddings": 16,
        },
    ),
}


def fitting_input(entry: Entry, model: nn.Module) -> Inputs:
    """Return random inputs of the smallest size that the model runs on, for `SAMPLES` samples.

    Raises:
        Unverified: the model runs on no size.
    """
    if entry.zoo == "transformers":
        return _transformer_input(model)
    failure: Exception | None = None
    for size in _sizes(entry, model):
        x = torch.randn(SAMPLES, *size)
        try:
            with torch.no_grad():
                model.train()(x)
                model.eval()(x)
        except Exception as cause:
            failure = cause
        else:
            return {"x": x}
    raise Unverified(f"no input size is accepted, the last failed with {failure}")


def _sizes(entry: Entry, model: nn.Module) -> list[tuple[int, ...]]:
    """Return the sizes of a sample that are tried, smallest first, the model's own size last."""
    if entry.group == "video":
        return [(3, frames, side, side) for frames, side in CLIPS]
    own = getattr(model, "default_cfg", {}).get("input_size", (3, IMAGES[0], IMAGES[0]))
    channels = own[0]
    return [*((channels, side, side) for side in IMAGES), tuple(own)]


def _transformer_input(model: nn.Module) -> Inputs:
    if model.main_input_name == "pixel_values":
        side = getattr(model.config, "image_size", 64)
        return {"pixel_values": torch.randn(SAMPLES, 3, side, side)}
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(SAMPLES, 800)}
    mask = torch.ones(SAMPLES, 12, dtype=torch.int64)
    mask[0, 8:] = 0
    return {"input_ids": torch.randint(1, 100, (SAMPLES, 12)), "attention_mask": mask}


# What is verified


def verify_model(
    model: nn.Module, inputs: Inputs, record: Record, *, onnx: bool = False
) -> fx.GraphModule:
    """Cut a model and check every promise. This changes the model's weights.

    Args:
        model: with random weights.
        inputs: for `SAMPLES` samples.
        record: takes the results.
        onnx: whether to export the net as well.

    Raises:
        Unverified: a promise is broken.
        SffxError: the model cannot be cut.
    """
    torch.manual_seed(0)
    draw_constants(model)
    calibrate(model, partial(_run, inputs=inputs))
    record.parameters = sum(p.numel() for p in model.parameters())
    record.input = ", ".join(f"{name} {tuple(value.shape[1:])}" for name, value in inputs.items())
    net = sffx.transform(model.train(), example_input=_call_arguments(inputs), check=False)
    record.blocks, record.notes = len(net.plan), list(net.plan.notes)
    record.leaves = [(leaf.kind, leaf.share, leaf.reason) for leaf in net.plan.leaves]
    if len(net.plan) < 2 and not net.plan.notes:
        raise Unverified("one feature block, and the plan does not say why")
    _check_values(model, net, inputs)
    _check_gradients(model, net, inputs)
    if onnx:
        with tempfile.TemporaryDirectory() as folder:
            sffx.export_onnx(net, Path(folder) / "net.onnx")
        record.onnx = True
    record.reason = ""
    return net


def _call_arguments(inputs: Inputs) -> Any:
    return inputs["x"] if set(inputs) == {"x"} else inputs


def _run(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return the output of a model, or the first of several outputs.

    The random numbers are the same in each call.
    """
    torch.manual_seed(1)
    random.seed(1)
    output: Any = model(inputs["x"]) if set(inputs) == {"x"} else model(**inputs)
    if hasattr(output, "logits"):
        output = output.logits
    return output[0] if isinstance(output, tuple) else output


def _check_values(model: nn.Module, net: fx.GraphModule, inputs: Inputs) -> None:
    """Check that the cut model computes what the original does, and that its outputs tell."""
    report = sffx.check(model, net, _call_arguments(inputs), raises=False)
    difference = report.difference
    if difference is not None:
        raise Unverified(str(difference))
    for name, reason in report.skipped.items():
        if name.startswith("values"):
            raise Unverified(f"vacuous: {name}: {reason}")


def _check_gradients(model: nn.Module, net: fx.GraphModule, inputs: Inputs) -> None:
    """Check that each parameter which backpropagation reaches has its gradient from one block.

    It must have the gradient after a `local_loss` step too.
    """
    labels = torch.arange(SAMPLES) % CLASSES
    F.cross_entropy(_run(model.train(), inputs), labels).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    names = {id(p): name for name, p in net.origin.model.named_parameters()}
    counts = _blocks_that_reach(net.train(), inputs, labels)
    sffx.local_loss(net, _call_arguments(inputs), labels).backward()
    trained = set()
    for p in net.parameters():
        if id(p) in names and p.grad is not None:
            trained.add(names[id(p)])
    single = {names[key] for key, count in counts.items() if count == 1 and key in names}
    several = {names[key] for key, count in counts.items() if count > 1 and key in names}
    missing = reached - (trained & single)
    surplus = (trained | single) - reached
    if several:
        raise Unverified(f"gradient from several blocks: {_shown(several)}")
    if missing:
        raise Unverified(f"no gradient, though backpropagation reaches it: {_shown(missing)}")
    if surplus:
        raise Unverified(f"gradient, though backpropagation does not reach it: {_shown(surplus)}")


def _blocks_that_reach(net: fx.GraphModule, inputs: Inputs, labels: Tensor) -> Counter[int]:
    """Count, for each parameter by its id, the blocks whose loss gives it a gradient."""
    scores: list[Tensor] = []
    handle = net.readout.register_forward_pre_hook(lambda _, args: scores.extend(args[0]))
    _run(net, inputs)
    handle.remove()
    parameters = [p for p in net.parameters() if p.requires_grad]
    counts: Counter[int] = Counter()
    for score in scores:
        loss = block_loss(score, labels)
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for p, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                counts[id(p)] += 1
    return counts


def _shown(names: set[str]) -> str:
    first = ", ".join(sorted(names)[:3])
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first


def check_refusal(model: nn.Module, record: Record) -> None:
    """Check that a model which is no classifier is refused.

    The error must name a module and the way out.

    Raises:
        Unverified: it is not refused, or the error does not help.
    """
    record.parameters = sum(p.numel() for p in model.parameters())
    example: Any = torch.zeros(1, 3, 64, 64)
    if "raft" in record.name:  # optical flow takes two images
        example = (torch.zeros(1, 3, 128, 128), torch.zeros(1, 3, 128, 128))
    try:
        sffx.transform(model, example_input=example)
    except sffx.SffxError as error:
        record.notes = [str(error)]
    else:
        raise Unverified("it was cut, although it is no classifier")
    if "backbone" not in record.notes[0]:
        raise Unverified(f"the error does not say what to do: {record.notes[0]}")
    record.reason = ""


# The sweep


def measure(entry: Entry) -> None:
    """Verify one model, in this process, and write its record."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    record = new_record(entry)
    start = time.monotonic()
    try:
        torch.manual_seed(0)
        model = build(entry)
        if entry.refused:
            check_refusal(model, record)
        else:
            inputs = fitting_input(entry, model)
            verify_model(model, inputs, record, onnx=f"{entry.zoo}/{entry.name}" in ONNX)
    except Unverified as failure:
        record.reason = str(failure)
    except Exception as failure:
        record.reason = f"{type(failure).__name__}: {failure}"
        if os.environ.get("ZOO_TRACEBACK"):
            traceback.print_exc()
    record.seconds = round(time.monotonic() - start, 1)
    record.write(entry.path)


def new_record(entry: Entry, reason: str = "not finished") -> Record:
    versions = {package: importlib.metadata.version(package) for package in ("torch", entry.zoo)}
    today = date.today().isoformat()
    return Record(entry.zoo, entry.name, entry.group, reason, date=today, versions=versions)


def sweep(todo: list[Entry], jobs: int, limit: float) -> None:
    """Verify models in processes of their own.

    Args:
        todo: the models.
        jobs: how many at a time.
        limit: seconds for one model.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "torch._dynamo", *{entry.zoo for entry in todo}])
    supervise = partial(_supervised, context, limit)
    with ThreadPoolExecutor(jobs) as pool:
        for i, line in enumerate(pool.map(supervise, todo), start=1):
            print(f"{i:4}/{len(todo)}  {line}", flush=True)


def _supervised(context: Any, limit: float, entry: Entry) -> str:
    """Verify a model in a process of its own, and return a line about it."""
    entry.path.unlink(missing_ok=True)
    exitcode, was_killed = run_apart(context, measure, entry, limit)
    if not entry.path.exists():
        reason = f"the process died, exit code {exitcode}"
        if was_killed:
            reason = f"no answer after {limit:.0f} s"
        new_record(entry, reason).write(entry.path)
    record = json.loads(entry.path.read_text())
    result = record["reason"] or "verified"
    name = f"{entry.zoo}/{entry.name}"
    return f"{name}  {record['blocks']} blocks  {record['seconds']} s  {result}"


def run_apart(
    context: Any, function: Callable[[Any], None], argument: Any, limit: float
) -> tuple[int, bool]:
    """Call a function in a process of its own, for at most `limit` seconds.

    Returns:
        The exit code of the process, and whether it was killed because it took too long.
    """
    process = context.Process(target=function, args=(argument,))
    process.start()
    process.join(limit)
    is_late = process.is_alive()
    if is_late:
        process.kill()
        process.join()
    return process.exitcode, is_late


def is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def is_open(path: Path, failed: bool) -> bool:
    """Whether there is no record yet; with `failed`, a record of a failure counts as none."""
    return not path.exists() or (failed and bool(json.loads(path.read_text())["reason"]))


# The table


def table(records: list[Mapping[str, Any]]) -> str:
    """Return the records as Markdown, the counts first."""
    dates = sorted({record["date"] for record in records})
    span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    versions: dict[str, str] = {}
    for record in records:
        versions.update(record["versions"])
    installed = ", ".join(f"{package} {versions[package]}" for package in sorted(versions))
    verdict = "verified, or why not"
    lines = [
        "# Model zoos, cut and verified",
        "",
        f"`python tools/zoo.py`, {span}, {installed}.",
        "What verified means is said at the top of [tools/zoo.py](../../zoo.py).",
        "",
        "| zoo | models | verified | of these with the ONNX file checked |",
        "|---|---|---|---|",
        *_counts(records),
        "",
        f"| model | parameters | feature blocks | leaves: share of the parameters | {verdict} |",
        "|---|--:|--:|---|---|",
    ]
    for record in records:
        lines.append(_row(record))
    return "\n".join(lines) + "\n"


def _kind(record: Mapping[str, Any]) -> str:
    if record["zoo"] != "torchvision":
        return record["zoo"]
    return f"torchvision, {record['group'].replace('_', ' ')}"


def _counts(records: list[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a row for each kind of model."""
    kinds = dict.fromkeys(_kind(record) for record in records)
    for kind in kinds:
        own = [record for record in records if _kind(record) == kind]
        good = sum(not record["reason"] for record in own)
        exported = sum(record["onnx"] for record in own)
        result = f"{good} ({good / len(own):.1%})"
        if own[0]["group"] in REFUSED_GROUPS:
            result = f"{good} refused with a way out"
        yield f"| {kind} | {len(own)} | {result} | {exported or '–'} |"


def _row(record: Mapping[str, Any]) -> str:
    cells = [
        f"{_kind(record)}: {record['name']}",
        f"{record['parameters']:,}",
        str(record["blocks"] or "–"),
        _leaves(record) or "–",
        _verdict(record).replace("|", "\\|"),
    ]
    return f"| {' | '.join(cells)} |"


def _leaves(record: Mapping[str, Any]) -> str:
    """Return the classes of the leaves with their share of the parameters."""
    shares: dict[str, float] = {}
    for kind, share, _ in record["leaves"]:
        shares[kind] = shares.get(kind, 0.0) + share
    return ", ".join(f"{kind}: {share:.1%}" for kind, share in shares.items())


def _verdict(record: Mapping[str, Any]) -> str:
    if record["reason"]:
        return record["reason"].splitlines()[0][:300]
    verdict = "refused" if record["group"] in REFUSED_GROUPS else "verified"
    if record["blocks"] < 2 and record["notes"]:
        verdict += f" ({'; '.join(record['notes'])[:200]})"
    return verdict


def main() -> None:
    options = _parser().parse_args()
    installed = [package for package in ZOOS if is_installed(package)]
    if not options.table:
        todo = []
        for zoo in options.zoo or installed:
            for entry in entries(zoo):
                is_wanted = options.only in f"{entry.zoo}/{entry.group}/{entry.name}"
                if is_wanted and (options.again or is_open(entry.path, options.failed)):
                    todo.append(entry)
        sweep(todo, options.jobs, options.limit)
    records = []
    for zoo in installed:
        for entry in entries(zoo):
            if entry.path.exists():
                records.append(json.loads(entry.path.read_text()))
            else:
                records.append(asdict(new_record(entry, "not run yet")))
    (RESULTS / "table.md").write_text(table(records))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--zoo",
        choices=ZOOS,
        action="append",
        help="a zoo to sweep; all that are installed by default",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="SUBSTRING",
        help="models whose zoo, group or name contains this",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one model")
    parser.add_argument("--again", action="store_true", help="verify models with a record again")
    parser.add_argument(
        "--failed", action="store_true", help="verify models again whose record is a failure"
    )
    parser.add_argument("--table", action="store_true", help="write the table only")
    return parser


if __name__ == "__main__":
    main()
