"""Gradient checkpointing in a model. It changes no output, and a cut model leaves it out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.utils import checkpoint

from sffx.compiler.trace.replaced import replaced

LEFT_OUT = (
    "gradient checkpointing in the model is left out. In the model, a batch norm under it counts "
    "a batch again in the backward pass"
)


def generators() -> Iterator[str]:
    """Yield the names in torch of what runs before and after a function that is checkpointed."""
    # A private function: other versions of torch may have several of this name, or none.
    for name in list(vars(checkpoint)):
        if name.startswith("_checkpoint_without_reentrant_generator"):
            yield name


@contextmanager
def left_out() -> Iterator[None]:
    """Let models run without checkpointing, as their cut models do."""
    with ExitStack() as stack:
        for name in generators():
            stack.enter_context(replaced(checkpoint, name, _do_nothing))
        apply = staticmethod(_call)
        stack.enter_context(replaced(checkpoint.CheckpointFunction, "apply", apply))
        yield


def _do_nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


def _call(function: Callable[..., Any], _: bool, *inputs: Any) -> Any:
    return function(*inputs)
