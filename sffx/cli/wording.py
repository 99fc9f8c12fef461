"""The messages of the library in the words of a command line.

A message of the library names arguments of its functions. Someone who typed a command has options
in their place: not `example_input=torch.randn(1, ...)`, but `--input 1,3,224,224`.
Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from sffx.cli.options import TASK_NAMES

# A message with this in it shows the user's own code, whose words stay.
OWN_ERROR = "raised an error of its own:\n"


def _task_option(found: re.Match[str]) -> str:
    name = TASK_NAMES.get(found[1], found[1])
    label = re.search(r"ignore_index=(\d+)", found[2])
    return f"--task '{name}({label[1]})'" if label else f"--task {name}"


def _bare(argument: str) -> str:
    """Return a pattern for the name of an argument, but not for files such as "class_names.txt"."""
    return rf"(?<![\w./\\-]){argument}(?![\w/\\-]|\.\w)"


# In this order: the first ones hold what later ones would take apart.
_REPLACEMENTS: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"(?:pass )?example_input=torch\.\w+\([^)]*\)", "--input 1,3,224,224"),
    (
        r"(?:pass )?example_input=\(\.\.\., \.\.\.\) or example_input=\{'name': \.\.\.\}",
        "--input NAME=1,3,224,224 for each of them, with :int behind the sizes of integers",
    ),
    (
        r"a tensor, a tuple of positional arguments, or a dict of keyword arguments",
        "--input for each of them, by name as NAME=1,3,224,224",
    ),
    (r"sffx\.transform\(model, example_input=x\)", "--input"),
    (r"(?:pass )?(?:task=)?sffx\.tasks\.(\w+)\(([^)]*)\)", _task_option),
    (r"pass another task of sffx\.tasks", "--task names another"),
    (r"policy=\[\.\.\.\] takes the names of nodes", "--policy chooses the cuts"),
    (r"\b(policy|goodness|norm|readout|objective)='([\w]+)'", r"--\1 \2"),
    (r"\b(policy|goodness|norm|readout|objective)='([^']+)'", r"--\1 '\2'"),
    (r"\bkernel_size=(\d+)", r"--kernel-size \1"),
    (r"pass num_classes\b", "--classes N"),
    (r"\bnum_classes=(\d+)", r"--classes \1"),
    (_bare("num_classes"), "--classes"),
    (_bare("example_input"), "--input"),
    (_bare("kernel_size"), "--kernel-size"),
    (_bare("class_names"), "--class-names"),
    (_bare("dynamic_size"), "--dynamic-size"),
    (r"load_checkpoint\(path, trust=True\), sffx-export --trust", "--trust"),
    (
        r", or pass a callable (\([^)]*\)) -> ([\w.| ]+)",
        r", or file.py:NAME of a callable \1 -> \2",
    ),
)


def in_options(message: str) -> str:
    """Return a message of the library, with the options of a command for its arguments."""
    if OWN_ERROR in message:
        return message
    for pattern, option in _REPLACEMENTS:
        message = re.sub(pattern, option, message)
    return message
