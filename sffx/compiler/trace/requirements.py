"""What can be traced: a plain module, whose tensors have values."""

from __future__ import annotations

from typing import Any

from torch import jit, nn
from torch.nn.parameter import is_lazy

from sffx.compiler.trace.closures import closure_over_the_model, global_of_the_model
from sffx.errors import InputError
from sffx.fsdp import shards_in
from sffx.nested import holds_itself
from sffx.net import is_cut
from sffx.tensors import require_identity


def require_plain(model: Any) -> None:
    """Refuse what is no module, what is wrapped around a model, and a model without values.

    Raises:
        InputError: says what to pass instead.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model is a {type(model).__name__}, not a torch.nn.Module. "
            "Hint: pass an instance, not a class or a function"
        )
    require_identity(model)
    _require_unwrapped(model)
    _require_uncompiled_parts(model)
    _require_values(model)
    _require_ends(model)
    _require_copyable(model)
    if is_cut(model):
        raise InputError(
            "the model is cut already. Hint: sffx.extract(net) gives the plain model back, "
            "which can be cut in another way"
        )


def _require_unwrapped(model: nn.Module) -> None:
    """Raise an InputError if a model is made from another one, which is the one to pass."""
    kind = type(model).__name__
    # By its attribute: to import the class of torch.compile takes seconds.
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise InputError(
            "model is compiled. "
            "Hint: pass the plain one, model._orig_mod, and compile what transform returns"
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise InputError(
            f"model is wrapped in {kind}. "
            "Hint: pass model.module, and wrap sffx.LocalLoss(net) instead"
        )
    if shards_in(model):
        raise InputError(
            "model is sharded by fully_shard. Hint: transform it first, then sffx.shard(net)"
        )
    if isinstance(model, (jit.ScriptModule, jit.TopLevelTracedModule)):
        raise InputError(
            f"model is a {kind}, whose code cannot be traced. "
            "Hint: pass the module that it was scripted or traced from"
        )


def _require_uncompiled_parts(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(getattr(module, "_orig_mod", None), nn.Module):
            raise InputError(
                f"{name!r} is compiled. Hint: put the plain module there, {name}._orig_mod, and "
                "compile the blocks of what transform returns"
            )
        if module._compiled_call_impl is not None:
            raise InputError(
                f"{repr(name) if name else 'model'} is compiled in place, by its method compile. "
                "Hint: cut the model before that, and compile the blocks by sffx.compile(net)"
            )


def _require_values(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise InputError(
                f"{name!r} has no shape yet, as in lazy layers. Hint: run the model once, model(x)"
            )


def _require_ends(model: nn.Module) -> None:
    """Raise an InputError if an attribute of a module is a list or a mapping that holds itself."""
    for qualname, module in model.named_modules():
        for name, value in vars(module).items():
            if holds_itself(value):
                where = f"{qualname}.{name}" if qualname else name
                raise InputError(
                    f"the attribute {where!r} holds itself, or is nested too deeply, so that it "
                    "has no end. Hint: keep it outside the model"
                )


def _require_copyable(model: nn.Module) -> None:
    for qualname, module in model.named_modules():
        for kind in type(module).__mro__:
            slots = vars(kind).get("__slots__", ())
            slots = (slots,) if isinstance(slots, str) else slots
            kept = [name for name in slots if not name.startswith("__") and hasattr(module, name)]
            if kept:
                where = repr(qualname) if qualname else "the model"
                raise InputError(
                    f"{kind.__name__} keeps {kept[0]!r} in a slot, which a copy of a module loses. "
                    f"Hint: remove __slots__ from the class of {where}"
                )
    place = closure_over_the_model(model)
    if place:
        raise InputError(
            f"{place!r} of {type(model).__name__} is a function that holds a part of the model, "
            "which a copy of the model would share. Hint: make it a method of a class, or bind it "
            "by types.MethodType(function, module) and read the part from the module"
        )
    function, name = global_of_the_model(model)
    if name:
        raise InputError(
            f"{function} reads {name!r}, a global or a free variable that holds a part of the "
            "model, which a copy of the model would share. Hint: read the part from self"
        )
