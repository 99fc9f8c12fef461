"""Objectives by name, and as an entry of a checkpoint's record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from sffx.checks import positive_integer
from sffx.errors import InputError, shown
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
        InputError: there is no such objective, or it breaks the contract of `sffx.objective`.
    """
    if isinstance(objective, Objective):
        _require_contract(objective)
        return objective
    if isinstance(objective, str) and objective in OBJECTIVES:
        return OBJECTIVES[objective]()
    names = ", ".join(map(repr, OBJECTIVES))
    hint = f"choose one of {names}, or pass an object of sffx.objectives"
    if isinstance(objective, type) and issubclass(objective, Objective):
        hint = f"pass an instance, {objective.__name__}()"
    raise InputError(f"there is no objective {shown(objective)}. Hint: {hint}")


def _require_contract(objective: Objective) -> None:
    """Raise an InputError if an objective of the user's own breaks the contract."""
    kind = type(objective).__name__
    name = objective.name
    if not isinstance(name, str) or not name:
        raise InputError(f"the objective {kind} has the name {name!r}. Hint: name = 'mine' in it")
    known = OBJECTIVES.get(name)
    if known is not None and type(objective) is not known:
        raise InputError(
            f"the objective {kind} has the name {name!r}, which is that of {known.__name__}: a "
            f"checkpoint of it would be loaded as a {known.__name__}. Hint: name = 'mine' in the "
            f"class {kind}"
        )
    positive_integer(f"views of the objective {name!r}", objective.views)
    skips = objective.skips
    if not isinstance(skips, int) or skips < 0:
        raise InputError(
            f"skips of the objective {name!r} is {skips!r}. Hint: how many blocks the ensemble "
            "leaves out, 0 for none"
        )
    if objective.views > 1 and not objective.makes_views:
        raise InputError(
            f"the objective {name!r} has {objective.views} views, but no training_views, which "
            f"makes them. Hint: override it in the class {kind}"
        )
    if objective.goodness is None and type(objective).make_head is Objective.make_head:
        raise InputError(
            f"the objective {name!r} has the goodness None, but no make_head, which makes the "
            f"heads. Hint: override it in the class {kind}, or leave the goodness as it is"
        )


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
