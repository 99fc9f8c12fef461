"""Cut every model of a zoo and verify what comes out, one process a model; what is recorded already is skipped.

    python tools/zoo.py --jobs 2                     # all zoos that are installed, then the table
    python tools/zoo.py --zoo timm --only vit --again
    python tools/zoo.py --table                      # the table alone, from the records

A model is verified when all of this holds (`verify_model`):

- `sffx.transform` cuts it by the default policy, with no exception made for it, into two feature blocks or more, or the plan says why not;
- the trunk without norms computes what the original does, in train and in eval mode, at a batch size other than the traced one; weights
  that start as constants (zeroed heads, layer scales) are drawn anew and BN is calibrated before, and outputs must differ between samples;
- each trainable parameter that backpropagation reaches has gradient from exactly one block's loss, and has it after a `local_loss` step;
- for a sample of families, the ONNX file agrees with torch.

Models are built with 10 classes and random weights, and run at the smallest image size that they accept.
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
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import sffx
from sffx.draw.render import write
from sffx.learning.losses import block_loss

RESULTS = Path(__file__).parent / "results" / "zoo"
FAMILIES = Path(__file__).parent / "zoo_timm.txt"
PACKAGES = ("torch", "torchvision", "timm", "transformers")
TOLERANCE = 1e-5
CLASSES = 10
SAMPLES = 3
IMAGES = (64, 96, 128, 160, 192, 224, 240, 256, 288, 299, 320, 384, 448, 512, 56)
CLIPS = ((4, 32), (8, 64), (16, 64), (16, 112), (16, 224))
ONNX = {
    *(
        "torchvision/resnet18",
        "torchvision/mobilenet_v3_small",
        "torchvision/densenet121",
        "torchvision/shufflenet_v2_x0_5",
    ),
    *(
        "torchvision/vit_b_32",
        "torchvision/efficientnet_b0",
        "torchvision/googlenet",
        "torchvision/regnet_y_400mf",
        "torchvision/r3d_18",
    ),
    *("timm/resnet10t", "timm/ghostnet_050", "timm/test_convnext", "timm/test_vit"),
}

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """One model of a zoo.

    Attributes:
        zoo: the package that it comes from.
        name: in that package; unique in the zoo.
        group: what the table lists it under. Models of "refused" groups are no classifiers and must be refused with a helpful error.
    """

    zoo: str
    name: str
    group: str

    @property
    def path(self) -> Path:
        return RESULTS / self.zoo / f"{self.name}.json"

    @property
    def refused(self) -> bool:
        return self.group in ("detection", "segmentation", "optical_flow")


@dataclass
class Record:
    """What was found about one model; `reason` is empty where it is verified."""

    zoo: str
    name: str
    group: str
    reason: str = "not finished"
    parameters: int = 0
    blocks: int = 0
    leaves: list[tuple[str, float, str]] = field(
        default_factory=list
    )  # class, share of the parameters, why
    notes: list[str] = field(default_factory=list)
    input: str = ""
    onnx: bool = False
    seconds: float = 0.0
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        write(path, (re.sub(r"/[^\s\"]*/site-packages/", "", text) + "\n").encode())


class Unverified(AssertionError):
    """A model breaks one of the promises; the message is the reason in the table."""


# The zoos


def entries(zoo: str) -> list[Entry]:
    """List the models of a zoo, the smallest architectures of each timm module only."""
    if zoo == "torchvision":
        from torchvision import models

        parts = {
            "classification": models,
            "video": models.video,
            "quantizable": models.quantization,
            "detection": models.detection,
        }
        parts |= {"segmentation": models.segmentation, "optical_flow": models.optical_flow}
        return [
            Entry(zoo, name, group)
            for group, part in parts.items()
            for name in models.list_models(module=part)
        ]
    if zoo == "timm":
        rows = [
            line.split()
            for line in FAMILIES.read_text().splitlines()
            if line and not line.startswith("#")
        ]
        return [Entry(zoo, name, module) for module, name in rows]
    return [Entry(zoo, name, "classification") for name in TRANSFORMERS]


def build(entry: Entry) -> nn.Module:
    """Build a model with random weights."""
    if entry.zoo == "torchvision":
        from torchvision import models

        options: dict[str, Any] = {} if entry.refused else {"num_classes": CLASSES}
        if entry.group in ("detection", "segmentation"):
            options["weights_backbone"] = None
        if entry.name.startswith("vit_"):
            options["image_size"] = 4 * int(entry.name[-2:])  # 16 patches
        return models.get_model(entry.name, weights=None, **options)
    if entry.zoo == "timm":
        import timm

        return timm.create_model(entry.name, pretrained=False, num_classes=CLASSES)
    import transformers

    kind, options = TRANSFORMERS[entry.name]
    model_class = getattr(transformers, kind)
    return model_class(model_class.config_class(num_labels=CLASSES, **options))


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
    """Return random inputs of the smallest size that the model runs on, for a batch of `SAMPLES`."""
    if entry.zoo == "transformers":
        return _transformer_input(model)
    images = [(3, size, size) for size in IMAGES]
    own = getattr(model, "default_cfg", {}).get("input_size", images[0])
    sizes = (
        [(3, frames, side, side) for frames, side in CLIPS]
        if entry.group == "video"
        else [(own[0], *s[1:]) for s in images] + [own]
    )
    failure: Exception | None = None
    for size in sizes:
        x = torch.randn(SAMPLES, *size)
        try:
            with torch.no_grad():
                model.train()(x), model.eval()(x)
        except Exception as cause:
            failure = cause
        else:
            return {"x": x}
    raise Unverified(f"no input size is accepted, the last failed with {failure}")


def _transformer_input(model: nn.Module) -> Inputs:
    if model.main_input_name == "pixel_values":
        return {
            "pixel_values": torch.randn(SAMPLES, 3, *2 * [getattr(model.config, "image_size", 64)])
        }
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(SAMPLES, 800)}
    mask = torch.ones(SAMPLES, 12, dtype=torch.int64)
    mask[0, 8:] = 0
    return {"input_ids": torch.randint(1, 100, (SAMPLES, 12)), "attention_mask": mask}


# What is verified


def verify_model(
    model: nn.Module, inputs: Inputs, record: Record, *, onnx: bool = False
) -> fx.GraphModule:
    """Cut a model and check every promise; the model's weights are changed. What is found goes into the record.

    Raises:
        Unverified: a promise is broken.
        SffxError: the model cannot be cut.
    """
    torch.manual_seed(0)
    draw_constants(model)
    calibrate(model, inputs)
    record.parameters = sum(p.numel() for p in model.parameters())
    record.input = ", ".join(f"{name} {tuple(value.shape[1:])}" for name, value in inputs.items())
    net = sffx.transform(model.train(), example_input=_call_arguments(inputs))
    record.blocks, record.notes = len(net.plan), list(net.plan.notes)
    record.leaves = [(leaf.kind, leaf.share, leaf.reason) for leaf in net.plan.leaves]
    if len(net.plan) < 2 and not net.plan.notes:
        raise Unverified("one feature block, and the plan does not say why")
    _check_trunk(model, net, inputs)
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
    """Return the logits of a model, or what a cut model returns, drawing the same random numbers each time."""
    torch.manual_seed(1), random.seed(1)
    output: Any = model(inputs["x"]) if set(inputs) == {"x"} else model(**inputs)
    output = output.logits if hasattr(output, "logits") else output
    return output[0] if isinstance(output, tuple) else output


def draw_constants(model: nn.Module) -> None:
    """Draw anew what starts as a constant: a zeroed head or a layer scale of 1e-6 would hide what is before it."""
    for p in model.parameters():
        first = p.detach().flatten()[:1]
        if (
            p.numel() == 0
            or not bool((p == first).all())
            or (p.numel() == 1 and first.abs() > 1e-3)
        ):
            continue
        with torch.no_grad():
            if first == 0:
                p.normal_(0, 0.1 if p.ndim < 2 else max(p[0].numel(), 1) ** -0.5)
            else:
                p.uniform_(0.5, 1.5)


def calibrate(model: nn.Module, inputs: Inputs) -> None:
    """Let BN's running statistics be those of the batch, or outputs in eval mode would say nothing."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        _run(model.train(), inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


