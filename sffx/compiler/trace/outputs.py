"""Which of a model's outputs is the logits, and a graph that returns nothing else.

For another task than classification, the logits are what the model predicts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from sffx.compiler.batch_axis import starts_with_batch
from sffx.compiler.facts import facts
from sffx.compiler.sample_order import is_out_of_order
from sffx.compiler.trace.effects import drop_dead_code
from sffx.compiler.trace.flags import is_added
from sffx.compiler.trace.infer_task import described, infer_task, note_on, shape_in_words, unclear
from sffx.compiler.trace.steps_first import batch_read_as_steps
from sffx.compiler.walks import nodes_behind
from sffx.errors import TraceError, backbone_hint
from sffx.plain import fields_of, name_of_logits, parts_by_key
from sffx.tasks import CLASSIFICATION, Task
from sffx.tensors import shapes_of_floats


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a caller says of a model's output.

    Attributes:
        num_classes: J, None to infer it.
        task: None to infer it.
    """

    num_classes: int | None = None
    task: Task | None = None


def find_logits(value: Any, wanted: Wanted) -> Any:
    """Return the logits among what a forward returns, during a trace.

    1. The one value that it returns.
    2. In a mapping or a record, what is called "logits"; or "out", scores of pixels.
    3. Probabilities do not count where the scores that they are made of are returned as well.
    4. Where several could be logits and differ in width, those with `num_classes` columns. If
       none of them has as many, those that lie deeper, in a tuple or a mapping among them. What
       the first of all holds counts among the several.
    5. Of several of one width, the one that most layers lead to: of early exits the last, of
       auxiliary outputs none. Of equals, the first.
    6. Else the first of all.

    Raises:
        TraceError: several could be, and `num_classes` does not say which.
    """
    if isinstance(value, fx.Proxy):
        return value
    fields = fields_of(value)
    named = "" if fields is None else name_of_logits(fields, _axes)
    if fields is not None and named:
        return find_logits(fields[named], wanted)
    values = _values_in(value)
    if values is None:
        return value
    return _logits_among(_without_probabilities(values), wanted) if values else None


def _values_in(value: Any) -> tuple[Any, ...] | None:
    """Return the values in a mapping, a record, a tuple or a list; None of anything else."""
    fields = fields_of(value)
    if fields is not None:
        return tuple(fields.values())
    return tuple(value) if isinstance(value, (tuple, list)) else None


def _without_probabilities(values: tuple[Any, ...]) -> list[Any]:
    """Return the values that are not the softmax or the sigmoid of another one."""
    nodes = {value.node for value in values if isinstance(value, fx.Proxy)}
    kept = []
    for value in values:
        if not isinstance(value, fx.Proxy) or not _are_probabilities(value, nodes):
            kept.append(value)
    return kept


def _are_probabilities(value: fx.Proxy, nodes: Collection[fx.Node]) -> bool:
    """Return whether a value is the softmax or the sigmoid of one of some nodes."""
    tracer: Any = value.tracer
    function = _probability_function(value.node, tracer.root)
    return function != "" and value.node.all_input_nodes[0] in nodes


def _probability_function(node: fx.Node, root: nn.Module) -> str:
    """Return "softmax", "logsoftmax" or "sigmoid" where a node applies it, "" for other nodes."""
    if is_added(node):  # such a module is not in the model
        return ""
    call = node.target
    if node.op == "call_module":
        call = type(root.get_submodule(str(call)))
    name = str(getattr(call, "__name__", call)).lower().replace("_", "")
    return name if name in ("softmax", "logsoftmax", "sigmoid") else ""


def keys_of_logits(value: Any, logits: Any) -> tuple[Any, ...]:
    """Return the keys and indices that lead to the logits in what a forward returned.

    Args:
        value: what the forward returned, during a trace.
        logits: what `find_logits` found in it.
    """
    for keys, proxy in _proxies_by_keys(value):
        if proxy is logits:
            return keys
    return ()


def place_of_logits(value: Any) -> str:
    """Return where the logits are in what a forward returns: "only", "logits", "out" or ""."""
    if isinstance(value, fx.Proxy):
        return "only"
    fields = fields_of(value)
    return "" if fields is None else name_of_logits(fields, _axes)


