"""Take the entries of a checkpoint out of the mapping that a file holds.

It may be a file of sffx, of Lightning, of another training script, or a state dict alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from sffx.checkpoint.entries import OPTIMIZER_KEY, STATE_KEY
from sffx.errors import InputError, shown
from sffx.parts import block_name

# The entries in which other training scripts keep the state dict; the first is Lightning's.
OTHER_STATE_KEYS = ("state_dict", "model_state_dict", "model")
LIGHTNING_OPTIMIZERS_KEY = "optimizer_states"

FIRST_BLOCK = f"{block_name(0)}."

# How torch names what a module adds to the state dict by `get_extra_state`.
EXTRA_STATE = "_extra_state"


def take_texts(content: dict[str, Any], key: str, wanted: str) -> Mapping[str, str] | None:
    """Remove an entry of texts by name from a checkpoint's content and return it, if it is there.

    Args:
        content: of the checkpoint.
        key: of the entry.
        wanted: what it holds, in words.

    Raises:
        InputError: it holds something else.
    """
    texts = content.pop(key, None)
    if texts is None:
        return None
    are_texts = isinstance(texts, Mapping) and all(isinstance(v, str) for v in texts.values())
    if not are_texts:
        raise wrong_entry(key, texts, wanted)
    return texts


def wrong_entry(key: str, value: Any, wanted: str) -> InputError:
    """Return the error of an entry that holds something else than it should."""
    return InputError(
        f"the entry {key!r} is {shown(value)}, not {wanted}. Hint: sffx.save_checkpoint writes it"
    )


def take_state(content: dict[str, Any]) -> Mapping[str, Any]:
    """Remove the state dict from a checkpoint's content and return it."""
    for key in (STATE_KEY, *OTHER_STATE_KEYS):
        if isinstance(content.get(key), Mapping):
            return _without_prefix(content.pop(key))
    # A file of `torch.save(net.state_dict(), path)` is the state dict itself.
    state = {}
    for name, value in list(content.items()):
        is_extra = isinstance(name, str) and name.endswith(EXTRA_STATE)
        if isinstance(value, Tensor) or is_extra:
            state[name] = content.pop(name)
    return _without_prefix(state)


def _without_prefix(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the weights by their names in the cut model, without the prefix of a wrapper.

    Lightning puts "net." before these names, and DistributedDataParallel "module.".

    Raises:
        InputError: something else than a name stands for a weight.
    """
    for name in state:
        if not isinstance(name, str):
            raise InputError(
                f"it holds {name!r} in the place of a weight's name. "
                "Hint: save net.state_dict(), or use sffx.save_checkpoint"
            )
    prefix = _prefix_of_wrapper(state)
    if not prefix:
        return state
    return {name.removeprefix(prefix): value for name, value in state.items()}


def _prefix_of_wrapper(names: Iterable[str]) -> str:
    """Return the text that a wrapper put before all names, "" if there was no wrapper."""
    for name in names:
        before, first_block, _ = name.partition(FIRST_BLOCK)
        if first_block:
            # A plain model may have a "block_0" somewhere; only a wrapper's prefix is everywhere.
            is_everywhere = all(each.startswith(before) for each in names)
            return before if is_everywhere else ""
    return ""


def take_optimizer(content: dict[str, Any], *, is_own: bool) -> dict[str, Any] | None:
    """Remove the state of the optimizer from a checkpoint's content and return it.

    Args:
        content: of the checkpoint.
        is_own: whether `save_checkpoint` wrote it. An entry with Lightning's name is the user's
            then.
    """
    optimizer = content.pop(OPTIMIZER_KEY, None)
    of_lightning = content.get(LIGHTNING_OPTIMIZERS_KEY)
    # Lightning keeps a list. With several optimizers there is no telling which one is meant.
    is_single = isinstance(of_lightning, Sequence) and len(of_lightning) == 1
    if optimizer is None and is_single and not is_own:
        optimizer = content.pop(LIGHTNING_OPTIMIZERS_KEY)[0]
    if optimizer is None:
        return None
    if not isinstance(optimizer, Mapping):
        raise InputError(
            f"the entry {OPTIMIZER_KEY!r} is a {type(optimizer).__name__}, not a state dict. "
            "Hint: save optimizer.state_dict()"
        )
    groups = optimizer.get("param_groups", [])
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        raise InputError(
            f"the entry {OPTIMIZER_KEY!r} has {groups!r} as its 'param_groups'. "
            "Hint: save optimizer.state_dict()"
        )
    return dict(optimizer)
