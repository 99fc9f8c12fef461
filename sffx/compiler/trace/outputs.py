"""Which of a model's outputs is the logits, and a graph that returns nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from sffx.compiler.examples import TRACE_BATCH
from sffx.compiler.facts import facts
from sffx.compiler.trace.effects import drop_dead_code
from sffx.errors import TraceError, backbone_hint


def find_logits(value: Any, num_classes: int | None) -> Any:
    """Return the logits among what a forward returns, during a trace.

    1. The one value that it returns.
    2. In a mapping or a record, what is called "logits".
    3. No probabilities, where what they are made of is returned as well.
    4. Where several could be logits and differ in width, the one with `num_classes` columns.
    5. Else the first that could be logits, or the first of all.

    Raises:
        TraceError: several could be, and `num_classes` does not say which.
    """
    if isinstance(value, fx.Proxy):
        return value
    fields = _fields(value)
    if fields is not None:
        if fields.get("logits") is not None:
            return find_logits(fields["logits"], num_classes)
        value = tuple(fields.values())
    if not isinstance(value, (tuple, list)):
        return value
    if not value:
        return None
    return _logits_among(_without_probabilities(value), num_classes)


def _without_probabilities(values: tuple[Any, ...] | list[Any]) -> list[Any]:
    """Return the values that are not the softmax or the sigmoid of another one."""
    nodes = {value.node for value in values if isinstance(value, fx.Proxy)}
    kept = []
    for value in values:
        if not isinstance(value, fx.Proxy) or _source_of_probabilities(value) not in nodes:
            kept.append(value)
    return kept


def _source_of_probabilities(value: fx.Proxy) -> fx.Node | None:
    """Return what a softmax or a sigmoid was applied to; None for what anything else computes."""
    node = value.node
    call = node.target
    if node.op == "call_module":
        tracer: Any = value.tracer
        call = type(tracer.root.get_submodule(str(call)))
    name = str(getattr(call, "__name__", call)).lower().replace("_", "")
    if name not in ("softmax", "logsoftmax", "sigmoid"):
        return None
    return node.all_input_nodes[0]


def _logits_among(values: tuple[Any, ...] | list[Any], num_classes: int | None) -> Any:
    candidates = [each for each in values if _width(each)]
    widths = [_width(each) for each in candidates]
    if len(set(widths)) < 2:
        return _first_of(values, candidates, num_classes)
    if num_classes in widths:
        return candidates[widths.index(num_classes)]
    shapes = ", ".join(f"(B, {width})" for width in widths)
    asked = "" if num_classes is None else f", none with num_classes={num_classes}"
    raise TraceError(
        f"the model returns several values that could be its logits, of shapes {shapes}{asked}. "
        "Hint: pass num_classes, which tells which of them"
    )


def _first_of(
    values: tuple[Any, ...] | list[Any], candidates: list[Any], num_classes: int | None
) -> Any:
    """Return the first value if it could be logits, or else the first that could."""
    first = find_logits(values[0], num_classes)
    if _width(first):
        return first
    if candidates:
        return candidates[0]
    for value in values[1:]:
        nested = find_logits(value, num_classes)
        if _width(nested):
            return nested
    return first


def _fields(value: Any) -> Mapping[str, Any] | None:
    """Return the fields of a mapping or of a record of any kind by name, None of other values."""
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value):
        return {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
    if isinstance(value, tuple):
        names = getattr(value, "_fields", None)  # of a named tuple
        return None if names is None else dict(zip(names, value, strict=True))
    if hasattr(value, "logits"):
        return {"logits": value.logits}
    return getattr(value, "__dict__", None) or None


def _width(value: Any) -> int:
    """Return the number of columns of a traced value that could be logits, 0 of others."""
    if not isinstance(value, fx.Proxy):
        return 0
    example = facts(value.node).example
    return int(example.shape[1]) if _could_be_logits(example) else 0


def _could_be_logits(value: Any) -> bool:
    """Whether a value is a float tensor of shape (B, J)."""
    if not isinstance(value, Tensor) or value.ndim != 2:
        return False
    return value.shape[0] == TRACE_BATCH and value.is_floating_point()


def keep_logits(graph: fx.Graph, root: nn.Module) -> None:
    """Check that the graph returns logits, and drop what only other outputs needed.

    Raises:
        TraceError: it returns something else.
    """
    output = next(iter(reversed(graph.nodes)))
    logits = output.args[0]
    value = facts(logits).example if isinstance(logits, fx.Node) else logits
    if not _could_be_logits(value):
        raise TraceError(
            f"{type(root).__name__} returns {_description(value)}, "
            f"but logits are of shape (B, J). {backbone_hint(root)}"
        )
    drop_dead_code(graph)


def _description(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    sizes = ", ".join(map(str, value.shape[1:]))
    return f"a tensor of shape (B, {sizes})"
