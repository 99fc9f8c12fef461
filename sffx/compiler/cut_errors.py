"""The errors of a cut that cannot be made, and of a model that has none."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from sffx.compiler.cut_sets import Cut, in_words, main_value
from sffx.compiler.steps import Step
from sffx.compiler.trace.trace import Trace
from sffx.compiler.way_out import way_out
from sffx.errors import CutError

MOST_CANDIDATES = 12  # that an error lists


def refused(cut: Cut, reason: str, name: str, candidates: Sequence[Cut]) -> CutError:
    """Return the error of a cut that no block can end at.

    Args:
        cut: as the user or the policy named it.
        reason: why it cannot be made.
        name: of its main value. The hint begins with the candidates whose names resemble it.
        candidates: the cuts that can be made.
    """
    hint = _candidate_hint(name, candidates)
    return CutError(f"no cut can lie {in_words(cut)}: {reason}. Hint: {hint}")


def nothing_was_cut(steps: Sequence[Step], candidates: Sequence[Cut], trace: Trace) -> CutError:
    """Return the error of a policy that chose no cut.

    Args:
        steps: of the model.
        candidates: the cuts that can be made.
        trace: of the model.
    """
    if candidates:
        return CutError(
            "the policy found no block besides the classifier. Hint: choose another policy, "
            f"or pass a list of node names; the candidates are {listed(candidates)}"
        )
    first_reasons = [f"{step.node}: {step.refusal}" for step in steps[:4]]
    reasons = "; ".join(first_reasons)
    return CutError(
        "the model has no node to cut at, since no value lies on every path from input to "
        f"logits and may be cut ({reasons}). " + way_out(trace, [step.refusal for step in steps])
    )


def _candidate_hint(name: str, candidates: Sequence[Cut]) -> str:
    """Return a hint that lists the candidates, first those whose names resemble a name."""
    if not candidates:
        return "the model has no candidates"
    main_values = [main_value(cut) for cut in candidates]
    near = difflib.get_close_matches(name, main_values, n=3, cutoff=0.6)
    similar = [candidates[main_values.index(each)] for each in near]
    alternatives = " or ".join(repr(cut) for cut in similar)
    meant = f"did you mean {alternatives}? " if near else ""
    return f"{meant}The candidates are {listed(candidates)}"


def listed(candidates: Sequence[Cut]) -> str:
    """Return candidates as an error lists them: at most twelve, with the number of the others."""
    written = [_written(cut) for cut in candidates]
    if len(written) > MOST_CANDIDATES:
        shown = MOST_CANDIDATES - 1
        written = [*written[:shown], f"… {len(candidates) - shown} more"]
    return ", ".join(written)


def _written(cut: Cut) -> str:
    return cut if isinstance(cut, str) else str(cut)
