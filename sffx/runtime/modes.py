"""The modes of modules: hold them in eval mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from sffx.net import overrides_mode


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Hold models in eval mode; afterwards every module inside has its own mode again."""
    modes: dict[nn.Module, bool] = {}
    for model in models:
        for module in model.modules():
            modes.setdefault(module, module.training)
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            # It may do more than to set the mode, such as to merge weights.
            if overrides_mode(module) and module.training != training:
                module.train(training)
        for module, training in modes.items():
            module.training = training