class PassOn(nn.Module):
    """Stands for a norm that is left out, with or without a mask."""

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        return x


def _check_trunk(model: nn.Module, net: fx.GraphModule, inputs: Inputs) -> None:
    """Check that without norms the cut model's logits are the original's."""
    norms = {name: module for name, module in net.named_children() if name.startswith("norm_")}
    for name in norms:
        setattr(net, name, PassOn())
    net.readout.mode = "classifier"
    with torch.no_grad():
        try:
            _check_same(_run(net.train(), inputs)[-1], _run(model.train(), inputs), "train")
        except (
            Unverified
        ):  # random numbers may be drawn for what was left out, such as auxiliary classifiers
            _drop_nothing(model), _drop_nothing(net)
            _check_same(_run(net.train(), inputs)[-1], _run(model.train(), inputs), "train")
        _check_same(_run(net.eval(), inputs), _run(model.eval(), inputs), "eval")
    net.readout.mode = "ensemble"
    for name, norm in norms.items():
        setattr(net, name, norm)


def _check_same(found: Tensor, expected: Tensor, mode: str) -> None:
    spread = (expected - expected.mean(0)).abs().max() / expected.abs().max()
    if not spread > 1e-4:  # also where it is no number
        raise Unverified(
            f"vacuous in {mode} mode: the original's outputs differ by {spread:.0e} between samples"
        )
    error = (found - expected).abs().max() / expected.abs().max()
    if not error <= TOLERANCE:
        raise Unverified(
            f"the trunk differs from the original in {mode} mode, relative error {error:.1e}"
        )


