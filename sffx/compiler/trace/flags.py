"""Training flags: `self.training` as a node of the graph, so that it follows train() and eval().

A plain trace reads `self.training` once and freezes it. Here the attribute is a property of all
modules while the trace runs. When a forward reads it, the tracer creates a call of a
`TrainingFlag`, a child of that module, whose mode train() and eval() set as they set that of every
module. A forward may ask for the mode of any module, that of a leaf as well:

    x = F.dropout(x, self.drop.p, self.drop.training)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from sffx.compiler.walks import numbers_behind


class AddedModule(nn.Module):
    """A module that the trace adds to those of a model, as a child of one of them.

    It has the mode of the module whose child it is.
    """


class AddedTarget(str):
    """The target of a node that calls an added module, by which the node is known."""

    def make_module(self) -> AddedModule:
        """Return the module that the node calls."""
        raise NotImplementedError


class TrainingFlag(AddedModule):
    """Returns its own `training`, and so that of the module whose child it is."""

    def forward(self) -> bool:
        return self.training


class FlagTarget(AddedTarget):
    """The target of a flag's node."""

    def make_module(self) -> TrainingFlag:
        return TrainingFlag()


def flag_target(owner: nn.Module, qualname: str) -> FlagTarget:
    """Return the target of a module's flag.

    Args:
        owner: the module.
        qualname: of the module.
    """
    name = _FLAG
    while hasattr(owner, name):  # a module of the model may be called like that
        name += "_"
    return FlagTarget(f"{qualname}.{name}" if qualname else name)


_FLAG = "training_flag"


def flag_owner(node: fx.Node) -> str:
    """Return the qualname of the module whose mode a flag's node reads."""
    return str(node.target).rpartition(".")[0]


def is_flag(node: fx.Node) -> bool:
    """Whether a node reads the mode of a module."""
    return isinstance(node.target, FlagTarget)


def owners_of_flags(node: fx.Node) -> set[str]:
    """Return the qualnames of the modules on whose modes a number or a truth value depends."""
    return {flag_owner(each) for each in numbers_behind(node) if is_flag(each)}


def is_added(node: fx.Node) -> bool:
    """Whether a node calls a module that the trace adds."""
    return isinstance(node.target, AddedTarget)


def mode_property(read: Callable[[nn.Module], Any]) -> property:
    """Return a property that stands for the attribute `training` of every module.

    Args:
        read: returns what a forward reads as the mode of a module.
    """

    def write(module: nn.Module, value: bool) -> None:
        module.__dict__["training"] = value

    def delete(module: nn.Module) -> None:
        del module.__dict__["training"]

    return property(read, write, delete)


def add_module(root: nn.Module, node: fx.Node) -> None:
    """Give a module of the model the child that a node calls, which the trace adds."""
    target: Any = node.target
    qualname, _, name = target.rpartition(".")
    owner = root.get_submodule(qualname)
    owner._modules[name] = target.make_module().train(owner.training)
