"""Objectives by name, and as an entry of a checkpoint's record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from sffx.errors import InputError
from sffx.learning.objectives.channelwise import CwC
from sffx.learning.objectives.directional import CFFA
from sffx.learning.objectives.forward_forward import ForwardForward
from sffx.learning.objectives.pairs import FFCL
from sffx.learning.objectives.self_contrastive import SCFF
from sffx.learning.objectives.unsupervised import UnsupervisedForwardForward
from sffx.objective import SFF, Objective

# The objectives that a name means, with their published defaults.
OBJECTIVES: dict[str, type[Objective]] = {
    "sff": SFF,
    "cwc": CwC,
    "ff": ForwardForward,
    "ff-unsupervised": UnsupervisedForwardForward,
    "scff": SCFF,
    "ffcl": FFCL,
    "cffa": CFFA,
}

# The same names for type checkers and editors.
ObjectiveName: TypeAlias = Literal["sff", "cwc", "ff", "ff-unsupervised", "scff", "ffcl", "cffa"]


def objective_named(objective: Any) -> Objective:
    """Return the objective that a name means, or the one that was passed.

    Raises:
        InputError: there is no such objective.
    """
    if isinstance(objective, Objective):
        return objective
    if isinstance(objective, str) and objective in OBJECTIVES:
        return OBJECTIVES[objective]()
    names = ", ".join(map(repr, OBJECTIVES))
    hint = f"choose one of {names}, or pass an object of sffx.objectives"
    if isinstance(objective, type) and issubclass(objective, Objective):
        hint = f"pass an instance, {objective.__name__}()"
    raise InputError(f"there is no objective {objective!r}. Hint: {hint}")


def objective_of_record(record: Any) -> Objective:
    """Return the objective that `Objective.record` wrote.

    Raises:
        InputError: it is of no known objective. One of the user's own must be passed again.
    """
    options = dict(record) if isinstance(record, Mapping) else {}
    name = options.pop("name", None)
    try:
        return OBJECTIVES[name](**options)
    except (KeyError, TypeError) as cause:
        names = ", ".join(OBJECTIVES)
        raise InputError(
            f"{record!r} is the record of no known objective ({names}). "
            "Hint: pass an objective of your own as objective=..."
        ) from cause
