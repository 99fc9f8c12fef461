"""What a trace settles: the branches and the plain numbers of a forward, which a graph holds.

They must be the same in every call. Those that are made of sizes are guarded: the graph checks
them for each input.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from sffx.compiler.facts import facts
from sffx.compiler.trace import batch
from sffx.compiler.trace.data_shapes import depends_on_data, is_data_shaped, require_data
from sffx.compiler.trace.flags import owners_of_flags
from sffx.compiler.trace.functions import depends_on_function
from sffx.compiler.trace.listed import READS_A_NUMBER, Listed
from sffx.compiler.trace.randomness import (
    DRAWS,
    DrawnNumber,
    is_drawn,
    is_made_of_draws,
    outcome_of_draw,
)
from sffx.compiler.trace.size_tensors import value_of_sizes
from sffx.compiler.trace.sizes import reads_a_size, require_settled, require_several
from sffx.compiler.trace.value_checks import Passed, ValueChecks

if TYPE_CHECKING:
    from sffx.compiler.trace.tracer import GuidedTracer

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Settled:
    """Settles branches and numbers, and guards them.

    Args:
        tracer: makes the graph.

    Attributes:
        checks: those of values, which the graph does not make.
    """

    def __init__(self, tracer: GuidedTracer) -> None:
        self._tracer = tracer
        self._guarded: set[tuple[fx.Node, Any]] = set()
        self._has_data_shapes = False
        self.checks = ValueChecks()

    def note(self, node: fx.Node) -> None:
        """Note a new node, whose shape may depend on data."""
        self._has_data_shapes = self._has_data_shapes or is_data_shaped(node)

    def outcome(self, condition: fx.Node) -> bool:
        """Return the outcome of a branch, the same in every call.

        Raises:
            RuntimeError: the outcome depends on the batch, on data or on chance.
        """
        self._note_modes(condition)
        value = facts(condition).example
        self._require_no_function(condition)
        if isinstance(value, Tensor):
            return self._outcome_of_tensor(condition)
        outcome = bool(value)
        if self._depends_on_data(condition):
            self._guard(condition, outcome, require_data)
        elif self._is_settled(condition):
            self.settle(condition, outcome)
        elif self._is_settled_but_for_one(condition):
            self._guard(condition, outcome, require_several)
        else:
            raise RuntimeError("a branch depends on the batch size, which a graph would freeze")
        return outcome

    def _outcome_of_tensor(self, condition: fx.Node) -> bool:
        """Return the outcome of a branch on a tensor, where it has one for all data."""
        outcome = outcome_of_draw(condition)
        if outcome is not None:
            return outcome
        if any(is_drawn(side) for side in condition.all_input_nodes):
            raise RuntimeError("a branch depends on random numbers")
        try:
            return bool(self.value_of_sizes(condition))
        except RuntimeError:
            checked = self.checks.outcome()
            if checked is None:
                raise RuntimeError("a branch depends on the values of a tensor") from None
            return checked

    def _is_settled(self, condition: fx.Node) -> bool:
        return batch.is_settled(condition, self._tracer.runner.sizes, self._tracer.runner.takes)

    def _is_settled_but_for_one(self, condition: fx.Node) -> bool:
        """Return whether to refuse a batch of one sample, for which a branch goes the other way.

        A submodule that branches on the batch alone is better a leaf, which takes any batch.
        """
        place = self._tracer.place
        is_allowed = not place or place in self._tracer.branched
        return is_allowed and batch.differs_at_one(condition, self._tracer.runner.sizes)

    def is_known(self, node: fx.Node) -> bool:
        """Return whether a value is a bool that is the same in every call.

        `x.is_cuda is False` needs the bool itself. A comparison of sizes does not count: it is
        settled where the forward branches on it.
        """
        record = facts(node)
        if type(record.example) is not bool or record.of_batch or reads_a_size(node):
            return False
        depends = self._depends_on_data(node) or self._depends_on_function(node)
        return not depends and not owners_of_flags(node)

    def number(self, method: str, node: fx.Node) -> Any:
        """Return what a forward takes out of a tensor.

        It is a number that is drawn or made of sizes, or the list of integers that depend on data.
        In the condition of a check it is unknown.
        """
        if is_drawn(node):
            return DrawnNumber()
        if method == "tolist" and self._made_of_sizes(node) is None:
            example = facts(node).example
            if example.ndim == 1 and example.dtype in _INTEGERS:
                return Listed(self._tracer.proxy(node))
        try:
            return getattr(self.value_of_sizes(node), method)()
        except RuntimeError:
            checked = self.checks.outcome()
            if checked is None:
                raise
            return Passed(checked)

    def _made_of_sizes(self, node: fx.Node) -> tuple[Tensor, list[fx.Node]] | None:
        """Return the value of a tensor and the sizes that it is made of, None for other tensors."""
        return value_of_sizes(node, self._tracer.runner.probe, self._tracer.constants.names)

    def value_of_sizes(self, node: fx.Node) -> Tensor:
        """Return the value of a tensor that is made of sizes alone, and settle these.

        Raises:
            RuntimeError: it is made of anything else.
        """
        made = self._made_of_sizes(node)
        if made is None:
            raise RuntimeError(DRAWS if is_made_of_draws(node) else READS_A_NUMBER)
        value, sizes = made
        for size in sizes:
            self.settle(size, facts(size).example)
        return value

    def settle_assertion(self, condition: Any) -> None:
        """Guard what the model asserts about sizes, since the graph will not assert it."""
        if not isinstance(condition, fx.Proxy):
            return
        node = condition.node
        if reads_a_size(node) and self._is_settled(node):
            self.settle(node, bool(facts(node).example))

    def settle(self, node: fx.Node, outcome: Any) -> None:
        """Guard a number or a truth value that the graph will hold, if it is made of sizes."""
        self._require_no_data(node)
        self._require_no_function(node)
        self._note_modes(node)
        if reads_a_size(node):
            self._guard(node, outcome)

    def _note_modes(self, node: fx.Node) -> None:
        """Note the modes on which a number or a truth value depends, for the code that asks it."""
        owners = owners_of_flags(node)
        if owners:
            self._tracer.branched.setdefault(self._tracer.place, set()).update(owners)

    def _depends_on_data(self, node: fx.Node) -> bool:
        # Few models have such shapes, and to look for them takes a walk through the graph.
        return self._has_data_shapes and depends_on_data(node)

    def _depends_on_function(self, node: fx.Node) -> bool:
        return bool(self._tracer.functions.found) and depends_on_function(node)

    def _require_no_data(self, node: fx.Node) -> None:
        """Raise a RuntimeError if a number which the graph will hold depends on data."""
        if self._depends_on_data(node):
            raise RuntimeError("a number depends on the values of a tensor, by a shape")

    def _require_no_function(self, node: fx.Node) -> None:
        """Raise a RuntimeError if a graph would freeze what a function returns."""
        if self._depends_on_function(node):
            raise RuntimeError("a branch or a plain number depends on what a function returns")

    def _guard(
        self, node: fx.Node, outcome: Any, require: Callable[..., None] = require_settled
    ) -> None:
        if (node, outcome) not in self._guarded:
            self._guarded.add((node, outcome))
            args = (node, outcome, self._tracer.place)
            self._tracer.create_node("call_function", require, args, {})

    def length(self, obj: fx.Proxy, caller: FrameType | None = None) -> int:
        """Return the length of a tensor, or the number of the parts that it was split into.

        Args:
            obj: stands for them.
            caller: the code that calls `len`, if it does.

        Raises:
            RuntimeError: it depends on the batch size, on data or on what a function returns.
        """
        value = facts(obj.node).example
        self._require_no_function(obj.node)
        is_batch = isinstance(value, Tensor) and batch.has_length_of_batch(obj.node)
        if is_batch and caller is not None:
            self._tracer.functions.asked.note("len", caller)
        number = batch.length(obj.node)
        if isinstance(value, Tensor):
            self._require_no_data(obj.node)
            size = obj.size(0)
            if isinstance(size, fx.Proxy):  # that of a parameter is a constant
                self.settle(size.node, number)
        elif any(isinstance(part, Tensor) for part in value):
            self._guard(obj.node, number)
        return number
