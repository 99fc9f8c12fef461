"""Policies by name: where a model is cut, for `sffx.transform(model, policy)`.

A policy is a function from the analysed graph to the names of the nodes to cut after. Those with parameters are made by a function here,
and can be written as a string as well: `stages(4)` and "stages(4)", `memory("2 GiB", batch_size=64)` and "memory(2 GiB, 64)".
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Iterable

from sffx.compiler.policies import Policy, batchnorm, layer, module, residual, stages
from sffx.errors import InputError
from sffx.memory.budget import memory

__all__ = ["Policy", "batchnorm", "layer", "memory", "module", "residual", "stages"]

POLICIES: dict[str, Policy] = {"residual": residual, "batchnorm": batchnorm, "layer": layer}
MAKERS: dict[str, Callable[..., Policy]] = {"module": module, "stages": stages, "memory": memory}
_FORMS = (
    *map(repr, POLICIES),
    "'module'",
    "'module(depth)'",
    "'stages(n)'",
    "'memory(budget, batch_size)'",
)


def policy_named(policy: str | Policy | Iterable[str]) -> tuple[str, Policy]:
    """Return the name and the function of a policy given by name, as a function, or as the names of the nodes to cut after.

    Raises:
        InputError: there is no policy of this name, or it is neither a name, nor a callable, nor names.
    """
    if isinstance(policy, str):
        return policy, _written(policy)
    if callable(policy):
        return getattr(policy, "__name__", type(policy).__name__), policy
    if not isinstance(policy, Iterable):
        raise InputError(
            f"policy is a {type(policy).__name__}. Hint: pass a name ({', '.join(_FORMS)}), a function, or a list of node names"
        )
    names = list(policy)
    return "nodes", lambda _: names


def _written(text: str) -> Policy:
    """Return the policy that a string such as "residual" or "stages(4)" names."""
    name, _, rest = text.partition("(")
    name = name.strip()
    if text in POLICIES:
        return POLICIES[text]
    if name not in MAKERS or (rest and not rest.rstrip().endswith(")")):
        near = difflib.get_close_matches(name, [*POLICIES, *MAKERS], n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"there is no policy {text!r}. Hint: {meant}the policies are {', '.join(_FORMS)}"
        )
    arguments = [
        part.strip() for part in rest.rstrip().removesuffix(")").split(",") if part.strip()
    ]
    keywords = {
        key.strip(): _value(value)
        for key, equals, value in (part.partition("=") for part in arguments)
        if equals
    }
    try:
        return MAKERS[name](*[_value(part) for part in arguments if "=" not in part], **keywords)
    except TypeError as cause:
        raise InputError(
            f"policy {text!r}: {cause}. Hint: the policies are {', '.join(_FORMS)}"
        ) from cause


def _value(text: str) -> object:
    """Read a Python literal, such as 4 or '2 GiB'; what is none stands for itself."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text.strip()
