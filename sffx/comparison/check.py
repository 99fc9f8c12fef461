"""`check`: the model and the cut one side by side, on real numbers.

`transform` looks at shapes and at gradients, on fake tensors. This looks at values: the trunk of
the cut model, without heads and norms, must compute what the model computes.

1. The weights: those of `extract(net)` are the model's.
2. Train mode: logits and gradients, a second call, another batch size.
3. Eval mode: with and without gradients, another batch size, after the calls in train mode.
4. What these calls leave behind: buffers, and the calls of hooks.
5. The scores of each block: one for each sample and class.
6. Other sizes of images or lengths, where the model takes them.
7. The way back: `extract(net)` computes what the model computes.

Both run on copies with the same weights, inputs and random numbers. Weights that start as
constants are drawn anew in the copies, and batch norms are calibrated.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx, nn

from sffx.blocks import Input
from sffx.checks import require_flag
from sffx.comparison.batches import Batches
from sffx.comparison.calls import Calls
from sffx.comparison.differences import (
    difference_in_words,
    error_in_words,
)
from sffx.comparison.findings import Findings
from sffx.comparison.locate import Place
from sffx.comparison.one_call import MODEL_RAISES, OUTPUTS_ARE_NAN, OneCall
from sffx.comparison.pair import Pair, copied_model, watch_hooks
from sffx.comparison.report import CheckReport
from sffx.comparison.runs import (
    Outcome,
    Run,
    quiet,
    relative_error,
    run_model,
    tolerance,
)
from sffx.comparison.scores import (
    in_another_order,
    mixes_samples,
    rounding_decides,
    scores_of_blocks,
)
from sffx.comparison.state import HookCalls, is_idle, worst_state, wrong_mode
from sffx.comparison.weights import same, state_of, telling_weights
from sffx.compiler.qualnames import without_numbers
from sffx.compiler.untie import untied
from sffx.errors import CheckError, InputError, shown
from sffx.extraction import extract_as_cut
from sffx.inputs import bind
from sffx.net import cut_model, plan_of
from sffx.progress import running
from sffx.runtime.find_residency import make_whole
from sffx.runtime.offload import offloading_of
from sffx.runtime.replicate import replication_of

# Two batch sizes; others where the model does not take one of them.
_BATCHES = (4, 3, 6, 2, 8, 12, 16, 32)

# A model takes few other sizes or many: this many are compared.
_MOST_SIZES = 2

_ROUNDING_DECIDES = (
    "rounding alone changes them, as where a forward branches on the sum of a layer-normed value"
)


@torch.inference_mode(False)
@running("comparing the model with the cut one")
def check(
    model: nn.Module,
    net: fx.GraphModule,
    example_input: Any = None,
    *,
    raises: bool = True,
) -> CheckReport:
    """Compare a model with the cut one: values, gradients, state, and the way back.

    Both are copied and left as they are, and so are the random numbers of the caller.

    Args:
        model: that was cut. After training, it is compared by `check(sffx.extract(net), net)`.
        net: what `transform` returned for it.
        example_input: that `transform` was given. It is needed only for a model that takes no
            random data. An input unlike that one is refused.
        raises: whether a difference is an error; else the report holds it.

    Returns:
        What was compared, with the largest errors, and what was skipped.

    Raises:
        CheckError: the cut model differs from the model. It names the node and the module at which
            the values part, and its `report` holds the rest.
        InputError: `net` is no cut model, was cut for other arguments or has an objective that
            changes the model, as "ffcl"; or the model cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model is a {type(model).__name__}, not a model. Hint: pass the one that was cut"
        )
    require_flag("raises", raises)
    objective = plan_of(net).objective
    if objective.changes_model:
        raise InputError(
            f"the objective {objective.name!r} has cut another model, with weights that this one "
            "has not. Hint: sffx.transform(model, ..., check=True) compares the net with that"
        )
    example = None
    if example_input is not None:
        example = bind(plan_of(net), example_input)
        _require_like(plan_of(net).inputs, example)
    report = _Check(model, net, example).complete()
    if raises and report.difference is not None:
        raise CheckError(str(report.difference), report)
    return report


