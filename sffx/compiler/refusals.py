"""Why no cut may lie across a cut set of the spine.

A cut may lie there if each value is a float tensor with a batch axis and a channel axis, if a layer
with parameters comes after it, if no parameter or state is used on both sides of it, if nothing
before it needs a value from behind it, if it parts no BN layer from the layer that feeds it ("BN
must always lie inside a block"), and if the main value has the tokens or the axes of space that the
task scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.fx import Node

from sffx.compiler.batch_axis import starts_with_batch
from sffx.compiler.dataflow import Dataflow
from sffx.compiler.facts import facts, storages_written
from sffx.compiler.grids import Grids
from sffx.compiler.layers import Layers
from sffx.compiler.sample_order import is_out_of_order
from sffx.tasks import Task
from sffx.tensors import storage_key


def refusals(
    flow: Dataflow,
    layers: Layers,
    shared: list[str],
    channel_axes: Mapping[str, int],
    task: Task,
) -> list[str]:
    """Return for each step why no cut may lie after it, "" where one may.

    Args:
        flow: the dataflow of the model.
        layers: of the model.
        shared: for each step, what is used on both sides of it (`shared_state`).
        channel_axes: the channel axis of each value that has one.
        task: of the model. The main value, and others that are new, must have the positions that
            the task scores.
    """
    questions = _Questions(flow, layers, shared, channel_axes, task)
    reasons = []
    for i in range(len(flow.cut_sets)):
        given = filter(None, questions.answers(i))
        reasons.append(next(given, ""))
    return reasons


class _Questions:
    """The questions about a cut after each step; for the arguments see `refusals`."""

    def __init__(
        self,
        flow: Dataflow,
        layers: Layers,
        shared: list[str],
        channel_axes: Mapping[str, int],
        task: Task,
    ) -> None:
        self._flow = flow
        self._layers = layers
        self._shared = shared
        self._channel_axes = channel_axes
        self._task = task
        self._output = facts(flow.nodes[flow.logits]).example.shape
        self._last = _last_step_with_parameters(flow, layers)
        self._grids = Grids(flow, layers.root, channel_axes)
        self._needs = _needs_from_behind(flow)

    def answers(self, i: int) -> Iterator[str]:
        """Yield the answers to all questions, "" where one has nothing against the cut.

        A question supposes that the answers before it were "".
        """
        main_first = self._flow.cut_sets[i][::-1]
        for name in main_first:
            yield _reason_of_value(self._flow.nodes[name])
        if i >= self._last:
            yield "nothing after it has a parameter, so that no classifier would be left"
        if self._shared[i]:
            yield f"{self._shared[i]} is used on both sides of it"
        yield self._needs[i]
        for name in main_first:
            yield _reason_of_readers(self._flow, self._layers, name)
        for name in main_first:
            yield _reason_of_channels(self._flow, name, self._channel_axes)
        main = main_first[0]
        earlier = self._flow.cut_sets[i - 1] if i else ()
        for name in main_first:
            # Another value that crosses the cut before as well is scored there.
            if name == main or name not in earlier:
                yield self._reason_of_task(name)

    def _reason_of_task(self, name: str) -> str:
        """Return why the task cannot score a value that has a channel axis."""
        shape = facts(self._flow.nodes[name]).example.shape
        maps = partial(self._grids.of, name)
        return self._task.why_not_scored(shape, self._channel_axes[name], self._output, maps)


def _last_step_with_parameters(flow: Dataflow, layers: Layers) -> int:
    """Return the index of the last step that has a parameter, -1 if none has."""
    last = -1
    for name, node in flow.nodes.items():
        if layers.parameters(node):
            last = max(last, flow.step_of[name])
    return last


def _needs_from_behind(flow: Dataflow) -> list[str]:
    """Return for each step, in words, which node before it reads a value behind it; "" for none.

    With `t = h2.argmax(1, keepdim=True); mask = h1 > t`, no block can hold the mask if a cut lies
    between h1 and h2: in that of h1 it is too early for t, and behind the cut h1 is normalised.
    """
    needs = [""] * len(flow.spine)
    for source, reader in flow.graph.edges:
        for step in range(flow.step_of[reader], flow.step_of[source]):
            needs[step] = f"{reader} is needed before it, but reads {source} behind it"
    return needs


def shared_state(flow: Dataflow, layers: Layers) -> list[str]:
    """Return for each step the name of a state that is used both up to it and after it.

    A state is a parameter, or a module that writes its buffers; "" stands for none.
    """
    used_in: dict[int, list[int]] = {}  # the steps, by the key of a storage or the `id` of a node
    names: dict[int, str] = {}
    for name, node in flow.nodes.items():
        steps = [flow.step_of[name]]
        if node.op == "get_attr":  # a parameter is used where it is read
            steps = [flow.step_of[user] for user in flow.graph.successors(name)]
        for state, tensor in layers.changing_state(node).items():
            key = storage_key(tensor)
            name_of_state = str(node.target) if node.op == "call_module" else state
            names.setdefault(key, name_of_state)
            used_in.setdefault(key, []).extend(steps)
    for name, steps in _written_buffers(flow).items():
        key = id(flow.nodes[name])
        names[key] = str(flow.nodes[name].target)
        used_in[key] = steps
    shared = [""] * len(flow.spine)
    for key, steps in used_in.items():
        if steps:
            # After its last use, a state is no longer in the way of a cut.
            for step in range(min(steps), max(steps)):
                shared[step] = names[key]
    return shared


def _written_buffers(flow: Dataflow) -> dict[str, list[int]]:
    """Return the steps that read or write a buffer, for each node that reads one that is written.

    A view of the buffer is the buffer.
    """
    written = storages_written(flow.nodes.values())
    readers: dict[int, list[int]] = {}
    for name, node in flow.nodes.items():
        for arg in node.all_input_nodes:
            value = facts(arg).example
            if isinstance(value, Tensor):
                readers.setdefault(storage_key(value), []).append(flow.step_of[name])
    found = {}
    for name, node in flow.nodes.items():
        value = facts(node).example
        if node.op == "get_attr" and isinstance(value, Tensor) and storage_key(value) in written:
            found[name] = readers.get(storage_key(value), [])
    return found


def _reason_of_value(node: Node) -> str:
    value = facts(node).example
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return "its value is no float tensor"
    if is_out_of_order(facts(node).batch):
        return "its samples lie in another order than those of the inputs"
    if value.ndim < 2 or not starts_with_batch(facts(node).batch):
        return f"the first axis of its value is not the batch, shape {_shape_in_words(node)}"
    return ""


def _shape_in_words(node: Node) -> str:
    """Write the shape of a node's value, with a B, 2 * B or ? for sizes that the batch changes."""
    record = facts(node)
    changed = "?"
    if record.batch:
        changed = "B" if record.batch.rows == 1 else f"{record.batch.rows} * B"
    sizes = []
    for size, other in zip(record.example.shape, record.other.shape, strict=True):
        sizes.append(str(size) if size == other else changed)
    return f"({', '.join(sizes)})"