def notes_on_outputs(value: Any, logits: Any, wanted: Wanted) -> list[str]:
    """Return notes on what a model returns beside its logits.

    They are on other values that could be its logits, if none is named, and on losses.

    Args:
        value: what the forward returned, during a trace.
        logits: what `find_logits` found in it.
        wanted: what the caller says of the output.
    """
    if not isinstance(logits, fx.Proxy):
        return []
    notes = _notes_on_losses(value)
    if place_of_logits(value):
        return notes
    values = _without_probabilities(tuple(_proxies_in(value)))
    count = [_shape(each) for each in values].count(_shape(logits))
    if count > 1:
        notes.append(
            f"the model returns {count} values like {described(facts(logits.node).example)}, and "
            f"{_which(value, logits)} is its output here. Hint: if another one is meant, return "
            "that alone"
        )
    widths = {_width(each, wanted) for each in values} - {0, _width(logits, wanted)}
    if widths and wanted.num_classes is None:
        notes.append(
            f"the model returns values of other widths as well, of {_in_words(widths)} columns. "
            f"Its output here has {_width(logits, wanted)}. Hint: num_classes tells which is meant"
        )
    return notes


def _which(value: Any, logits: fx.Proxy) -> str:
    """Name the logits among the values that a model returned, which it does not name itself."""
    proxies = [each for each in _proxies_in(value) if _shape(each) == _shape(logits)]
    number = next(i for i, each in enumerate(proxies) if each is logits)
    if number == 0:
        return "the first"
    order = "the last" if number == len(proxies) - 1 else f"number {number + 1}"
    return f"{order}, to which most layers lead,"


def _notes_on_losses(value: Any) -> list[str]:
    """Return a note if a model also returns numbers of the whole batch, as losses are."""
    count = 0
    for each in _proxies_in(value, logits_alone=False):
        example = facts(each.node).example
        count += isinstance(example, Tensor) and example.ndim == 0 and example.is_floating_point()
    if not count:
        return []
    numbers, it = ("a number", "it") if count == 1 else (f"{count} numbers", "them")
    return [
        f"the model also returns {numbers} of the whole batch, such as a penalty that balances "
        f"experts, and no block learns from {it}. Hint: where the model needs such a penalty, "
        "train it by backpropagation"
    ]


def _in_words(widths: Collection[int]) -> str:
    return " and ".join(map(str, sorted(widths)))


def _proxies_in(value: Any, *, logits_alone: bool = True) -> Iterator[fx.Proxy]:
    """Yield the traced values in what a forward returned.

    Args:
        value: that it returned.
        logits_alone: whether to yield only the logits of an output that names them.
    """
    for _, proxy in _proxies_by_keys(value, logits_alone=logits_alone):
        yield proxy


def _proxies_by_keys(
    value: Any, *, logits_alone: bool = True
) -> Iterator[tuple[tuple[Any, ...], fx.Proxy]]:
    """Yield the traced values in what a forward returned, with the keys that lead to them."""
    if isinstance(value, fx.Proxy):
        yield (), value
        return
    parts = parts_by_key(value)
    fields = fields_of(value)
    named = "" if fields is None else name_of_logits(fields, _axes)
    if fields is not None and named and logits_alone:
        parts = {named: fields[named]}
    for key, part in parts.items():
        # Not other objects, which may hold themselves.
        if isinstance(part, (fx.Proxy, Mapping, tuple, list)):
            for keys, proxy in _proxies_by_keys(part, logits_alone=logits_alone):
                yield (key, *keys), proxy


def _shape(value: Any) -> Any:
    """Return the shape of a value that stands for a tensor in a trace, None of other values."""
    if not isinstance(value, fx.Proxy):
        return None
    return getattr(facts(value.node).example, "shape", None)


def _axes(value: Any) -> int:
    return len(_shape(value) or ())


