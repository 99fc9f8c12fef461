"""The values that cross a cut where streams run side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from sffx.compiler.facts import facts, storages_written
from sffx.tensors import storage_key

if TYPE_CHECKING:
    from sffx.compiler.analyse import Analysis
    from sffx.compiler.steps import Step

MOST_VALUES = 12  # that may cross one cut of a step that runs in order
FEWEST_LAYERS_OF_STREAM = 3  # with parameters; a product with fewer on one of its paths is a gate

CutSet = frozenset[str]


class Crossing:
    """The values that cross a cut after each node of a step, one node after the other."""

    def __init__(self, analysis: Analysis, step: Step) -> None:
        self._analysis = analysis
        self._flow = analysis.flow
        # What the nodes before the step leave to be read.
        before = analysis.step_of[step.node] - 1
        entering = self._flow.cut_sets[before] if before >= 0 else ()
        # For each value that crosses, the nodes that are still to read it.
        self._unread: dict[str, set[str]] = {}
        self._passed: set[str] = set()
        for name in entering:
            self._unread[name] = self._flow.readers(name)
        self._late_writes = _late_writes(analysis)

    def after(self, name: str) -> CutSet | None:
        """Return the values that cross a cut after a node; None if no cut set may lie there."""
        self._pass(name)
        in_order = self._flow.in_order([name, *self._late_writes])
        place = in_order.index(name)
        if len(self._unread) > MOST_VALUES:
            return None
        return self._cut_set(in_order[place + 1 :])

    def behind(self, inside: set[str]) -> CutSet | None:
        """Return the values that cross a cut behind a set of nodes; None if none may lie there.

        They may be many: a layer that runs on each step in time has a value for each.

        Args:
            inside: nodes on paths, with all nodes on paths that lead to them.
        """
        self._unread = {}
        for name in self._flow.crossing(inside):
            self._unread[name] = self._flow.readers(name) - inside
        return self._cut_set([writer for writer in self._late_writes if writer not in inside])

    def _cut_set(self, later_writers: list[str]) -> CutSet | None:
        values = list(self._unread)
        if not values:
            return None
        if not all(self._is_tensor(each) for each in values):
            return None
        if any(self._is_gate_or_gated(each) for each in values):
            return None
        if self._is_written_later(values, later_writers):
            return None
        return frozenset(values)

    def _pass(self, name: str) -> None:
        """Pass a node: what it reads may be read for the last time, and its value is new.

        The values that are taken out of a tuple are passed with it (`Dataflow.inside`).
        """
        if name in self._passed:
            return
        self._passed.add(name)
        for source in self._flow.paths.predecessors(name):
            if source not in self._unread:
                continue
            self._unread[source].discard(name)
            if not self._unread[source]:
                del self._unread[source]
        readers = self._flow.readers(name)
        if readers:
            self._unread[name] = readers
        for part in self._flow.parts(name):
            self._pass(part)

    def _is_tensor(self, name: str) -> bool:
        return isinstance(facts(self._analysis.nodes[name]).example, Tensor)

    def _is_gate_or_gated(self, value: str) -> bool:
        """Return whether a gate, a product of paths, is still to read a value that belongs to it.

        An activation between the value and the gate does not count. A value does not belong to the
        gate if it leads to the logits beside the gate as well, as a skip connection that the
        decoder of a U-Net gates by attention.
        """
        every_reader = self._flow.readers(value)
        for gate in self._gates_ahead(value):
            if not self._flow.passes_by(gate, every_reader):
                return True
        return False

    def _gates_ahead(self, value: str) -> list[str]:
        """Return the gates that are still to read a value, with at most activations before them."""
        readers = self._unread[value]
        while True:
            gates = [reader for reader in readers if self._is_gate(reader)]
            if gates or len(readers) != 1:
                return gates
            (reader,) = readers
            is_join = self._flow.paths.in_degree(reader) > 1
            if is_join or self._is_layer(reader):
                return []
            readers = self._flow.readers(reader)

    def _is_gate(self, name: str) -> bool:
        if self._analysis.join(name) != "product":
            return False
        return min(self._analysis.layers_on_paths(name)) < FEWEST_LAYERS_OF_STREAM

    def _is_layer(self, name: str) -> bool:
        return bool(self._flow.graph.nodes[name]["learned"])

    def _is_written_later(self, values: list[str], later_writers: list[str]) -> bool:
        """Return whether a value is written in place later, and then read by another name.

        Such a write cannot be kept from a value that crosses a cut.
        """
        memories = {storage_key(facts(self._analysis.nodes[each]).example) for each in values}
        written = [self._late_writes.get(writer, set()) for writer in later_writers]
        return any(memories & each for each in written)


def _late_writes(analysis: Analysis) -> dict[str, set[int]]:
    """Return the memory that is written in place, and then read by another name, by the writer."""
    writes: dict[str, set[int]] = {}
    for name, node in analysis.nodes.items():
        if facts(node).read_behind:
            writes[name] = storages_written([node])
    return writes
