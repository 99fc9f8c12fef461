"""The check that `transform` makes by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import fx, nn

from sffx.comparison.check import complete_check, quick_check
from sffx.comparison.one_call import OUTPUTS_ARE_NAN
from sffx.errors import CheckError, InputError, shown
from sffx.net import CutModel, plan_of, set_plan

# Below these a check adds less than half to the time of the cut: multiply-adds for one sample, and
# parameters.
_MOST_MACS = 20_000_000
_MOST_PARAMETERS = 5_000_000


def checked(model: nn.Module, net: CutModel, how: bool | Literal["auto"]) -> CutModel:
    """Return a cut model that was compared with its model, with what differs elsewhere as notes.

    Args:
        model: that was cut.
        net: the cut model.
        how: True for everything that `check` compares, False for nothing; "auto" for a part of it
            where the model is small.

    Raises:
        CheckError: the cut model does not compute what the model computes.
        InputError: `how` is something else.
    """
    is_auto = isinstance(how, str) and how == "auto"
    if not is_auto and not isinstance(how, bool):
        raise InputError(f"check is {shown(how)}. Hint: pass True, False or 'auto'")
    if how is False or (is_auto and not _is_small(net)):
        return net
    if is_auto:
        try:
            report = quick_check(model, net)
        except Exception as failure:
            # What nobody asked for does not stop the cut.
            _add_notes(net, [f"values were not compared: {failure}"])
            return net
    else:
        report = complete_check(model, net)
    found = report.difference
    if found is not None and not found.only_elsewhere:
        raise CheckError(str(found), report)
    notes = [str(difference) for difference in report.differences]
    notes += [reason for reason in report.skipped.values() if reason == OUTPUTS_ARE_NAN]
    _add_notes(net, list(dict.fromkeys(notes)))
    return net


def _is_small(net: fx.GraphModule) -> bool:
    """Return whether a check of a cut model takes little time."""
    if any(parameter.is_meta for parameter in net.parameters()):
        return False
    blocks = plan_of(net).all_blocks
    macs = sum(block.macs for block in blocks)
    parameters = sum(block.num_parameters for block in blocks)
    return macs <= _MOST_MACS and parameters <= _MOST_PARAMETERS


def _add_notes(net: CutModel, notes: list[str]) -> None:
    """Let the plan of a cut model say more. The model stays the object that was verified."""
    if notes:
        set_plan(net, replace(net.plan, notes=(*net.plan.notes, *notes)))