def _logits_among(values: Sequence[Any], wanted: Wanted) -> Any:
    """Return the logits among several values, by `num_classes` where they differ in width."""
    values = _without_unlearned(values, wanted)
    candidates = [each for each in values if _width(each, wanted)]
    fitting = _of_asked_width(values, candidates, wanted)
    if fitting:
        return _deepest(fitting)
    first = find_logits(values[0], wanted)
    # The first value may be a tuple or the like, with the logits inside.
    is_nested = first is not values[0]
    if is_nested and _width(first, wanted):
        candidates = [*_without_unlearned([first, *candidates], wanted)]
    widths = dict.fromkeys(_width(each, wanted) for each in candidates)
    if len(widths) == 1:
        return _deepest(candidates)
    if not candidates:
        return _first_of_deeper(values, first, wanted)
    raise _several_logits(candidates, list(widths), wanted.num_classes)


def _of_asked_width(
    values: Sequence[Any], candidates: Sequence[fx.Proxy], wanted: Wanted
) -> list[fx.Proxy]:
    """Return the values that have `num_classes` outputs, [] where it is not given.

    Args:
        values: that the forward returned.
        candidates: those of them that could be logits. If none fits, the values inside the others
            count as well.
        wanted: what the caller says of the output.
    """
    if wanted.num_classes is None:
        return []
    for among in (candidates, _without_probabilities(tuple(_proxies_in(tuple(values))))):
        fitting = [each for each in among if _width(each, wanted) == wanted.num_classes]
        if fitting:
            return fitting
    return []


def _several_logits(
    candidates: Sequence[fx.Proxy], widths: Sequence[int], num_classes: int | None
) -> TraceError:
    """Return the error of several values that could be logits, with different widths."""
    shapes = ", ".join(shape_in_words(facts(each.node).example) for each in candidates)
    asked = "" if num_classes is None else f", none with num_classes={num_classes}"
    possible = " or ".join(map(str, widths))
    return TraceError(
        f"the model returns several values that could be its logits, of shapes {shapes}{asked}. "
        f"Hint: pass num_classes, {possible}, which tells which of them; or return that one alone"
    )


def _without_unlearned(values: Sequence[Any], wanted: Wanted) -> Sequence[Any]:
    """Return values without those that have the shape of logits, and that no layer leads to.

    A model of time series returns the mean and the scale of its input as well. Where layers lead to
    none of the values, all are returned.
    """
    kept = []
    has_learned = False
    for each in values:
        could_be_logits = _width(each, wanted) > 0
        if could_be_logits and not _layers_before(each):
            continue
        kept.append(each)
        has_learned = has_learned or could_be_logits
    return kept if has_learned else values


def _first_of_deeper(values: Sequence[Any], first: Any, wanted: Wanted) -> Any:
    """Return the first value that could be logits in a part of a later value, else `first`."""
    for value in values[1:]:
        nested = find_logits(value, wanted)
        if _width(nested, wanted):
            return nested
    return first


def _deepest(values: Sequence[fx.Proxy]) -> fx.Proxy:
    """Return the value that most layers lead to, of equals the first."""
    return values[0] if len(values) == 1 else max(values, key=_layers_before)


def _layers_before(value: fx.Proxy) -> int:
    """Return how many modules with parameters, and parameters of functions, lead to a value."""
    tracer: Any = value.tracer
    return sum(_has_parameters(node, tracer.root) for node in nodes_behind(value.node))


def _has_parameters(node: fx.Node, root: nn.Module) -> bool:
    """Return whether a node is a layer with parameters, or one parameter."""
    if is_added(node):
        return False
    if node.op == "call_module":
        layer = root.get_submodule(str(node.target))
        return next(layer.parameters(), None) is not None
    return node.op == "get_attr" and isinstance(facts(node).example, nn.Parameter)


def _width(value: Any, wanted: Wanted) -> int:
    """Return the number of outputs of a traced value that could be logits, 0 of others."""
    if not isinstance(value, fx.Proxy):
        return 0
    # Where the caller names no task, logits of classes come first.
    task = wanted.task or CLASSIFICATION
    shape = facts(value.node).example.shape if _is_batch_of_floats(value.node) else ()
    return task.num_outputs(shape) if shape and task.could_be_output(shape) else 0


