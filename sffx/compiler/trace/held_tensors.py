"""Parameters and buffers that a forward reaches past the attributes of its modules.

fx makes a proxy of `self.layer.weight`. Of what `self.layer.parameters()` and `state_dict()` return
it makes none. Without one, what a forward computes from such a tensor alone would be no part of the
graph:

    tensors = {name: 0.9 * value for name, value in self.layer.named_parameters()}
    x = torch.func.functional_call(self.layer, tensors, (x,))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

if TYPE_CHECKING:
    from sffx.compiler.trace.tracer import GuidedTracer


class HeldTensors(TorchFunctionMode):
    """Puts proxies in the place of such tensors where torch's functions are given them.

    Args:
        tracer: creates the nodes.
    """

    def __init__(self, tracer: GuidedTracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._tracer.is_running or _describes(func):
            return func(*args, **kwargs)
        if not any(map(self._tracer.is_untraced, tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(FakeTensor, self._traced, (args, kwargs))
        if func.__name__ == "__get__":
            return getattr(args[0], func.__self__.__name__)
        return func(*args, **kwargs)

    def _traced(self, value: FakeTensor) -> Any:
        if not self._tracer.is_untraced(value):
            return value
        return self._tracer.proxy(self._tracer.create_arg(value))


def _describes(func: Any) -> bool:
    """Whether a function of torch tells of a tensor something else than its values."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        # What stands in for `.data` during a trace has traced it already.
        if isinstance(func.__self__, property):
            return True
        return func.__self__.__name__ not in _TENSORS_AS_ATTRIBUTES
    return name in _DESCRIPTIONS or name in ("__set__", "__delete__")


_TENSORS_AS_ATTRIBUTES = ("T", "H", "mT", "mH", "real", "imag")

_DESCRIPTIONS = (
    *("__deepcopy__", "__format__", "__hash__", "__len__", "__reduce_ex__", "__repr__"),
    *("data_ptr", "dim", "element_size", "is_complex", "is_contiguous", "is_floating_point"),
    *("is_same_size", "nelement", "numel", "requires_grad_", "register_hook", "size"),
    *("storage_offset", "stride", "untyped_storage"),
)
