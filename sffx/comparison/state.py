"""What a forward leaves behind: buffers, modes of modules, calls of hooks."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sffx.comparison.runs import relative_error
from sffx.comparison.trunk import Trunk
from sffx.comparison.weights import other_names, same, state_of
from sffx.compiler.qualnames import holders

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def worst_state(model: nn.Module, trunk: Trunk, before: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest relative error of a parameter or buffer, and its name.

    Args:
        model: the plain model, after some calls.
        trunk: after the same calls.
        before: copies of the model's parameters and buffers before them.
    """
    held = trunk.state()
    names = other_names(model)
    worst = (0.0, "")
    for name, expected in state_of(model).items():
        error = 0.0
        # A block knows a shared tensor by some of its names.
        tensors = [tensor for other in names[name] for tensor in held.get(other, [])]
        if tensors:
            error = max(relative_error(tensor, expected) for tensor in tensors)
        elif name in before and not same(expected, before[name]) and not is_idle(model, held, name):
            # The model has changed it, but the net does not even have it.
            error = float("inf")
        worst = max(worst, (error, name))
    return worst


def is_idle(model: nn.Module, held: dict[str, Any], name: str) -> bool:
    """Return whether a module around a tensor has weights of which the net holds none.

    The logits do not depend on such a module, and the plan says so.
    """
    for holder in holders(name):
        weights = [f"{holder}.{own}" for own, _ in model.get_submodule(holder).named_parameters()]
        if weights and not any(weight in held for weight in weights):
            return True
    return False


def wrong_mode(model: nn.Module, trunk: Trunk, training: bool) -> str:
    """Return the qualname of the first module whose mode is another one in the net, "" if none."""
    model.train(training)
    trunk.train(training)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in trunk.modules_by_name():
        # A plain module only holds others in a block, and runs nothing.
        if type(module) is not nn.Module and module.training != modes.get(name, module.training):
            return name
    return ""


class HookCalls:
    """Counts how often the hooks of modules are called, by the module and the hook's number."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, int]] = Counter()

    def watch(self, name: str, module: nn.Module) -> None:
        """Count the calls of the forward hooks that a module has now."""
        for registry in _HOOKS:
            hooks: dict[int, Callable[..., Any]] = getattr(module, registry)
            counted: OrderedDict[int, Callable[..., Any]] = OrderedDict()
            for number, hook in hooks.items():
                counted[number] = self._counted((name, number), hook)
            # Not in place: a block shares the registry with that of the caller's net.
            module.__dict__[registry] = counted

    def _counted(self, key: tuple[str, int], hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.counts[key] += 1
            return hook(*args, **kwargs)

        return call