def _is_batch_of_floats(node: fx.Node) -> bool:
    """Whether the value of a node is a float tensor with the batch first."""
    value = facts(node).example
    if not isinstance(value, Tensor) or value.ndim == 0:
        return False
    return starts_with_batch(facts(node).batch) and value.is_floating_point()


def keep_logits(
    graph: fx.Graph, root: nn.Module, wanted: Wanted, place: str
) -> tuple[Task, list[str]]:
    """Check that the graph returns logits, and drop what only other outputs needed.

    Args:
        graph: to change.
        root: the model.
        wanted: what the caller says of the output.
        place: of the logits, as `place_of_logits` returns it.

    Returns:
        The task, and notes: where it was inferred and is not classification, and where the output
        is probabilities.

    Raises:
        TraceError: it returns something else, or its task is not clear.
    """
    output = next(iter(reversed(graph.nodes)))
    logits = output.args[0]
    value = facts(logits).example if isinstance(logits, fx.Node) else logits
    if isinstance(value, Tensor) and value.ndim and value.is_floating_point():
        _require_batch_first(root, graph, logits)
    if not isinstance(logits, fx.Node) or not _is_batch_of_floats(logits):
        raise unclear(root, value)
    inputs = [facts(node).example for node in graph.nodes if node.op == "placeholder"]
    task = wanted.task or infer_task(root, value, place, inputs)
    if not task.could_be_output(value.shape):
        raise TraceError(
            f"{type(root).__name__} returns {described(value)}, but with sffx.tasks.{task!r} the "
            f"output is of shape {task.shapes}. Hint: {task.way_to_output(value.shape)}; "
            f"{backbone_hint(root)}"
        )
    task = task.settled(value.shape, shapes_of_floats(inputs))
    drop_dead_code(graph)
    notes = _notes_on_probabilities(logits, root, task)
    if wanted.task is None and task != CLASSIFICATION:
        notes.insert(0, note_on(task, value))
    return task, notes


def _require_batch_first(root: nn.Module, graph: fx.Graph, logits: fx.Node) -> None:
    """Raise a TraceError if the first axis of a model's output is not the batch."""
    batch = facts(logits).batch
    if starts_with_batch(batch):
        return
    if is_out_of_order(batch):
        raise TraceError(
            f"the samples of what {type(root).__name__} returns lie in another order than those of "
            "its inputs, as after a sort. Hint: bring them back, as by scores[order.argsort()] "
            "after x[order]"
        )
    where = "no axis is"
    if batch is not None:
        rows = f"{batch.rows} rows of each sample lie in" if batch.rows > 1 else "the batch is"
        where = f"{rows} axis {batch.axis}"
    shape = tuple(facts(logits).example.shape)
    problem = (
        f"the first axis of what {type(root).__name__} returns, of shape {shape}, is not the "
        f"batch: {where}"
    )
    reads = batch_read_as_steps(graph, root)
    if reads:
        raise TraceError(
            f"{problem}, since {reads} the first axis as steps. Hint: the first axis of each input "
            "is the batch; pass batch_first=True to the layer; or wrap a model whose inputs have "
            "the steps first, def forward(self, x): return self.model(x.transpose(0, 1))"
        )
    raise TraceError(
        f"{problem}. Hint: the first axis of each input and of the output is the batch; a "
        f"forward may begin with sequence.transpose(0, 1), or end with it; {backbone_hint(root)}"
    )


def _notes_on_probabilities(logits: fx.Node, root: nn.Module, task: Task) -> list[str]:
    """Return a note if a model returns probabilities of classes, not scores.

    The loss of the classifier then applies the softmax twice, as cross-entropy does in
    backpropagation. The class with the highest score stays the same.

    Raises:
        TraceError: it returns probabilities of labels. A label is predicted where its score is
            positive, and all probabilities are.
    """
    function = _probability_function(logits, root)
    if not function or function != task.probability_function:
        return []
    hint = f"Hint: return what the {function} is applied to"
    if function == "sigmoid":
        raise TraceError(
            f"{type(root).__name__} returns a sigmoid, and with sffx.tasks.{task!r} the output is "
            f"logits: a label is predicted where its logit is positive. {hint}"
        )
    return [f"the model returns a softmax, and the loss applies a softmax again. {hint}"]
