"""What the code of a model keeps outside of it, in dictionaries of a file and the like.

A model runs on fake tensors while it is cut and while its memory is predicted. A fake tensor that
a cache keeps would be found by the next call of the real model.
"""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Iterator, MutableMapping, MutableSequence, MutableSet
from contextlib import contextmanager
from typing import Any

from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

# The class of what `functools.lru_cache` returns.
CACHED = type(functools.lru_cache(len))


@contextmanager
def caches_restored(model: nn.Module) -> Iterator[None]:
    """Take fake tensors out of the caches of a model's code afterwards."""
    held = list(_held_outside(model))
    functions = [(each, each.cache_info().misses) for each in held if isinstance(each, CACHED)]
    containers = [(each, _copied(each)) for each in held if isinstance(each, _CONTAINERS)]
    try:
        yield
    finally:
        for function, misses in functions:
            if function.cache_info().misses > misses:
                function.cache_clear()  # it does not say what it holds
        for container, before in containers:
            _restore(container, before)


_CONTAINERS = (MutableMapping, MutableSequence, MutableSet)


def _held_outside(model: nn.Module) -> Iterator[Any]:
    """Yield what the files and the classes of a model's modules hold, and what those objects do."""
    namespaces: dict[int, Any] = {}
    for kind in {base for module in model.modules() for base in type(module).__mro__}:
        file = sys.modules.get(kind.__module__)
        if kind.__module__.partition(".")[0] in _FOREIGN or file is None:
            continue
        namespaces[id(file)] = file
        namespaces[id(kind)] = kind
    for namespace in namespaces.values():
        for name, value in list(vars(namespace).items()):
            if name.startswith("__"):
                continue
            yield value
            kind_of_value = type(value)
            if getattr(kind_of_value, "__module__", "") == getattr(namespace, "__name__", None):
                yield from list(getattr(value, "__dict__", {}).values())


# They keep no tensors of a model.
_FOREIGN = {"torch", "builtins", "typing", "abc", "sffx"}


def _copied(container: Any) -> Any:
    return dict(container) if isinstance(container, MutableMapping) else list(container)


def _restore(container: Any, before: Any) -> None:
    """Put back what a container held in the place of what is fake."""
    if isinstance(container, MutableMapping):
        for key in list(container):
            if not _is_fake(key) and not _is_fake(container[key]):
                continue
            if key in before:
                container[key] = before[key]
            else:
                del container[key]
        return
    if not any(map(_is_fake, list(container))):
        return
    container.clear()
    if isinstance(container, MutableSet):
        for value in before:
            container.add(value)
    else:
        container.extend(before)


def _is_fake(value: Any) -> bool:
    parts = list(value) if isinstance(value, (deque, set)) else value
    return any(isinstance(leaf, (FakeTensor, fx.Proxy)) for leaf in tree_leaves(parts))
