"""Views of parameters and buffers in plain attributes of modules, which a graph cannot follow."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from sffx.compiler.aliases import views_in_attributes
from sffx.compiler.qualnames import attribute
from sffx.compiler.trace.runner import NodeRunner
from sffx.compiler.trace.state import Reads
from sffx.errors import TraceError
from sffx.tensors import tensors_in


class AttributeViews:
    """The plain attributes that are views of parameters or buffers.

    Args:
        runner: of the model and its copy.
        names: qualnames of the attributes.
    """

    def __init__(self, runner: NodeRunner, names: Collection[str]) -> None:
        self._names = names
        self._model = type(runner.original).__name__
        self._parted = _parted_views(runner, names)
        runner.uncopied = {key: tensor for key, (tensor, _) in self._parted.items()}

    def require_none(self) -> None:
        """Raise a TraceError if a module keeps a view in an attribute.

        The trace does not see what is computed from it. A leaf would not help: in a copy of the
        leaf the view has memory of its own.
        """
        for name in self._names:
            raise self._reads_view(name)

    def call_without_reads(self, call: Callable[[], Any]) -> Any:
        """Call a leaf, and require that it reads no view which a copy of the model has parted.

        It would read the numbers of before the training. A view of a buffer stays one.
        """
        reads = Reads(self._parted)
        with reads if self._parted else nullcontext():
            value = call()
        for key in reads.found:
            raise self._reads_view(self._parted[key][1])
        return value

    def _reads_view(self, name: str) -> TraceError:
        return TraceError(
            f"{self._model} reads its attribute {name!r}, a view of a parameter or a buffer, which "
            "a graph would freeze. Hint: register it as a buffer, self.register_buffer(...), or "
            "take the view in the forward"
        )


def _parted_views(runner: NodeRunner, names: Collection[str]) -> dict[int, tuple[Tensor, str]]:
    """Return the views whose memory a copy of the model has parted from that of their parameter.

    Args:
        runner: of the model and its copy.
        names: qualnames of the attributes that hold views.

    Returns:
        By `id` each tensor that stands for one, fake or with values, and its attribute.
    """
    parted = {}
    for name in set(names).difference(views_in_attributes(runner.original) if names else ()):
        for model in (runner.probe, runner.original):
            for leaf in tensors_in(attribute(model, name)):
                parted[id(leaf)] = (leaf, name)
    return parted
