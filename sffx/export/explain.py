"""Why an exporter stopped, in one line: operator, fx node, module of the original model, remedy."""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Iterator
from types import FrameType

import torch
from torch import fx, nn

from sffx.errors import ExportError, first_line
from sffx.parts import name_in_model

# The file name of a graph module's generated forward. A line in it is `name = ...`, where `name`
# is that of its node.
GENERATED = "<eval_with_key>"
ASSIGNMENT = re.compile(r"\s*(\w+)(?: *:[^=]*)? = ")
GENERATED_LINE = re.compile(rf'File "{GENERATED}[^"]*", line \d+, in forward\n{ASSIGNMENT.pattern}')

NO_ONNX_FORM = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)'")
SIZE_AS_NUMBER = "Unsupported attribute type"
TRANSLATING = re.compile(r"Error when translating node %(\w+)")
EXECUTING = re.compile(r"While executing %(\w+)")

OPERATOR_HINT = (
    "Hint: write this module with other operators, "
    "or use sffx.export_program, which keeps every operator"
)
MODEL_HINT = (
    "Hint: the model must run at any batch size, without Python branches on the values of tensors"
)


def explanation(error: Exception, model: nn.Module) -> str:
    """Return one line about why the exporter stopped.

    Args:
        error: the exporter's.
        model: that was exported.
    """
    chain = _causes(error)
    text = "\n".join(map(str, chain))
    place = _place(chain, text, model)
    where = f" ({place})" if place else ""
    if isinstance(chain[-1], ExportError):  # of a function of sffx that has no form in a file
        return f"the model cannot be exported{where}: {first_line(chain[-1])}"
    operator = NO_ONNX_FORM.search(text)
    if operator:
        return f"the operator {operator[1]!r}{where} has no ONNX form. {OPERATOR_HINT}"
    argument = _open_argument(chain, text)
    if argument:
        return (
            f"{argument}{where} from a size that stays open, as that of the batch, and ONNX holds "
            f"it as a fixed number. {OPERATOR_HINT}"
        )
    return f"the model cannot be exported{where}: {first_line(chain[-1])}. {MODEL_HINT}"


def _causes(error: BaseException) -> list[BaseException]:
    """Return the error, its cause, the cause of that, and so on."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return chain


def _place(chain: list[BaseException], text: str, model: nn.Module) -> str:
    """Return the fx node and the module where the exporter stopped, "" if that is unknown."""
    translated = TRANSLATING.search(text)
    if translated:
        name = translated[1]
        return _place_of_exported(_exported_node(chain, name), name, model)
    name = _running_node(chain)
    executed = EXECUTING.search(text)
    if not name and executed:
        name = executed[1]
    module = _owner(model, name)
    return f"node {name!r} in module {module!r}" if module else ""


def _place_of_exported(node: fx.Node | None, name: str, model: nn.Module) -> str:
    """Return the place in the model that a node of the exporter's own graph was made for."""
    if node is None:
        return f"node {name!r}"
    for line in reversed(GENERATED_LINE.findall(str(node.meta.get("stack_trace")))):
        module = _owner(model, line)
        if module:
            return f"node {line!r} in module {module!r}"
    # The node lies in a module that the trace of sffx did not look into. Exporters put modules of
    # their own in its place.
    known = {path for path, _ in model.named_modules() if path}
    paths = [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
    modules = [path for path in paths if path in known]
    if not modules:
        return f"node {name!r}"
    return f"node {name!r} in module {_without_block(modules[-1], model)!r}"


def _without_block(path: str, model: nn.Module) -> str:
    """Return the qualname that a module of a cut model has in the original model."""
    first, _, rest = path.partition(".")
    is_block = isinstance(getattr(model, first, None), fx.GraphModule)
    return name_in_model(rest) if is_block and rest else path


def _open_argument(chain: list[BaseException], text: str) -> str:
    """Return which argument of an operator is a size, where ONNX has a number; "" where none is.

    A convolution with weights for each sample is one with as many groups as samples.
    """
    translated = TRANSLATING.search(text)
    node = _exported_node(chain, translated[1]) if translated and SIZE_AS_NUMBER in text else None
    schema = getattr(getattr(node, "target", None), "_schema", None)
    if node is None or schema is None:
        return ""
    for argument, value in zip(schema.arguments, node.args, strict=False):
        if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.SymInt):
            return f"{schema.name!r} takes its argument {argument.name!r}"
    return ""


def _exported_node(chain: list[BaseException], name: str) -> fx.Node | None:
    """Return the node of the exporter's graph that its message names.

    The error does not carry the graph. The functions that raised it hold the node as a variable.
    """
    for frame, _ in _frames(chain):
        for value in frame.f_locals.values():
            if isinstance(value, fx.Node) and value.name == name:
                return value
    return None


def _running_node(chain: list[BaseException]) -> str:
    """Return the name of the model's innermost node that ran when the error was raised, or ""."""
    name = ""
    for frame, line in _frames(chain):
        file = frame.f_code.co_filename
        if not file.startswith(GENERATED):
            continue
        assignment = ASSIGNMENT.match(linecache.getline(file, line))
        if assignment:
            name = assignment[1]
    return name


def _frames(chain: list[BaseException]) -> Iterator[tuple[FrameType, int]]:
    """Yield the frames of all errors, each from the outside in, with the line that ran."""
    for error in chain:
        yield from traceback.walk_tb(error.__traceback__)


def _owner(model: nn.Module, name: str) -> str:
    """Return the qualname, in the original model, of the module that a node lies in, or ""."""
    graphs = []
    for path, module in model.named_modules():
        if isinstance(module, fx.GraphModule):
            graphs.append((path, module))
    # Several graphs may have a node of that name; the innermost decides.
    for path, module in reversed(graphs):
        for node in module.graph.nodes:
            if node.name == name and node.op != "placeholder":
                return _module_of(node, path)
    return ""


def place_of_node(node: fx.Node, graph: str) -> str:
    """Return a node and the module of the original model that it lies in, in words.

    Args:
        node: of a graph.
        graph: the qualname of the graph's module.
    """
    module = _module_of(node, graph)
    return f"node {node.name!r} in module {module!r}" if module else f"node {node.name!r}"


def _module_of(node: fx.Node, graph: str) -> str:
    """Return the qualname of the module that a node lies in, given the qualname of its graph."""
    if node.op == "call_module":
        return name_in_model(str(node.target))
    stack = [owner for owner, _ in node.meta.get("nn_module_stack", {}).values()]
    return stack[-1] if stack else graph
