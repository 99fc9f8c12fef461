"""One call of a model and of its cut one, compared: logits and gradients, and where they part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from sffx.blocks import BlockPlan
from sffx.comparison.differences import (
    difference_in_words,
    error_in_words,
    gradient_error,
    tolerance_of,
)
from sffx.comparison.findings import HINT, Findings
from sffx.comparison.locate import Place, first_broken_block, first_wrong_node
from sffx.comparison.pair import Pair
from sffx.comparison.runs import Outcome, Run, relative_error, run_model, run_trunk, tolerance
from sffx.comparison.weights import TELLING, other_names, spread
from sffx.errors import InputError

# Gradients of single parameters are sums of many terms that may cancel.
_GRADIENT_FACTOR = 1000

MODEL_RAISES = "the model raises"

OUTPUTS_ARE_NAN = (
    "values of the model's output are nan on random inputs, so nothing could be compared there"
)

_NO_GRAD_HINT = (
    "without gradients torch runs other code for some layers in eval mode. nn.TransformerEncoder "
    "makes nested tensors there, and sets padded tokens to zero: enable_nested_tensor=False keeps "
    "it from that"
)


class OneCall:
    """Compares the outcomes of single calls.

    Args:
        model: that was cut.
        plan: of the cut model.
        new_pair: returns a new copy of the model, and the trunk of the cut one.
        findings: takes what differs.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: BlockPlan,
        new_pair: Callable[[], Pair],
        findings: Findings,
    ) -> None:
        self._model = model
        self._plan = plan
        self._new_pair = new_pair
        self._findings = findings

    def compare(self, run: Run, expected: Outcome, found: Outcome, done: list[Run]) -> bool:
        """Note the errors of one call; return whether the next calls can be compared.

        Args:
            run: the call.
            expected: what it gave in the model.
            found: what it gave in the cut model.
            done: the calls so far, with this one. They are repeated to find where it differs.
        """
        reason = self._why_not_compared(expected, found)
        if reason:
            self._findings.skip(run.name, reason)
            return True
        problem = self._why_no_logits(found)
        if problem:
            self._differ_at(run, problem, float("inf"), done)
            return False
        if found.failure is not None:
            problem = f"the net raises {error_in_words(found.failure)}"
            place = self._locate_backward(run)
            self._findings.differ(f"the backward pass, {run.name}", problem, place=place)
            return False
        error = relative_error(found.logits, expected.logits)
        self._findings.errors[run.name] = error
        self._note_if_vacuous(run, expected.logits)
        if error > tolerance(expected.logits.dtype):
            problem = difference_in_words(found.logits, expected.logits)
            self._differ_at(run, problem, error, done)
            return run.only_elsewhere
        return not run.backward or self._same_gradients(run, expected, found)

    def _why_not_compared(self, expected: Outcome, found: Outcome) -> str:
        """Return why a call cannot be compared; "" if it can."""
        if expected.failure is not None:
            return f"{MODEL_RAISES} {error_in_words(expected.failure)}"
        if not isinstance(expected.logits, Tensor):
            return f"the model returns a {type(expected.logits).__name__} without logits"
        is_noted = self._findings.is_noted("with a batch of one sample")
        if isinstance(found.failure, InputError) and is_noted:
            return "the net refuses it, as a note of the plan says"
        return ""

    def _why_no_logits(self, found: Outcome) -> str:
        """Return what the cut model did instead of returning logits; "" if it returned them."""
        if isinstance(found.logits, Tensor):
            return ""
        if found.failure is not None:
            return f"the net raises {error_in_words(found.failure)}"
        return f"the net returns a {type(found.logits).__name__}, not logits"

    def _same_gradients(self, run: Run, expected: Outcome, found: Outcome) -> bool:
        """Note the largest error of a gradient; return whether it is small enough."""
        largest = 0.0
        for gradient in expected.gradients.values():
            if gradient is not None and gradient.numel():
                largest = max(largest, float(gradient.abs().max()))
        worst = (0.0, "")
        names = other_names(self._model)
        for name, gradient in expected.gradients.items():
            # A block knows a shared parameter by some of its names.
            others = [found.gradients[each] for each in names[name] if each in found.gradients]
            own = others[0] if others else None
            worst = max(worst, (gradient_error(gradient, own, largest), name))
        error, name = worst
        where = f"gradients, {run.name}"
        self._findings.errors[where] = error
        if name and error > _GRADIENT_FACTOR * tolerance_of(expected.gradients):
            place = Place(module=name.rpartition(".")[0])
            self._findings.differ(where, f"the gradient of {name!r} is another one", error, place)
            return False
        return True

    def _note_if_vacuous(self, run: Run, logits: Tensor) -> None:
        """Note a call whose logits tell nothing: they are NaN, or the same for each sample."""
        if logits.isnan().any():
            self._findings.skip(f"values in {run.name}", OUTPUTS_ARE_NAN)
            return
        if len(logits) < 2:
            return
        difference = spread(logits)
        if not difference > TELLING:  # so is NaN, where all logits are zero
            reason = f"says nothing, since outputs differ by {difference:.0e} between samples"
            self._findings.skip(f"values in {run.name}", reason)

    def _differ_at(self, run: Run, problem: str, error: float, done: list[Run]) -> None:
        """Note a difference in values, with the first node that has it."""
        # Only other sizes and calls under no_grad are elsewhere.
        known = ("at another size",) if run.grad else ("nested", "the forward asks for")
        if run.only_elsewhere and any(map(self._findings.is_noted, known)):
            self._findings.skip(run.name, "it differs, as a note of the plan says")
            return
        place = self._locate(run, done)
        hint = HINT if run.grad else _NO_GRAD_HINT
        self._findings.differ(run.name, problem, error, place, hint, run.only_elsewhere)

    def _locate(self, run: Run, done: list[Run]) -> Place:
        """Repeat the calls up to this one on new copies, and look at the last one node by node."""
        pair = self._new_pair()
        earlier = [each for each in done if each is not run]
        for each in earlier:
            pair.run(each)
        forward = replace(run, backward=False)
        return first_wrong_node(
            lambda: run_model(pair.model, forward, self._plan),
            lambda: run_trunk(pair.trunk, forward),
            pair.model,
            pair.trunk,
        )

    def _locate_backward(self, run: Run) -> Place:
        """Return the first block that has no backward pass of its own."""
        pair = self._new_pair()
        forward = replace(run, backward=False)
        return first_broken_block(lambda: run_trunk(pair.trunk, forward), pair.trunk)
