"""What stopped an exporter, in one line: the operator, the fx node and the module of the original model, and what to do."""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Iterator
from types import FrameType

from torch import fx, nn

# Generated forwards of graph modules; a line in one is `name = ...`, with the name of its node.
GENERATED = "<eval_with_key>"
ASSIGNMENT = re.compile(r"\s*(\w+)(?: *:[^=]*)? = ")
GENERATED_LINE = re.compile(rf'File "{GENERATED}[^"]*", line \d+, in forward\n{ASSIGNMENT.pattern}')


def explanation(error: Exception, model: nn.Module) -> str:
    """Say in one line what stopped the exporter.

    Args:
        error: that it raised.
        model: that it was given.
    """
    chain = _chain(error)
    text = "\n".join(map(str, chain))
    place = _place(chain, text, model)
    if operator := re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", text):
        hint = "Hint: write this module with other operators, or use sffx.export_program, which keeps every operator"
        return (
            f"the operator {operator[1]!r}{f' ({place})' if place else ''} has no ONNX form. {hint}"
        )
    hint = "Hint: the model must run at any batch size, without Python branches on the values of tensors"
    return f"the model cannot be exported{f' ({place})' if place else ''}: {first_line(chain[-1])}. {hint}"


def first_line(error: BaseException) -> str:
    """Return the first line of the error's message, with the second where the first only announces it."""
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    if first.startswith("Constraints violated") and rest:
        first = rest[0].strip(" -")
    return (f"{first} {rest[0].strip(' -')}" if first.endswith(":") and rest else first).rstrip(
        ".:"
    )


def _chain(error: BaseException) -> list[BaseException]:
    """Return the error, its cause, the cause of that, and so on."""
    return [error, *_chain(error.__cause__)] if error.__cause__ else [error]


def _place(chain: list[BaseException], text: str, model: nn.Module) -> str:
    """Return the fx node and the module where the exporter stopped, "" where that is not known."""
    translated = re.search(r"Error when translating node %(\w+)", text)
    if translated:
        return _place_of(_exported_node(chain, translated[1]), translated[1], model)
    executed = re.search(r"While executing %(\w+)", text)
    name = _running(chain) or (executed[1] if executed else "")
    module = _owner(model, name)
    return f"node {name!r} in module {module!r}" if module else ""


def _place_of(node: fx.Node | None, name: str, model: nn.Module) -> str:
    """Return the place that a node of the exporter's own graph stands for: in the model's graphs, or in a module that was not traced."""
    meta = node.meta if node is not None else {}
    for line in reversed(GENERATED_LINE.findall(str(meta.get("stack_trace")))):
        if module := _owner(model, line):
            return f"node {line!r} in module {module!r}"
    modules = [path for path, _ in meta.get("nn_module_stack", {}).values() if path]
    return f"node {name!r} in module {modules[-1]!r}" if modules else f"node {name!r}"


def _exported_node(chain: list[BaseException], name: str) -> fx.Node | None:
    """Return the node of the exporter's graph that it names in its message; it is in the hands of the functions that raised."""
    held = (value for frame, _ in _frames(chain) for value in frame.f_locals.values())
    return next(
        (value for value in held if isinstance(value, fx.Node) and value.name == name), None
    )


def _running(chain: list[BaseException]) -> str:
    """Return the name of the model's innermost node that ran when the error was raised, "" where none did."""
    places = [(frame.f_code.co_filename, line) for frame, line in _frames(chain)]
    lines = [linecache.getline(file, line) for file, line in places if file.startswith(GENERATED)]
    found = [match[1] for match in map(ASSIGNMENT.match, lines) if match]
    return found[-1] if found else ""


def _frames(chain: list[BaseException]) -> Iterator[tuple[FrameType, int]]:
    return (place for error in chain for place in traceback.walk_tb(error.__traceback__))


def _owner(model: nn.Module, name: str) -> str:
    """Return the qualname, in the original model, of the module that a node lies in, "" where there is no such node."""
    graphs = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, fx.GraphModule)
    ]
    for path, module in reversed(graphs):  # the innermost graph decides
        for node in module.graph.nodes:
            if node.name == name and node.op != "placeholder":
                stack = [owner for owner, _ in node.meta.get("nn_module_stack", {}).values()]
                return (
                    str(node.target) if node.op == "call_module" else stack[-1] if stack else path
                )
    return ""
