"""The cut model of a checkpoint: a whole model that was saved, or weights that are loaded into one that is cut again.

Weights come as `torch.save(net.state_dict(), file)` writes them, or in a checkpoint that also says where and how the model was cut: of
Lightning with `sffx.lightning.SFFModule`, or of a script that saves `net.plan.record()`. What the weights alone tell, the heads and the
number of classes, is read off them.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from sffx.api import plan, transform
from sffx.cli.models import as_script
from sffx.errors import InputError, in_brief
from sffx.export.explain import first_line
from sffx.keys import CUT_KEY
from sffx.learning.heads import REGIONS
from sffx.net import plan_of

# Where training scripts put the weights in a checkpoint of their own, Lightning first.
STATE_KEYS = ("state_dict", "model_state_dict", "model", "net")
# How torch says that a file is none of its own, whatever it holds.
NO_PICKLE = ("Unsupported operand", "invalid load key")
BLOCK = re.compile(r"^(.*?)(?:block_\d+|head_\d+|classifier)\.")


@dataclass(frozen=True)
class Cut:
    """How a model was cut, as far as it is known; a policy of node names cuts where it was cut, whatever chose the places.

    Attributes:
        policy: a name, or the names of the nodes to cut after.
        example: a tensor, a tuple or a mapping of them; None infers one.
        norm: "layer" or "none".
        heads: the other options of `transform` that `Heads` has; None where only the weights tell them.
        num_classes: J, None where only the weights tell it.
        name: of the policy that chose the places, "" where it is `policy`.
    """

    policy: str | Sequence[str] = "residual"
    example: Any = None
    norm: str = "layer"
    heads: Mapping[str, Any] | None = None
    num_classes: int | None = None
    name: str = ""


def recorded(checkpoint: Any) -> Cut | None:
    """Return the cut that a checkpoint tells of, None where it tells of none.

    Raises:
        InputError: what it tells cannot be understood.
    """
    told = checkpoint.get(CUT_KEY) if isinstance(checkpoint, Mapping) else None
    if told is None:
        return None
    try:
        inputs = {
            name: torch.zeros(1, *each["shape"], dtype=getattr(torch, each["dtype"]))
            for name, each in told["inputs"].items()
        }
        heads = (
            {name: told[name] for name in ("goodness", "kernel_size")}
            if "goodness" in told
            else None
        )
        return Cut(
            tuple(told["after"]),
            inputs,
            told["norm"],
            heads,
            told.get("num_classes"),
            told.get("policy", ""),
        )
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        problem = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(
            f"the checkpoint's {CUT_KEY!r} cannot be understood ({problem}). Hint: save net.plan.record() there"
        ) from error


def load_checkpoint(path: Path, *, trust: bool) -> Any:
    """Return what a file of `torch.save` holds, on the CPU.

    Args:
        path: of the file.
        trust: whether it may hold whole Python objects. Loading these runs code that lies in the file.

    Raises:
        InputError: there is no such file, it is no checkpoint, or it holds objects and is not trusted.
    """
    if path.is_dir():
        raise InputError(f"{str(path)!r} is a folder. Hint: name the file in it")
    if not path.is_file():
        raise InputError(f"there is no file {str(path)!r}")
    try:
        with as_script(None) if trust else nullcontext():
            return torch.load(path, map_location="cpu", weights_only=not trust)
    except ModuleNotFoundError as error:
        hint = "Hint: run the command where the code of the model lies, or install it"
        raise InputError(f"{str(path)!r} cannot be loaded: {first_line(error)}. {hint}") from error
    except EOFError as error:
        raise InputError(
            f"{str(path)!r} is no checkpoint of torch: it is empty, or ends too early"
        ) from error
    except pickle.UnpicklingError as error:
        if trust or any(sign in str(error) for sign in NO_PICKLE):
            raise InputError(f"{str(path)!r} is no checkpoint of torch") from error
        raise InputError(
            f"{str(path)!r} holds Python objects, not weights alone, and loading it would run code that lies in it. "
            "Hint: --trust loads it nevertheless, if you know where it comes from; or save net.state_dict()"
        ) from error
    except Exception as error:
        problem = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(
            f"{str(path)!r} cannot be loaded: {problem}. Hint: is the file whole, and what torch.save wrote?"
        ) from error


def weights_of(checkpoint: Any) -> dict[str, Tensor]:
    """Return the weights of a cut model by the names that it has for them.

    Raises:
        InputError: there are none.
    """
    if not isinstance(checkpoint, Mapping):
        raise InputError(
            f"the checkpoint is a {type(checkpoint).__name__}, not weights by name. Hint: save net.state_dict()"
        )
    found = next(
        (checkpoint[key] for key in STATE_KEYS if isinstance(checkpoint.get(key), Mapping)),
        checkpoint,
    )
    state = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    prefixes = [match[1] for match in map(BLOCK.match, state) if match]
    if not any(name.startswith(f"{prefix}block_0.") for prefix in prefixes[:1] for name in state):
        names = ", ".join(map(str, list(found)[:3]))
        hint = "Hint: save net.state_dict() of what sffx.transform returned, alone or under 'net'"
        raise InputError(f"the checkpoint holds no weights of a cut model, but {names}, ... {hint}")
    return {name.removeprefix(prefixes[0]): value for name, value in state.items()}


def classes_of(state: Mapping[str, Tensor]) -> int | None:
    """Return the number of classes: that of the heads, or, as those of CwC have no weights, the width of the classifier's last layer."""
    last = [
        value for name, value in state.items() if name.startswith("classifier.") and value.ndim > 0
    ]
    width = state.get("head_0.weight", last[-1] if last else None)
    return len(width) if width is not None else None


