"""The work of `sffx-export`: load the trained model, export it, report what was written."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from torch import fx

from sffx.checkpoint import load_checkpoint
from sffx.cli.cut import complete_options, cut_options
from sffx.cli.models import as_script, find_model
from sffx.errors import InputError
from sffx.export.onnx import export_onnx
from sffx.export.prepare import chosen_readout
from sffx.export.program import export_program
from sffx.files import require_folder_of
from sffx.net import plan_of
from sffx.tables import in_mib

SUFFIXES = (".onnx", ".pt2")


def export(options: argparse.Namespace) -> None:
    """Write the file and print what is in it."""
    if options.target.suffix not in SUFFIXES:
        raise InputError(
            f"{str(options.target)!r} ends in neither {' nor '.join(SUFFIXES)}. "
            "Hint: net.onnx, or net.pt2 for torch.export"
        )
    # Now, because loading and checking the model takes a while.
    require_folder_of(options.target)
    class_names = _class_names(options.class_names)
    net = _whole_net(options) if options.command == "whole" else _net_from_weights(options)
    readout = chosen_readout(net, options.readout)
    write = export_onnx if options.target.suffix == ".onnx" else export_program
    write(
        net,
        options.target,
        readout,
        class_names=class_names,
        mean=options.mean,
        std=options.std,
        dynamic_size=options.dynamic_size,
    )
    _report(net, readout, options.target)


def _report(net: fx.GraphModule, readout: str, target: Path) -> None:
    plan = plan_of(net)
    inputs = []
    for each in plan.inputs:
        sizes = ", ".join(map(str, each.shape))
        inputs.append(f"{each.name} (B, {sizes})" if sizes else f"{each.name} (B,)")
    outputs = plan.task.count_in_words(plan.num_classes)
    print(
        f"wrote {target}, {in_mib(target.stat().st_size)}: {readout} scores of {plan.model}, "
        f"{len(plan)} blocks, {outputs}, from {', '.join(inputs)}"
    )


def _class_names(path: Path | None) -> list[str] | None:
    """Return the names in a file, a name on each line or a JSON list.

    Raises:
        InputError: the file cannot be read.
    """
    if path is None:
        return None
    try:
        # Editors of Windows put a mark before the first name, which is no part of it.
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the class names cannot be read: {error}. Hint: name a text file, one class a line"
        ) from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # "[PAD]" on a line of its own is the name of a token.
    is_list = bool(lines) and lines[0].startswith("[") and not re.fullmatch(r"\[\w+\]", lines[0])
    if not is_list:
        return lines
    try:
        return list(json.loads(text))
    except ValueError as error:
        raise InputError(
            f"{str(path)!r} is no JSON list: {error}. Hint: or write one name on each line"
        ) from error


def _net_from_weights(options: argparse.Namespace) -> fx.GraphModule:
    """Return the plain model, cut as the trained one was and filled with its weights."""
    with as_script(None):
        checkpoint = load_checkpoint(options.checkpoint, trust=options.trust)
    if checkpoint.whole is not None:
        raise InputError(
            f"{str(options.checkpoint)!r} holds a whole model, which is cut already. "
            f"Hint: sffx-export whole {options.checkpoint} {options.target}"
        )
    checkpoint.require_weights()
    arguments = complete_options(checkpoint, cut_options(options))
    model = find_model(options.model, num_classes=arguments.get("num_classes"), filled=True)
    return checkpoint.net(model, **arguments)


def _whole_net(options: argparse.Namespace) -> fx.GraphModule:
    # The classes of the model are looked for in the current folder, too.
    with as_script(None):
        checkpoint = load_checkpoint(options.checkpoint, trust=True)
    if checkpoint.whole is None:
        checkpoint.require_weights()
        raise InputError(
            f"{str(options.checkpoint)!r} holds weights without their model. "
            f"Hint: sffx-export {options.checkpoint} {options.target} --model SOURCE"
        )
    return checkpoint.net()
