"""Checkpoints of trainings, read for what a drawing shows of them: the accuracy and the learning rate of each block.

A checkpoint is what `torch.save` or Lightning writes: a mapping. Three of its entries are read:

- `ACCURACY_KEY`, accuracies by readout, as `sffx.evaluate(net, loader).accuracy` has them;
- "optimizer", a `state_dict` of an optimizer over `sffx.parameter_groups`, or "optimizer_states", Lightning's list of such;
- `CUT_KEY`, how the model was cut, if the checkpoint says so, as `net.plan.record()` does.

`sffx.lightning.SFFModule` writes all of them into every checkpoint, as does `examples/train.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sffx.blocks import BlockPlan
from sffx.draw.progress import BLOCK, Progress
from sffx.errors import InputError
from sffx.keys import ACCURACY_KEY, CUT_KEY

REMEDY = (
    "Hint: sffx.lightning.SFFModule and examples/train.py write such checkpoints; in a loop of your own, "
    f'torch.save({{"net": net.state_dict(), "optimizer": optimizer.state_dict(), '
    f'"{ACCURACY_KEY}": sffx.evaluate(net, loader).accuracy, "{CUT_KEY}": net.plan.record()}}, path)'
)


def read_checkpoint(path: str | os.PathLike[str], plan: BlockPlan) -> Progress:
    """Read what a training had come to when its checkpoint was written. Nothing in the file is executed.

    Args:
        path: of the file.
        plan: of the cut model that was trained; the checkpoint must be of the same blocks.

    Returns:
        the accuracies of all blocks, and the learning rates of those that were trained.

    Raises:
        InputError: there is no such file, it is no checkpoint, holds no accuracies, or is of other blocks.
    """
    return progress_in(read_mapping(Path(path)), path, plan)


def progress_in(
    content: Mapping[str, Any], path: str | os.PathLike[str], plan: BlockPlan
) -> Progress:
    """Read the same from what the file holds; see `read_checkpoint`."""
    accuracy = content.get(ACCURACY_KEY)
    if not isinstance(accuracy, Mapping) or not all(
        isinstance(value, (int, float)) and 0 <= value <= 1 for value in accuracy.values()
    ):
        entries = ", ".join(map(repr, content)) or "nothing"
        raise InputError(
            f"{str(path)!r} holds no accuracies of blocks; it holds {entries}. {REMEDY}"
        )
    _check_blocks(path, plan, accuracy)
    _check_cuts(path, plan, content)
    rates = _rates(content)
    targets = {block.target for block in plan.all_blocks}
    return Progress(
        accuracy={str(name): float(value) for name, value in accuracy.items()},
        rates={name: rate for name, rate in rates.items() if name in targets},
    )


def read_mapping(path: Path) -> Mapping[str, Any]:
    """Return what a checkpoint holds, by name. Nothing in the file is executed.

    Raises:
        InputError: there is no such file, it is no checkpoint, or holds something else.
    """
    import torch  # here, because the command's --help should not wait for it

    if not path.is_file():
        raise InputError(f"there is no checkpoint {str(path)!r}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as cause:
        raise InputError(
            f"{str(path)!r} cannot be read as a checkpoint, or holds more than tensors, numbers, strings and containers of these, and "
            f"nothing else is loaded ({type(cause).__name__}). {REMEDY}"
        ) from cause
    if not isinstance(content, Mapping):
        raise InputError(
            f"{str(path)!r} holds a {type(content).__name__}, not a mapping with accuracies of blocks. {REMEDY}"
        )
    return content


def _check_blocks(
    path: str | os.PathLike[str], plan: BlockPlan, accuracy: Mapping[str, Any]
) -> None:
    wanted = {block.target for block in plan.all_blocks}
    missing = sorted(wanted - set(accuracy))
    others = sorted(name for name in accuracy if name.startswith(BLOCK) and name not in wanted)
    if missing or others:
        told = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(others)} as well"
        raise InputError(
            f"{str(path)!r} is of other blocks than the {len(plan)} of the policy {plan.policy}: it {told}. "
            "Hint: --policy and --input as in the training, or the model that was trained"
        )


def _check_cuts(path: str | os.PathLike[str], plan: BlockPlan, content: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that says that its blocks end after other nodes."""
    if CUT_KEY not in content:
        return
    told = content[CUT_KEY]
    theirs = list(told.get("after") or ()) if isinstance(told, Mapping) else []
    ours = [block.output for block in plan]
    if theirs != ours:
        raise InputError(
            f"{str(path)!r} is of other blocks than those of the policy {plan.policy}: they end after {', '.join(map(str, theirs))}, "
            f"not {', '.join(ours)}. Hint: --policy and --input as in the training"
        )


def _rates(content: Mapping[str, Any]) -> dict[str, float]:
    states = content.get("optimizer_states") or [content.get("optimizer")]
    groups = [
        group
        for state in states
        if isinstance(state, Mapping)
        for group in state.get("param_groups", ())
    ]
    return {
        str(group["name"]): float(group["lr"])
        for group in groups
        if "name" in group and "lr" in group
    }