def _drop_nothing(model: nn.Module) -> None:
    for module in model.modules():
        for rate in ("p", "drop_prob"):
            if "Drop" in type(module).__name__ and hasattr(module, rate):
                setattr(module, rate, 0.0)


def _check_gradients(model: nn.Module, net: fx.GraphModule, inputs: Inputs) -> None:
    """Check that each parameter which backpropagation reaches has gradient from exactly one block, and after a `local_loss` step."""
    labels = torch.arange(SAMPLES) % CLASSES
    F.cross_entropy(_run(model.train(), inputs), labels).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    names = {id(p): name for name, p in net.origin.model.named_parameters()}
    blocks = _blocks_that_reach(net.train(), inputs, labels)
    sffx.local_loss(net, _call_arguments(inputs), labels).backward()
    trained = {names[id(p)] for p in net.parameters() if id(p) in names and p.grad is not None}
    several = sorted(names[key] for key, count in blocks.items() if count > 1 and key in names)
    single = {names[key] for key, count in blocks.items() if count == 1 and key in names}
    if several:
        raise Unverified(f"gradient from several blocks: {_shown(several)}")
    if missing := sorted(reached - (trained & single)):
        raise Unverified(f"no gradient, though backpropagation reaches it: {_shown(missing)}")
    if surplus := sorted((trained | single) - reached):
        raise Unverified(f"gradient, though backpropagation does not reach it: {_shown(surplus)}")


def _blocks_that_reach(net: fx.GraphModule, inputs: Inputs, labels: Tensor) -> Counter[int]:
    """Count, for each parameter by its id, the blocks whose loss gives it gradient."""
    scores: list[Tensor] = []
    handle = net.readout.register_forward_pre_hook(lambda _, args: scores.extend(args[0]))
    _run(net, inputs)
    handle.remove()
    parameters = [p for p in net.parameters() if p.requires_grad]
    found: Counter[int] = Counter()
    for score in scores:
        gradients = torch.autograd.grad(
            block_loss(score, labels), parameters, retain_graph=True, allow_unused=True
        )
        found.update(
            id(p) for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None
        )
    return found


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_refusal(model: nn.Module, record: Record) -> None:
    """Check that a model which is no classifier is refused with an error that names a module and the way out.

    Raises:
        Unverified: it is not.
    """
    record.parameters = sum(p.numel() for p in model.parameters())
    try:
        sffx.transform(
            model,
            example_input=torch.zeros(1, 3, 64, 64)
            if "raft" not in record.name
            else 2 * (torch.zeros(1, 3, 128, 128),),
        )
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
    record, start = new_record(entry), time.monotonic()
    try:
        torch.manual_seed(0)
        model = build(entry)
        if entry.refused:
            check_refusal(model, record)
        else:
            verify_model(
                model, fitting_input(entry, model), record, onnx=f"{entry.zoo}/{entry.name}" in ONNX
            )
    except (Exception, RecursionError) as failure:
        record.reason = (
            f"{type(failure).__name__}: {failure}"
            if not isinstance(failure, Unverified)
            else str(failure)
        )
        if os.environ.get("ZOO_TRACEBACK"):
            traceback.print_exc()
    record.seconds = round(time.monotonic() - start, 1)
    record.write(entry.path)


def new_record(entry: Entry, reason: str = "not finished") -> Record:
    versions = {
        package: importlib.metadata.version(package) for package in (PACKAGES[0], entry.zoo)
    }
    return Record(
        entry.zoo, entry.name, entry.group, reason, date=date.today().isoformat(), versions=versions
    )