def filled_net(model: nn.Module, state: Mapping[str, Tensor], cut: Cut) -> fx.GraphModule:
    """Cut a model as a checkpoint's was, and fill it.

    Args:
        model: the plain one, as it was before it was cut.
        state: the cut model's weights.
        cut: how it was cut.

    Raises:
        InputError: the weights do not fit, or the input cannot be inferred.
        SffxError: the model cannot be cut.
    """
    net = transform(model, cut.policy, cut.example, norm=cut.norm, **heads_of(state, model, cut))
    try:
        net.load_state_dict(dict(state))
    except RuntimeError as error:
        wrong = in_brief(" ".join(str(error).splitlines()[1:2]).strip(" \t.").split(", "), 3)
        hint = "Hint: model, policy, input and classes must be those of the training"
        raise InputError(
            f"the weights do not fit {type(model).__name__}, cut by {cut.policy!r}: {wrong}. {hint}"
        ) from error
    return net


def cut_model(checkpoint: nn.Module) -> fx.GraphModule:
    """Return a whole model that was saved.

    Raises:
        InputError: it is not a cut one.
    """
    plan_of(checkpoint)
    assert isinstance(checkpoint, fx.GraphModule)  # what carries a plan is one
    return checkpoint


def heads_of(state: Mapping[str, Tensor], model: nn.Module, cut: Cut) -> Mapping[str, Any]:
    """Return the options of the heads, as they were recorded or as their weights show them; those of a cosine goodness have no bias."""
    if cut.heads is not None:
        return cut.heads
    hidden = [
        value for name, value in state.items() if re.fullmatch(r"head_\d+\.hidden\.weight", name)
    ]
    if hidden:
        regions = _regions(hidden, model, cut)
        return {
            "goodness": f"mlp({len(hidden[0])})"
            if regions == REGIONS
            else f"mlp({len(hidden[0])}, {regions})"
        }
    weights = {
        name: value for name, value in state.items() if re.fullmatch(r"head_\d+\.weight", name)
    }
    if not weights:
        return {"goodness": "cwc"}
    if "head_0.bias" not in state:
        return {"goodness": f"cosine({_regions(weights.values(), model, cut)})"}
    kernels = [value.shape[-1] for value in weights.values() if value.ndim > 2]
    return {"kernel_size": max(kernels, default=1)}


def _regions(weights: Iterable[Tensor], model: nn.Module, cut: Cut) -> int:
    """Return the number of regions along each axis of space, from the weights of each head, (units or classes, features)."""
    pairs = zip(plan(model, cut.policy, cut.example), weights, strict=False)
    found = [
        round((w.shape[1] / b.channels) ** (1 / (len(b.shape) - 1)))
        for b, w in pairs
        if len(b.shape) > 2
    ]
    return max(1, *found) if found else REGIONS
