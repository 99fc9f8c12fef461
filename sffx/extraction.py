"""Extraction: the plain model back, with the weights that were trained in the cut one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sffx.compiler.qualnames import holders
from sffx.compiler.trace.constants import ADDED_CONSTANT
from sffx.compiler.trace.flags import AddedModule
from sffx.kernels.pool import MemorySavingMaxPool2d
from sffx.net import CutModel, cut_model
from sffx.parts import name_in_model
from sffx.runtime.find_residency import make_whole, require_values
from sffx.tensors import OF_EVERY_MODULE, computed_tensors, copied, detach_scripts


def extract(net: nn.Module) -> nn.Module:
    """Return a model of the original class with the trained weights, without heads and norms.

    Weights and buffers have their original names. Each layer is in the mode that it has in the cut
    model, so a batch norm that was set to eval mode stays so. With `norm="none"` the model computes
    what the cut model's classifier does. With `norm="layer"` the blocks were trained on normalised
    inputs, which the plain model does not make, so it is a start for further training.

    Args:
        net: what `transform` returned.

    Raises:
        InputError: `net` is no cut model, or is sharded, or only some blocks have values, as where
            a `Pipeline` has divided it.
    """
    cut = cut_model(net)
    if not all(tensor.is_meta for tensor in cut.parameters()):
        require_values(cut)
    return cut.plan.objective.restored(extract_as_cut(cut))


def extract_as_cut(net: CutModel) -> nn.Module:
    """Return the model that was cut with the trained weights, as an objective may have changed it.

    Args:
        net: what `transform` returned.

    Raises:
        InputError: `net` is sharded.
    """
    make_whole(net)
    model: nn.Module = copied(net.origin.model)
    model.to(next(net.parameters()).device).train(net.training)
    fill(model, net)
    return model


def fill(model: nn.Module, net: CutModel) -> None:
    """Put copies of what the blocks of a cut model hold into a copy of its original model.

    Args:
        model: a copy of `net.origin.model`, which is altered.
        net: the cut model.
    """
    _remove_additions(model)
    _PutBack(model, [net.get_submodule(block.target) for block in net.plan.all_blocks]).run()
    detach_scripts(model)


def _remove_additions(model: nn.Module) -> None:
    """Remove the modules and buffers that the trace added."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, AddedModule):
                delattr(module, name)
    for name in list(model._buffers):
        if name.startswith(ADDED_CONSTANT):
            delattr(model, name)


class _PutBack:
    """Puts copies of what the blocks hold in the place of what the model holds, name by name.

    All copies share one memo of `copy.deepcopy`. So tensors that are shared in the cut model are
    shared in the plain one, however many blocks and names they have.

    Attributes:
        model: to fill.
        parts: the blocks, in order.
        copies: the memo: of tensors their copies, of the blocks' modules those of the model.
        old: the tensors of the model as it was, by name. One may have several names, of which some
            are in no block.
    """

    def __init__(self, model: nn.Module, parts: Sequence[nn.Module]) -> None:
        self.model = model
        self.parts = parts
        self.copies: dict[int, Any] = {}
        self.old = dict(_named_tensors(model))

    def run(self) -> None:
        """Fill the model."""
        # Everything is compared before anything is copied, so that the memo is complete.
        kept, replaced = self._compared()
        for name, module in kept:
            self._put_tensors(name, module)
            if not _is_holder(module):
                original = self.model.get_submodule(name)
                self._put_attributes(module, original)
                original.training = module.training
        for name, module in replaced.items():
            owner, _, attribute = name.rpartition(".")
            setattr(self.model.get_submodule(owner), attribute, self._copied(module))

    def _compared(self) -> tuple[list[tuple[str, nn.Module]], dict[str, nn.Module]]:
        """Return the modules that the model still has, by name, and those put in place of others.

        Notes in the memo which module of the model stands for one that it still has. A copy made
        later may refer to such a module, and then refers to the model's.
        """
        kept: list[tuple[str, nn.Module]] = []
        replaced: dict[str, nn.Module] = {}
        for part in self.parts:
            self.copies.update(computed_tensors(part))
            # Outer modules come before those inside them.
            for name_in_part, module in part.named_modules(remove_duplicate=False):
                name = name_in_model(name_in_part)
                original = _submodule(self.model, name)
                # What was put in the place of a module is copied as a whole.
                is_inside = any(holder in replaced for holder in holders(name))
                if original is None or is_inside:
                    continue
                if _belongs_to_the_cut(module, original):
                    kept.append((name, module))
                    self.copies[id(module)] = original
                else:
                    replaced[name] = module
        return kept, replaced

    def _put_tensors(self, qualname: str, module: nn.Module) -> None:
        """Put the parameters and buffers of one module in the place of the model's."""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            # A tensor of the model itself may have another name in a block.
            target = f"{qualname}.{name}" if qualname else name_in_model(name)
            # A tensor that the trace added is not among the model's.
            if tensor is None or target not in self.old:
                continue
            # The model may hold this tensor by several names, which must stay names of one tensor.
            replaced = self.old[target]
            for any_name, old in self.old.items():
                if old is replaced:
                    _put(self.model, any_name, self._copied(tensor))

    def _put_attributes(self, module: nn.Module, original: nn.Module) -> None:
        """Put what a layer keeps beside its parameters and buffers: counters, tables, tensors."""
        for name, value in module.__dict__.items():
            if name not in OF_EVERY_MODULE:
                original.__dict__[name] = self._copied(value)

    def _copied(self, value: Any) -> Any:
        return copy.deepcopy(value, self.copies)


def _belongs_to_the_cut(module: nn.Module, original: nn.Module) -> bool:
    """Return whether a module of a block is the original one, or was put there by the cut itself.

    Any other was put in its place after the cut, such as an adapter, or was reparametrised.
    """
    if _is_holder(module) or isinstance(module, MemorySavingMaxPool2d):
        return True
    # A scripted module cannot be filled tensor by tensor.
    if type(module) is not type(original) or isinstance(module, torch.jit.ScriptModule):
        return False
    return _names_held(module) == _names_held(original)


def _is_holder(module: nn.Module) -> bool:
    """Return whether a module of a block only holds other layers, in the place of the original."""
    return type(module) is nn.Module or isinstance(module, fx.GraphModule)


def _names_held(module: nn.Module) -> set[str]:
    """Return the names of a module's tensors and children, without what the trace added."""
    names = {*module._parameters, *module._buffers}
    for name, child in module._modules.items():
        if not isinstance(child, AddedModule):
            names.add(name)
    return names


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters, buffers and plain tensor attributes, shared ones by each of their names."""
    for qualname, module in model.named_modules(remove_duplicate=False):
        for attributes in (module._parameters, module._buffers, module.__dict__):
            for name, value in attributes.items():
                if isinstance(value, Tensor):
                    yield (f"{qualname}.{name}" if qualname else name), value


def _put(model: nn.Module, target: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a parameter, a buffer or a plain attribute."""
    owner, _, name = target.rpartition(".")
    module = model.get_submodule(owner)
    if name in module._parameters:
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, tensor.requires_grad)
        module._parameters[name] = tensor
    elif name in module._buffers:
        module._buffers[name] = tensor
    else:
        module.__dict__[name] = tensor


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
