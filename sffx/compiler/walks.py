"""Walks over the nodes from which a value is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, fx

from sffx.compiler.facts import facts


def nodes_behind(
    node: fx.Node, leads_on: Callable[[fx.Node], bool] | None = None
) -> Iterator[fx.Node]:
    """Yield a node and those that it is computed from, each once.

    Args:
        node: where the walk begins.
        leads_on: whether the walk goes on to what a node reads; None where it always does.
    """
    passed = {node}
    ahead = [node]
    while ahead:
        each = ahead.pop()
        yield each
        if leads_on is not None and not leads_on(each):
            continue
        for read in each.all_input_nodes:
            if read not in passed:
                passed.add(read)
                ahead.append(read)


def numbers_behind(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes from which a number or a truth value is computed, tensors left aside."""
    for each in nodes_behind(node, _is_number):
        if _is_number(each):
            yield each


def _is_number(node: fx.Node) -> bool:
    return not isinstance(facts(node).example, Tensor)
