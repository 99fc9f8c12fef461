"""Nodes that run a function for real: one that a trace cannot look into, or in one mode only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import fx, nn
from torch.autograd import Function

from sffx.compiler.facts import Facts, module_stack, set_facts
from sffx.compiler.qualnames import attribute
from sffx.compiler.trace.flags import AddedModule, AddedTarget

# A function, or the name of a method.
_Call = Callable[..., Any] | str

# The modules that run functions have this name in the model, and a number.
_NAME = "function"


class RunFunction(AddedModule):
    """Calls a function, in both modes or in one. In the other mode it returns None.

    Its own mode is that of the module whose child it is, as that of any `AddedModule`.

    Attributes:
        function: to call; or the name of a method of the first argument.
        mode: True to call it in train mode only, False in eval mode only, None in both.
    """

    def __init__(self, function: _Call, mode: bool | None) -> None:
        super().__init__()
        self.function = function
        self.mode = mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.mode is not None and self.mode is not self.training:
            return None
        return _called(self.function, args, kwargs, self.training)

    def extra_repr(self) -> str:
        modes = {None: "", True: " in train mode", False: " in eval mode"}
        return f"{name_of(self.function)}{modes[self.mode]}"


class FunctionTarget(AddedTarget):
    """The target of a node that runs a function.

    Attributes:
        function: as in `RunFunction`.
        mode: as in `RunFunction`.
    """

    function: _Call
    mode: bool | None

    def value(self, training: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the node returns in a mode."""
        if self.mode is not None and self.mode is not training:
            return None
        return _called(self.function, args, kwargs, training)

    def make_module(self) -> RunFunction:
        return RunFunction(self.function, self.mode)


def pick(is_training: Any, in_eval: Any, in_train: Any) -> Any:
    """Return the value of one of two modes."""
    if isinstance(is_training, fx.Proxy):  # fx traces the code of a graph that it unpickles
        arguments = (is_training, in_eval, in_train)
        return is_training.tracer.create_proxy("call_function", pick, arguments, {})
    return in_train if is_training else in_eval


def runs_in_one_mode(node: fx.Node) -> bool:
    """Whether a node has a value in train or in eval mode only."""
    return isinstance(node.target, FunctionTarget) and node.target.mode is not None


class OwnMethod:
    """A method of a module that reads nothing of it but plain attributes.

    Attributes:
        owner: a copy of the module without tensors and children.
        name: of the method.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.owner = _without_contents(module)
        self.name = name

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.owner, self.name)(*args, **kwargs)


class Applied:
    """Applies an autograd function. Its bound `apply` would not tell its name.

    Attributes:
        kind: the class of the autograd function.
    """

    def __init__(self, kind: type[Function]) -> None:
        self.kind = kind

    @property
    def __name__(self) -> str:
        return self.kind.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.kind.apply(*args, **kwargs)


class HeldArray:
    """Gives an array of NumPy, fresh in each call: its reader may share its memory and write on it.

    Attributes:
        array: to copy.
    """

    __name__ = "array"

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def __call__(self) -> np.ndarray[Any, Any]:
        return self.array.copy()


def _without_contents(module: nn.Module) -> nn.Module:
    copy = type(module).__new__(type(module))
    empty = vars(nn.Module())
    for name, value in vars(module).items():
        # Tensors, children and hooks are in attributes that an empty module has as well.
        copy.__dict__[name] = empty.get(name, value)
    copy.__dict__["training"] = True
    return copy


def name_of(function: Any) -> str:
    """Return the name of a function or a method."""
    return str(getattr(function, "__name__", function))


def function_target(
    graph: fx.Graph, probe: nn.Module, owner: str, function: _Call, mode: bool | None = None
) -> FunctionTarget:
    """Return the target of a node that is to run a function, which no other node has.

    Args:
        graph: of the node.
        probe: the model.
        owner: qualname of the module whose mode is that of the node.
        function: as in `RunFunction`.
        mode: as in `RunFunction`.
    """
    module = probe.get_submodule(owner)
    prefix = f"{owner}." if owner else ""
    taken = {str(node.target) for node in graph.nodes if isinstance(node.target, FunctionTarget)}
    number = 0
    name = f"{_NAME}_{number}"
    while prefix + name in taken or hasattr(module, name):
        number += 1
        name = f"{_NAME}_{number}"
    target = FunctionTarget(prefix + name)
    target.function = function
    target.mode = mode
    return target


def let_run_in_mode(node: fx.Node, owner: str, mode: bool, probe: nn.Module) -> None:
    """Let a node run in one mode only.

    Args:
        node: calls a function, a method or a module.
        owner: qualname of the module whose mode tells.
        mode: True for train mode.
        probe: the model.
    """
    function: Any = node.target
    if isinstance(function, FunctionTarget):
        function = function.function
    elif node.op == "call_module":
        function = _call_module
        _pass_module(node, probe)
    node.target = function_target(node.graph, probe, owner, function, mode)
    node.op = "call_module"


def _pass_module(node: fx.Node, probe: nn.Module) -> None:
    """Pass the module that a node calls as the first argument, so that the node owns nothing."""
    qualname = str(node.target)
    with node.graph.inserting_before(node):
        module = node.graph.get_attr(qualname)
    module.meta = {"nn_module_stack": module_stack(node)}
    value = attribute(probe, qualname)
    set_facts(module, Facts(value, value))
    node.args = (module, *node.args)


def _called(function: _Call, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> Any:
    if isinstance(function, str):
        return getattr(args[0], function)(*args[1:], **kwargs)
    if isinstance(function, OwnMethod):
        function.owner.training = training
    return function(*args, **kwargs)


def _call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)
