"""Assignments to the data of a tensor, as `self.weight.data = self.weight.data.sign()`.

No exporter traces them, and one of a weight ends the process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sffx.errors import ExportError
from sffx.export.explain import explanation

# The descriptor of the attribute; what a mode is told of an assignment is bound to it.
_DATA = Tensor.data


class _RefusingDataWrites(TorchFunctionMode):
    """Raises an ExportError where the data of a tensor is assigned."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") == "__set__" and getattr(func, "__self__", None) is _DATA:
            raise ExportError(
                f"its forward assigns the data of a tensor of shape {tuple(args[0].shape)}, which "
                "exporters cannot trace. Hint: give the value a name of its own, as "
                "weight = self.weight.sign(); a straight-through estimator is "
                "x + (x.sign() - x).detach()"
            )
        return func(*args, **(kwargs or {}))


def require_no_data_writes(model: nn.Module, examples: tuple[Tensor, ...]) -> None:
    """Raise an ExportError if a forward assigns the data of a tensor, by its node and module.

    Args:
        model: that is exported, in eval mode.
        examples: a value of each input.
    """
    try:
        with _RefusingDataWrites(), torch.no_grad():
            model(*examples)
    except ExportError as error:
        raise ExportError(explanation(error, model)) from error
    except Exception:
        # The exporter says what fails.
        return