def sweep(todo: list[Entry], jobs: int, limit: float) -> None:
    """Verify models in processes of their own, `jobs` at a time, each for at most `limit` seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "torch._dynamo", *{entry.zoo for entry in todo}])
    with ThreadPoolExecutor(jobs) as pool:
        for i, line in enumerate(
            pool.map(lambda entry: _supervised(context, entry, limit), todo), start=1
        ):
            print(f"{i:4}/{len(todo)}  {line}", flush=True)


def _supervised(context: Any, entry: Entry, limit: float) -> str:
    entry.path.unlink(missing_ok=True)
    exitcode, _ = run_apart(context, measure, entry, limit)
    if not entry.path.exists():
        record = new_record(entry)
        record.reason = (
            f"no answer after {limit:.0f} s"
            if exitcode == -9
            else f"the process died, exit code {exitcode}"
        )
        record.write(entry.path)
    found = json.loads(entry.path.read_text())
    return f"{entry.zoo}/{entry.name}  {found['blocks']} blocks  {found['seconds']} s  {found['reason'] or 'verified'}"


def run_apart(
    context: Any, function: Callable[[Any], None], argument: Any, limit: float
) -> tuple[int, bool]:
    """Call a function in a process of its own, for at most `limit` seconds; return its exit code, and whether it was killed by then."""
    process = context.Process(target=function, args=(argument,))
    process.start()
    process.join(limit)
    late = process.is_alive()
    if late:
        process.kill()
        process.join()
    return process.exitcode, late


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# The table


def table(records: list[Mapping[str, Any]]) -> str:
    """Write the records as Markdown, the counts first."""
    dates = sorted({r["date"] for r in records})
    versions = dict(sorted({(k, v) for r in records for k, v in r["versions"].items()}))
    installed = ", ".join(f"{package} {version}" for package, version in versions.items())
    lines = [
        "# Model zoos, cut and verified",
        "",
        f"`python tools/zoo.py`, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, {installed}.",
        "What verified means is said at the top of [tools/zoo.py](../../zoo.py).",
        "",
        "| zoo | models | verified | of these with the ONNX file checked |",
        "|---|---|---|---|",
        *_counts(records),
        "",
        "| model | parameters | feature blocks | leaves: share of the parameters | verified, or why not |",
        "|---|--:|--:|---|---|",
        *(_row(r) for r in records),
    ]
    return "\n".join(lines) + "\n"


def _kind(record: Mapping[str, Any]) -> str:
    return (
        record["zoo"]
        if record["zoo"] != "torchvision"
        else f"torchvision, {record['group'].replace('_', ' ')}"
    )


def _counts(records: list[Mapping[str, Any]]) -> Iterator[str]:
    for kind in dict.fromkeys(map(_kind, records)):
        mine = [r for r in records if _kind(r) == kind]
        good = [r for r in mine if not r["reason"]]
        refused = Entry("", "", mine[0]["group"]).refused
        cells = (
            f"{len(good)} refused with a way out"
            if refused
            else f"{len(good)} ({len(good) / len(mine):.1%})"
        )
        yield f"| {kind} | {len(mine)} | {cells} | {sum(r['onnx'] for r in mine) or '–'} |"


def _row(r: Mapping[str, Any]) -> str:
    kinds = dict.fromkeys(kind for kind, _, _ in r["leaves"])
    leaves = ", ".join(
        f"{kind}: {sum(share for k, share, _ in r['leaves'] if k == kind):.1%}" for kind in kinds
    )
    why = (
        r["reason"].splitlines()[0][:300]
        if r["reason"]
        else "refused"
        if Entry("", "", r["group"]).refused
        else "verified"
    )
    if not r["reason"] and r["blocks"] < 2 and r["notes"]:
        why += f" ({'; '.join(r['notes'])[:200]})"
    model = f"{_kind(r)}: {r['name']}"
    return f"| {model} | {r['parameters']:,} | {r['blocks'] or '–'} | {leaves or '–'} | {why.replace('|', chr(92) + '|')} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--zoo",
        choices=PACKAGES[1:],
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
    parser.add_argument(
        "--again", action="store_true", help="verify what is recorded already once more"
    )
    parser.add_argument(
        "--failed", action="store_true", help="verify what is recorded as not verified once more"
    )
    parser.add_argument("--table", action="store_true", help="write the table only")
    options = parser.parse_args()
    zoos = options.zoo or [package for package in PACKAGES[1:] if _installed(package)]
    listed = [
        entry
        for zoo in zoos
        for entry in entries(zoo)
        if options.only in f"{entry.zoo}/{entry.group}/{entry.name}"
    ]
    if not options.table:
        sweep(
            [entry for entry in listed if options.again or is_open(entry.path, options.failed)],
            options.jobs,
            options.limit,
        )
    known = [entry for package in PACKAGES[1:] if _installed(package) for entry in entries(package)]
    records = [
        json.loads(entry.path.read_text())
        if entry.path.exists()
        else asdict(new_record(entry, "not run yet"))
        for entry in known
    ]
    (RESULTS / "table.md").write_text(table(records))


def is_open(path: Path, failed: bool) -> bool:
    """Whether there is no record yet, or, where failures count, one of a failure."""
    return not path.exists() or (failed and bool(json.loads(path.read_text())["reason"]))


if __name__ == "__main__":
    main()