def _reason_of_readers(flow: Dataflow, layers: Layers, name: str) -> str:
    fed = _batch_norm_fed(name, flow, layers)
    return f"it would part the BN layer {fed} from the layer that feeds it" if fed else ""


def _reason_of_channels(flow: Dataflow, name: str, channel_axes: Mapping[str, int]) -> str:
    if name in channel_axes:
        return ""
    record = facts(flow.nodes[name])
    shape = tuple(record.example.shape)
    if isinstance(record.resized, Tensor) and record.resized.shape != shape:
        return (
            f"the channel axis of its value, of shape {shape}, cannot be told, since the value has "
            f"shape {tuple(record.resized.shape)} at another size of the input"
        )
    return f"the channel axis of its value, of shape {shape}, cannot be told"


def _batch_norm_fed(name: str, flow: Dataflow, layers: Layers) -> str:
    """Return the BN layer that a value feeds, "" for none.

    It feeds it directly, or through a row of single activations or dropout.

    Args:
        name: of the node that computes the value.
        flow: the dataflow of the model.
        layers: of the model.
    """
    while True:
        readers = [flow.nodes[reader] for reader in flow.paths.successors(name)]
        norms = [reader for reader in readers if layers.is_batch_norm(reader)]
        # A layer may feed its BN and a shortcut. The sum that opens a pre-activation block feeds
        # both as well, but a cut may lie there, or such a model could not be cut at all. So may it
        # behind a leaf that holds several layers, and so may end in a sum.
        is_layer = layers.is_single_layer(flow.nodes[name])
        if norms and (is_layer or len(readers) == 1):
            return str(norms[0].target)
        if len(readers) != 1 or layers.parameters(readers[0]):
            return ""
        shape = _shape(flow, name)
        (reader,) = readers
        if shape is None or shape != _shape(flow, reader.name):
            return ""
        is_join = flow.paths.in_degree(reader.name) > 1
        if is_join and not flow.is_on_spine(reader.name):
            return ""
        name = reader.name


def _shape(flow: Dataflow, name: str) -> Any:
    return getattr(facts(flow.nodes[name]).example, "shape", None)
