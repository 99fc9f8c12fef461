"""The names of the parts of a cut model. No other module spells them.

A cut model has, for block 3, the children `block_3`, `head_3` and `norm_3`; after the last block
come `classifier` and `readout`. Where several values cross the cut after the block, each has a
norm: `norm_3`, `norm_3_1`, ... With an objective that changes the inputs at prediction, input 0
goes through `trial_0`, and what the classifier reads through `choice_0`, `choice_1`, ...
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import fx, nn

CLASSIFIER = "classifier"
READOUT = "readout"

_BLOCK = "block_"
_HEAD = "head_"
_NORM = "norm_"
_DETACHED = "detached_"
_TRIAL = "trial_"
_CHOICE = "choice_"

# From so many blocks in a row on, a list of blocks names the first and the last one.
SHORTEST_ROW = 5

# A block is a graph module, whose own attributes have these names.
_TAKEN = set(dir(fx.GraphModule(nn.Module(), fx.Graph()))) - set(dir(nn.Module()))


def name_in_block(qualname: str) -> str:
    """Return the name that a module or tensor of the model has in a block.

    It is the same, unless a graph module uses the name itself: `graph` becomes `graph_`. So that
    no two names become one, `graph_` becomes `graph__`, and so on.
    """
    first, dot, rest = qualname.partition(".")
    is_taken = first in _TAKEN or first.rstrip("_") in _TAKEN
    mark = "_" if is_taken else ""
    return f"{first}{mark}{dot}{rest}"


def name_in_model(qualname: str) -> str:
    """Return the name that a module or tensor of a block has in the model."""
    first, dot, rest = qualname.partition(".")
    original = first.removesuffix("_")
    # A name that ends in "_" may also be the model's own, as `conv_` is.
    was_marked = name_in_block(original) == first
    return f"{original}{dot}{rest}" if was_marked else qualname


def block_name(index: int) -> str:
    """Return the name of a feature block."""
    return f"{_BLOCK}{index}"


def head_name(index: int) -> str:
    """Return the name of the head of a feature block."""
    return f"{_HEAD}{index}"


def norm_name(index: int, value: int = 0) -> str:
    """Return the name of the norm behind a feature block.

    Args:
        index: of the block.
        value: index of the output that it normalises; 0 for the main one.
    """
    return f"{_NORM}{_output_number(index, value)}"


def detached_name(index: int, value: int = 0) -> str:
    """Return the name of an output of a feature block behind the detach, before its norm."""
    return f"{_DETACHED}{_output_number(index, value)}"


def _output_number(index: int, value: int) -> str:
    return f"{index}_{value}" if value else f"{index}"


def trial_name(index: int) -> str:
    """Return the name of the module that an input goes through before the first block."""
    return f"{_TRIAL}{index}"


def choice_name(index: int) -> str:
    """Return the name of the module that a value goes through before the classifier."""
    return f"{_CHOICE}{index}"


def goodness_name(index: int) -> str:
    """Return the name of the value that the head of a feature block computes."""
    return f"goodness_{index}"


def is_block(name: str) -> bool:
    """Return whether a name is that of a feature block."""
    return re.fullmatch(rf"{_BLOCK}\d+", name) is not None


def index_of(block: str) -> int:
    """Return the index of a feature block, given its name."""
    return int(block.removeprefix(_BLOCK))


def listed_blocks(targets: Sequence[str]) -> str:
    """Return the names of blocks, those in a row in brief: "block_0 to block_12"."""
    rows: list[list[str]] = []
    for target in targets:
        if rows and index_of(target) == index_of(rows[-1][-1]) + 1:
            rows[-1].append(target)
        else:
            rows.append([target])
    words: list[str] = []
    for row in rows:
        if len(row) < SHORTEST_ROW:
            words += row
        else:
            words.append(f"{row[0]} to {row[-1]}")
    return ", ".join(words)


def is_head(name: str) -> bool:
    """Return whether a name is that of a head."""
    return re.fullmatch(rf"{_HEAD}\d+", name) is not None


def is_norm(name: str) -> bool:
    """Return whether a name is that of a norm."""
    return re.fullmatch(rf"{_NORM}\d+(_\d+)?", name) is not None


def is_trial(name: str) -> bool:
    """Return whether a name is that of a module which changes rows at prediction only."""
    return re.fullmatch(rf"(?:{_TRIAL}|{_CHOICE})\d+", name) is not None


def owner_of(qualname: str) -> str:
    """Return the block or classifier that learns a parameter, given the parameter's name.

    A head learns with its block: "head_3.weight" belongs to "block_3".
    """
    part = qualname.partition(".")[0]
    if is_head(part):
        return part.replace(_HEAD, _BLOCK)
    return part
