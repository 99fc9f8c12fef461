"""Policies by name: where a model is cut, for `sffx.transform(model, policy)`.

A policy is a function `(analysis, options) -> Cuts`. Some policies have parameters. They are made
by a function here, and can be written as a string as well: `stages(4)` and "stages(4)",
`memory("2 GiB", batch_size=64)` and "memory(2 GiB, 64)".

A policy of your own takes `(analysis)` or `(analysis, options)`. It gets the options if it has two
parameters without a default, or one called `options`. It returns `Cuts`, or node names:

    def every_candidate(analysis):
        return analysis.candidates

    net = sffx.transform(model, every_candidate)

`analysis` is the analysed graph (`sffx.compiler.analyse.Analysis`): its `steps` in order, and
`candidates`, the names of the nodes after which a cut may lie. Where streams run side by side,
several values cross a cut. Its candidate is a tuple of all their names. `options`
(`sffx.blocks.Options`) are the goodness, the norm and the other arguments of `transform`.
"""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypeAlias

from torch import Tensor, nn

from sffx.compiler.cut_sets import Cut
from sffx.compiler.policies import Cuts, Policy, batchnorm, layer, module, residual, stages
from sffx.errors import InputError
from sffx.memory.budget import memory

__all__ = ["Cuts", "Policy", "batchnorm", "layer", "memory", "module", "residual", "stages"]

# What `transform` takes: a name, a function, or the names of the nodes to cut after; a tuple of
# names where several values cross a cut.
AnyPolicy: TypeAlias = str | Callable[..., Any] | Iterable[Cut]

POLICIES: dict[str, Policy] = {"residual": residual, "batchnorm": batchnorm, "layer": layer}
MAKERS: dict[str, Callable[..., Policy]] = {"module": module, "stages": stages, "memory": memory}
FORMS = (
    "'residual', 'batchnorm', 'layer', 'module', 'module(depth)', 'stages(n)', "
    "'memory(budget, batch_size)'"
)


def policy_named(policy: AnyPolicy) -> tuple[str, Callable[..., Any]]:
    """Return the name and the function of a policy.

    Args:
        policy: a name, a function, or the names of the nodes to cut after.

    Raises:
        InputError: there is no policy of this name, or the argument is something else.
    """
    if isinstance(policy, str):
        return policy, _parse(policy)
    for name, maker in MAKERS.items():
        if policy is maker:
            options = ", ".join(inspect.signature(maker).parameters)
            raise InputError(
                f"policy is the function {name} itself, which makes a policy from its options. "
                f"Hint: {name}({options}), or the same as a string"
            )
    # A module or a class can be called as well, but is most likely a mistake.
    if callable(policy) and not isinstance(policy, nn.Module | type):
        return getattr(policy, "__name__", type(policy).__name__), policy
    if not isinstance(policy, Iterable):
        raise InputError(
            f"policy is a {type(policy).__name__}. "
            f"Hint: pass a name ({FORMS}), a function, or a list of node names"
        )
    _require_no_input(policy)
    # An iterator could be read only once.
    names = tuple(policy)
    return "nodes", lambda analysis: names


def _require_no_input(policy: Iterable[Any]) -> None:
    """Raise an InputError for what looks like an input of the model, not like names of nodes."""
    is_input = isinstance(policy, (Tensor, Mapping))
    if isinstance(policy, (tuple, list)):
        is_input = any(isinstance(part, Tensor) for part in policy)
    if is_input:
        raise InputError(
            f"the second argument is a {type(policy).__name__}, but it is the policy. "
            "Hint: transform(model, policy, example_input), or example_input=x"
        )


def _parse(text: str) -> Policy:
    """Return the policy that a string such as "residual" or "stages(4)" names."""
    if text in POLICIES:
        return POLICIES[text]
    name, _, rest = text.partition("(")
    name = name.strip()
    rest = rest.rstrip()
    if name not in MAKERS or (rest and not rest.endswith(")")):
        _refuse(text, name)
    arguments: list[object] = []
    keywords: dict[str, object] = {}
    # No policy takes a list or a text with a comma.
    for part in rest.removesuffix(")").split(","):
        key, equals, value = part.partition("=")
        if equals:
            keywords[key.strip()] = _literal(value.strip())
        elif part.strip():
            arguments.append(_literal(part.strip()))
    try:
        return MAKERS[name](*arguments, **keywords)
    except TypeError as cause:
        raise InputError(f"policy {text!r}: {cause}. Hint: the policies are {FORMS}") from cause


def _refuse(text: str, name: str) -> NoReturn:
    near = difflib.get_close_matches(name, [*POLICIES, *MAKERS], n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(f"there is no policy {text!r}. Hint: {meant}the policies are {FORMS}")


def _literal(text: str) -> object:
    """Return the value of a Python literal such as 4 or '2 GiB'; other text as it is."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