def _require_like(inputs: Sequence[Input], example: Mapping[str, Any]) -> None:
    """Raise an InputError if an example has other values than the one that a model was cut for."""
    for each in inputs:
        value = example[each.name]
        if _is_like(each, value):
            continue
        given = shown(value)
        if isinstance(value, Tensor):
            given = f"{tuple(value.shape)} of {value.dtype}"
        raise InputError(
            f"example_input has {given} for {each.name!r}, but the model was cut for "
            f"{each.shape_in_words} of torch.{each.dtype}. Hint: pass what transform was given"
        )


def _is_like(each: Input, value: Any) -> bool:
    if not isinstance(value, Tensor) or tuple(value.shape[1:]) != each.shape:
        return False
    return value.is_floating_point() == each.is_float


def complete_check(model: nn.Module, net: fx.GraphModule) -> CheckReport:
    """Compare all that `check` compares, with the very model that was cut."""
    return _Check(model, net, None).complete()


def quick_check(model: nn.Module, net: fx.GraphModule) -> CheckReport:
    """Compare what is most likely to differ, in little time: what `transform` does by itself."""
    return _Check(model, net).quick()


class _Check:
    """One comparison, and what it has found so far."""

    def __init__(
        self, model: nn.Module, net: fx.GraphModule, example: Mapping[str, Any] | None = None
    ) -> None:
        self._plan = plan_of(net)
        make_whole(net)
        # As `transform` did before the cut.
        self._model, _ = untied(model)
        # The copy of an offloaded or replicated model is an ordinary one.
        is_ordinary = offloading_of(net) is None and replication_of(net) is None
        self._net = net if is_ordinary else copy.deepcopy(net)
        self._batches = Batches(model, net, example)
        self._weights: dict[str, Tensor] = {}
        self._drops = True
        self._findings = Findings(self._plan.notes)
        self._calls = Calls(self._batches)
        self._one_call = OneCall(self._model, self._plan, self._pair, self._findings)

    def complete(self) -> CheckReport:
        """Compare everything."""
        with quiet(self._model):
            back = self._compare_weights()
            batches = self._find_batches()
            self._draw_weights(batches[0])
            self._compare_calls(
                [*self._calls.in_train_mode(batches), *self._calls.in_eval_mode(batches)]
            )
            if not self._findings.is_wrong:
                self._compare_scores(batches[0])
                self._compare_other_sizes(batches[0])
                if back is not None:
                    self._compare_values_of(back)
        return self._findings.report()

    def quick(self) -> CheckReport:
        """Compare two calls in train mode and one in eval mode."""
        first, second = _BATCHES[:2]
        with quiet(self._model):
            for source in self._batches.sources:
                self._batches.source = source
                self._findings.skipped.clear()
                self._compare_calls(self._calls.quick(first, second))
                if not self._says_nothing():
                    break
            if self._findings.differences and not self._findings.is_wrong:
                # It may differ with gradients, too.
                self._compare_calls([self._calls.evaluate(second, grad=True)])
            if any(block.is_folded for block in self._plan) and not self._findings.is_wrong:
                self._compare_scores(first)
        return self._findings.report()

    def _says_nothing(self) -> bool:
        """Whether the model took none of the inputs so far, or gave no numbers for them."""
        empty = []
        for reason in self._findings.skipped.values():
            empty.append(reason.startswith(MODEL_RAISES) or reason == OUTPUTS_ARE_NAN)
        return not self._findings.differences and len(empty) > 1 and all(empty)

    # What is compared.

    def _compare_weights(self) -> nn.Module | None:
        """Compare parameters and buffers; return what `extract` gives if they are the same."""
        where = "extract(net)"
        try:
            back = extract_as_cut(cut_model(self._net))
        except Exception as failure:
            self._findings.differ(where, f"it raises {error_in_words(failure)}")
            return None
        if type(back) is not type(self._model):
            self._findings.differ(
                where, f"it is a {type(back).__name__}, not a {type(self._model).__name__}"
            )
        found, expected = back.state_dict(), self._model.state_dict()
        for name in expected.keys() ^ found.keys():
            place = Place(module=name.rpartition(".")[0])
            self._findings.differ(where, f"only one of them has {name!r}", place=place)
            return None
        for name, value in expected.items():
            if isinstance(value, Tensor) and not same(found[name].to(value.device), value):
                error = relative_error(found[name].to(value.device), value)
                place = Place(module=name.rpartition(".")[0])
                hint = "where net was trained since it was cut, check(sffx.extract(net), net)"
                self._findings.differ(where, f"{name!r} is another one", error, place, hint)
                return None
        self._findings.errors["weights of extract(net)"] = 0.0
        return back

    def _compare_values_of(self, back: nn.Module) -> None:
        """Run the extracted model beside the model itself, in eval mode."""
        run = self._calls.evaluate(_BATCHES[0], grad=True)
        expected = run_model(copied_model(self._model), run, self._plan)
        if not isinstance(expected.logits, Tensor):
            return
        found = run_model(back, run, self._plan)
        where = "values of extract(net)"
        if not isinstance(found.logits, Tensor):
            reason = error_in_words(found.failure) if found.failure else "no logits"
            self._findings.differ(where, f"where the model gives logits, it gives {reason}")
            return
        self._findings.errors[where] = relative_error(found.logits, expected.logits)
        if self._findings.errors[where] > tolerance(expected.logits.dtype):
            problem = difference_in_words(found.logits, expected.logits)
            self._findings.differ(where, problem, self._findings.errors[where])

    def _find_batches(self) -> list[int]:
        """Return two batch sizes that the model takes.

        Raises:
            InputError: it takes none.
        """
        # Outputs that are NaN are compared where there are no others.
        for may_be_nan, source in product((False, True), self._batches.sources):
            self._batches.source = source
            taken: list[int] = []
            for batch in _BATCHES:
                if len(taken) < 2 and self._failure(batch, may_be_nan=may_be_nan) is None:
                    taken.append(batch)
            if taken:
                return taken
        raise InputError(
            f"{type(self._model).__name__} runs on no input like those of the net: "
            f"{self._failure(_BATCHES[0], may_be_nan=True)}. "
            "Hint: pass an example_input that it runs on, sffx.check(model, net, example_input)"
        )

    def _failure(self, batch: int, *, may_be_nan: bool) -> str | None:
        """Return the error that the model raises on a batch; None if it runs.

        Args:
            batch: the number of samples.
            may_be_nan: whether an output that holds NaN is none.
        """
        run = replace(self._calls.train(batch, ""), backward=False)
        outcome = run_model(copied_model(self._model), run, self._plan)
        if outcome.failure is not None:
            return error_in_words(outcome.failure)
        is_nan = isinstance(outcome.logits, Tensor) and bool(outcome.logits.isnan().any())
        return OUTPUTS_ARE_NAN if is_nan and not may_be_nan else None

    def _draw_weights(self, batch: int) -> None:
        run = self._calls.train(batch, "")

        def logits(twin: nn.Module) -> Tensor:
            # A forward may compute gradients itself.
            plain = Run("", twin.training, run.values)
            outcome = run_model(twin, plain, self._plan)
            if outcome.failure is not None:
                raise outcome.failure
            return outcome.logits.detach()

        self._weights = telling_weights(self._model, logits)

    def _compare_calls(self, runs: list[Run]) -> None:
        pair = self._pair()
        before = {name: tensor.clone() for name, tensor in state_of(pair.model).items()}
        in_model, in_net = watch_hooks(pair)
        done: list[Run] = []
        for run in runs:
            if not self._has_same_modes(pair, run):
                return
            expected, found = pair.run(run)
            if self._drops and self._draws_less(pair, expected, found):
                # Parts that the trunk leaves out drew numbers. Without dropout both draw none.
                self._drops = False
                reason = "parts that the net leaves out draw random numbers, too"
                self._findings.skip("dropout", reason)
                self._compare_calls(runs)
                return
            done.append(run)
            if not self._one_call.compare(run, expected, found, done):
                return
        self._compare_state(pair, before)
        self._compare_hooks(in_model, in_net)

    def _compare_state(self, pair: Pair, before: dict[str, Tensor]) -> None:
        where = "the buffers after these calls"
        error, name = worst_state(pair.model, pair.trunk, before)
        self._findings.errors[where] = error
        if name and error > tolerance(state_of(pair.model)[name].dtype):
            place = Place(module=name.rpartition(".")[0])
            self._findings.differ(where, f"{name!r} has other values", error, place)

    def _compare_hooks(self, in_model: HookCalls, in_net: HookCalls) -> None:
        for (name, number), count in in_model.counts.items():
            found = in_net.counts[name, number]
            if found == count or self._notes_hooks(name):
                continue
            problem = f"a hook of {name!r} was called {found} times, in the model {count} times"
            hint = "register the hook on a layer of the net after the cut, where it runs"
            self._findings.differ(
                "the calls of hooks", problem, float("inf"), Place(module=name), hint, True
            )
            return

    def _notes_hooks(self, name: str) -> bool:
        """Return whether the plan says that hooks of a module are not called."""
        said = (name, without_numbers(name))
        notes = [note for note in self._plan.notes if "hooks of" in note]
        return any(each in note for note in notes for each in said)

    def _compare_scores(self, batch: int) -> None:
        """Check that each block scores each sample: the one thing that the trunk does not show.

        The scores of a sample do not depend on the others, unless the model itself mixes them.
        """
        where = f"the scores of {batch} samples"
        run = self._calls.evaluate(batch, grad=True)
        values = {each.name: run.values[each.name] for each in self._plan.inputs}
        scores = scores_of_blocks(self._net, values)
        scores_of_others = scores
        is_mixed = mixes_samples(self._model, self._net, run)
        if not is_mixed:
            scores_of_others = scores_of_blocks(self._net, in_another_order(values))
        task = self._plan.task
        expected = (batch, *self._plan.classifier.shape)
        self._findings.errors[where] = 0.0
        for i, block in enumerate(self._plan.all_blocks):
            place = Place(block.target, block.output, block.name)
            if not task.fits(scores[i].shape, expected):
                problem = f"the scores of {block.target} have shape {tuple(scores[i].shape)}"
                self._findings.differ(
                    where, f"{problem}, not {task.shapes} = {expected}", place=place
                )
                return
            error = relative_error(scores_of_others[i], in_another_order(scores[i]))
            if is_mixed or error <= tolerance(scores[i].dtype):
                continue
            if rounding_decides(self._net, values, i, error):
                # What later blocks read hangs on it as well.
                self._findings.skip(f"the scores from {block.target} on", _ROUNDING_DECIDES)
                return
            problem = f"the scores that {block.target} gives a sample depend on the others"
            self._findings.differ(where, problem, error, place)
            return

    def _compare_other_sizes(self, batch: int) -> None:
        compared = 0
        for sizes in self._batches.other_sizes():
            if compared == _MOST_SIZES:
                return
            run = self._calls.at_sizes(batch, sizes)
            if run is None:
                continue
            pair = self._pair()
            expected, found = pair.run(run)
            if expected.failure is not None or not isinstance(expected.logits, Tensor):
                continue
            if found.failure is not None:
                refusal = f"the net refuses it: {error_in_words(found.failure)}"
                self._findings.skip(run.name, refusal)
                continue
            compared += 1
            if not self._one_call.compare(run, expected, found, [run]):
                return
        if not compared:
            self._findings.skip("other sizes", "the model or the net takes no other size")

    # Comparisons of one call.

    def _pair(self) -> Pair:
        return Pair(self._model, self._net, self._weights, self._drops)

    def _has_same_modes(self, pair: Pair, run: Run) -> bool:
        name = wrong_mode(pair.model, pair.trunk, run.training)
        if not name:
            return True
        mode = "train()" if run.training else "eval()"
        problem = f"after {mode} the mode of {name!r} is another one"
        self._findings.differ(run.name, problem, place=Place(module=name))
        return False

    def _draws_less(self, pair: Pair, expected: Outcome, found: Outcome) -> bool:
        if expected.draws is None or found.draws is None:
            return False
        held = pair.trunk.state()
        names = [name for name, _ in pair.model.named_parameters()]
        leaves_out = any(name not in held and is_idle(pair.model, held, name) for name in names)
        return leaves_out and not torch.equal(expected.draws, found.draws)
