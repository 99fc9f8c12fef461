"""Leaves: the modules that a trace does not look into."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from sffx.blocks import Leaf
from sffx.compiler.calls import signature
from sffx.compiler.qualnames import has_tensors, outermost
from sffx.errors import TraceError

# torch's classes whose forward only calls their children, and so is traced.
_CONTAINERS = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
)
_LAYER_PACKAGES = ("torch.nn.", "torch.ao.nn.")


def is_layer(module: nn.Module) -> bool:
    """Whether a trace stops at a module.

    1. It has no children. Exception: it only joins several values, as a sum does.
    2. It is one of torch's own layers, or a subclass of one.
    """
    if isinstance(module, _CONTAINERS):
        return False
    if not any(module.children()):
        return not _joins(module)
    bases = [base for base in type(module).__mro__ if base is not nn.Module]
    return any(base.__module__.startswith(_LAYER_PACKAGES) for base in bases)


def _joins(module: nn.Module) -> bool:
    """Whether a module that is not torch's has no tensors, and takes two arguments or more."""
    if type(module).__module__.startswith("torch.") or isinstance(module, torch.jit.ScriptModule):
        return False
    if has_tensors(module):
        return False
    required = 0
    for parameter in signature(module).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            return True
        has_default = parameter.default is not parameter.empty
        if not has_default and parameter.kind is not parameter.VAR_KEYWORD:
            required += 1
    return required > 1


def has_no_code(module: nn.Module) -> bool:
    """Whether a module is a container with the forward of its torch class."""
    return any(type(module).forward is kind.forward for kind in _CONTAINERS)


def add_leaves(
    reasons: dict[str, str], model: nn.Module, kind: type[nn.Module], reason: str
) -> None:
    """Make leaves of all modules of a class, since what stops a trace in one stops it in all.

    Args:
        reasons: why each leaf is one, by its qualname; to write to.
        model: that is traced. It never is a leaf itself.
        kind: the exact class.
        reason: why no module of the class can be traced.
    """
    for name, module in model.named_modules():
        if name and type(module) is kind:
            reasons[name] = reason


def add_leaves_of_modules(
    reasons: dict[str, str], model: nn.Module, found: Mapping[nn.Module, str]
) -> None:
    """Make leaves of some modules of a model, and of others of their class.

    Args:
        reasons: why each leaf is one, by its qualname; to write to.
        model: that is traced.
        found: why a graph cannot hold what the forward of a module does.

    Raises:
        TraceError: the model itself is among them.
    """
    for module, reason in found.items():
        if module is model:
            raise TraceError(
                f"{type(model).__name__} {reason}, which a graph cannot hold. "
                "Hint: move this into a submodule, which then becomes a leaf, or keep numbers in "
                "a buffer"
            )
        add_leaves(reasons, model, type(module), reason)


def leaves_by_hooks(model: nn.Module) -> dict[str, str]:
    """Return why modules with backward hooks are leaves, by qualname.

    Such a hook is given the gradients of the whole module. It has no place in a graph of the
    module's parts.
    """
    reasons = {}
    for name, module in model.named_modules():
        if name and not is_layer(module) and has_backward_hooks(module):
            reasons[name] = "has a backward hook"
    return reasons


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether a hook is given gradients of a module."""
    names = ("_backward_hooks", "_backward_pre_hooks")
    return any(vars(module).get(name) for name in names)  # a scripted module has none


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a hook is given what a module returns."""
    return bool(vars(module).get("_forward_hooks"))


def leaf_records(root: nn.Module, reasons: Mapping[str, str]) -> tuple[Leaf, ...]:
    """Return the records of the outermost leaves."""
    total = max(_number_of_parameters(root), 1)
    records = []
    for name in outermost(reasons):
        module = root.get_submodule(name)
        share = _number_of_parameters(module) / total
        records.append(Leaf(name, type(module).__name__, reasons[name], share))
    return tuple(records)


def _number_of_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
