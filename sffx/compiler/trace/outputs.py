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
    2. In a mapping or a dataclass, what is called "logits".
    3. Where several could be logits and differ in width, the one with `num_classes` columns.
    4. Else the first of several values.

    Raises:
        TraceError: several could be, and `num_classes` does not say which.
    """
    if isinstance(value, fx.Proxy):
        return value
    if dataclasses.is_dataclass(value):
        value = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        if "logits" in value:
            return find_logits(value["logits"], num_classes)
        value = tuple(value.values())
    if not isinstance(value, (tuple, list)):
        return value
    if not value:
        return None
    return _logits_among(value, num_classes)


def _logits_among(values: tuple[Any, ...] | list[Any], num_classes: int | None) -> Any:
    candidates = [each for each in values if _width(each)]
    widths = [_width(each) for each in candidates]
    if len(set(widths)) < 2:
        return find_logits(values[0], num_classes)
    if num_classes in widths:
        return candidates[widths.index(num_classes)]
    shapes = ", ".join(f"(B, {width})" for width in widths)
    asked = "" if num_classes is None else f", none with num_classes={num_classes}"
    raise TraceError(
        f"the model returns several values that could be its logits, of shapes {shapes}{asked}. "
        "Hint: pass num_classes, which tells which of them"
    )


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
