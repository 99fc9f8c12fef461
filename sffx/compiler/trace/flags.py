"""Training flags: `self.training` as a node of the graph, so that it follows train() and eval().

A plain trace reads `self.training` once and freezes it. Here each module that is traced through
has a `_PlantedFlag` in the place of the attribute while the trace runs. When the forward reads it,
the tracer creates a call of a `TrainingFlag`, a child of that module, whose mode train() and eval()
set as they set that of every module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from sffx.compiler.facts import facts


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


class PlantedFlag:
    """Stands, during a trace, in the place of the attribute `training` of a module.

    Attributes:
        target: of the flag's node.
    """

    def __init__(self, target: FlagTarget) -> None:
        self.target = target


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


def numbers_behind(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes from which a number or a truth value is computed, tensors left aside."""
    passed: set[fx.Node] = set()
    ahead = [node]
    while ahead:
        each = ahead.pop()
        if each in passed or isinstance(facts(each).example, Tensor):
            continue
        passed.add(each)
        yield each
        ahead += each.all_input_nodes


def is_added(node: fx.Node) -> bool:
    """Whether a node calls a module that the trace adds."""
    return isinstance(node.target, AddedTarget)


def plant_flags(
    module: nn.Module, is_leaf: Callable[[nn.Module, str], bool], qualname: str = ""
) -> None:
    """Replace the attribute `training` of every module that will be traced through.

    Args:
        module: of the probe, and all that it holds.
        is_leaf: whether the trace stops at a module, given the module and its qualname.
        qualname: of the module.
    """
    for name, child in module.named_children():
        path = f"{qualname}.{name}" if qualname else name
        if not is_leaf(child, path):
            plant_flags(child, is_leaf, path)
    if module.__dict__.pop("training", None) is None:
        return
    # fx intercepts only what `nn.Module.__getattr__` finds: parameters, buffers and modules.
    # Among the modules, a Sequential would run the flag. So it lies among the buffers.
    buffers: dict[str, Any] = module._buffers
    buffers["training"] = PlantedFlag(flag_target(module, qualname))
    module._non_persistent_buffers_set.add("training")  # a forward may call `state_dict()`


def lift_flags(probe: nn.Module) -> None:
    """Undo `plant_flags`."""
    for module in probe.modules():
        # A scripted module has no dictionary there, and is a leaf.
        is_scripted = isinstance(module, torch.jit.ScriptModule)
        if not is_scripted and isinstance(module._buffers.get("training"), PlantedFlag):
            del module._buffers["training"]
            module._non_persistent_buffers_set.discard("training")
            module.training = True


def add_module(root: nn.Module, node: fx.Node) -> None:
    """Give a module of the model the child that a node calls, which the trace adds."""
    target: Any = node.target
    qualname, _, name = target.rpartition(".")
    owner = root.get_submodule(qualname)
    owner._modules[name] = target.make_module().train(owner.training)
