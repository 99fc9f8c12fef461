"""The generators of random numbers that a forward may draw from: Python's, NumPy's and torch's."""

from __future__ import annotations

import operator
import pickle
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from sffx.compiler.facts import facts
from sffx.compiler.walks import nodes_behind


@contextmanager
def generators_restored() -> Iterator[None]:
    """Leave the generators as they were."""
    python_state = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    try:
        with torch_restored():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def torch_restored() -> Iterator[None]:
    """Leave torch's generator on the CPU as it was."""
    generator = torch.random.default_generator
    state = generator.get_state()
    try:
        yield
    finally:
        generator.set_state(state)


def call_without_draws(call: Callable[[], Any]) -> Any:
    """Return what `call` returns, and refuse code that draws random numbers by itself.

    A traced operation may draw, since it draws again whenever the graph runs. A random number that
    other code draws would be frozen into the graph.

    Raises:
        RuntimeError: a generator has moved, or a stand-in for a random number went into an
            operation.
    """
    before = _states()
    try:
        value = call()
    except (TypeError, RuntimeError) as failure:
        # Operations that take numbers only refuse the stand-in, and name it by its class.
        if not re.search(rf"\b{DrawnNumber.__name__}\b", str(failure)):
            raise
        raise RuntimeError(DRAWS).with_traceback(failure.__traceback__) from failure
    if before != _states():
        raise RuntimeError(DRAWS)
    return value


def _states() -> tuple[Any, ...]:
    return (
        state_of_torch(),
        random.getstate(),
        pickle.dumps(np.random.get_state(legacy=False)),
    )


def state_of_torch() -> bytes:
    """Return the state of torch's generator on the CPU."""
    # As bytes, since tensors compare element by element.
    return torch.random.default_generator.get_state().numpy().tobytes()


class DrawnNumber:
    """Stands, during a trace, for a number that was drawn from [0, 1), as by `random.random()`.

    Some comparisons have one outcome: a layer that is dropped with probability 0 is never dropped.
    """

    # No float: C code such as `math.log` or `torch.tensor` reads the number of one without asking.

    # So a number of NumPy leaves the comparison to this class, in any order.
    __array_ufunc__ = None

    def __lt__(self, other: float) -> bool:
        return self._settled(other >= 1, other <= 0)

    def __ge__(self, other: float) -> bool:
        return not self < other

    def __le__(self, other: float) -> bool:
        # Exactly 0 is drawn once in 2**24 times or less, and so counts as never: `rand(1) > 0`
        # keeps each layer.
        return self._settled(other >= 1, other <= 0)

    def __gt__(self, other: float) -> bool:
        return not self <= other

    @staticmethod
    def _settled(is_always: bool, is_never: bool) -> bool:
        if is_always or is_never:
            return bool(is_always)
        raise RuntimeError(DRAWS)

    def refuse(self, *_: Any) -> Any:
        """Raise the error that a number which was drawn would be frozen."""
        raise RuntimeError(DRAWS)

    __eq__ = __ne__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = refuse
    __truediv__ = __rtruediv__ = __neg__ = __pow__ = __rpow__ = __int__ = __round__ = refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __bool__ = __float__ = refuse
    __floor__ = __ceil__ = __trunc__ = __hash__ = __abs__ = refuse


def is_drawn(node: fx.Node) -> bool:
    """Whether a node draws from [0, 1), or takes numbers out of what such a node has drawn."""
    if node.target in _TAKES_NUMBERS and node.all_input_nodes:
        return is_drawn(node.all_input_nodes[0])
    return is_draw(node)


def is_draw(node: fx.Node) -> bool:
    """Whether a node calls `torch.rand`."""
    return getattr(node.target, "__name__", "") == "rand"


def is_made_of_draws(node: fx.Node) -> bool:
    """Whether a tensor is computed from draws and sizes alone, and so depends on no data."""
    has_drawn = False
    for each in nodes_behind(node, _is_tensor):
        if not _is_tensor(each):
            continue
        if each.op in ("placeholder", "get_attr"):
            return False
        has_drawn = has_drawn or facts(each).cost.draws
    return has_drawn


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(facts(node).example, Tensor)


def outcome_of_draw(node: fx.Node) -> bool | None:
    """Return the one outcome of a comparison with what was drawn, None where there are two."""
    while node.target in _TAKES_NUMBERS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    if node.target not in _COMPARISONS or len(node.args) != 2:
        return None
    sides: list[Any] = []
    for side in node.args:
        sides.append(DrawnNumber() if isinstance(side, fx.Node) and is_drawn(side) else side)
    if not all(isinstance(side, (int, float, DrawnNumber)) for side in sides):
        return None
    try:
        return bool(getattr(operator, node.target.__name__)(*sides))
    except RuntimeError:
        return None


def settled_draws(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that draw for comparisons with one outcome, and those comparisons.

    In order, and without those whose values something else reads.
    """
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        is_settled = outcome_of_draw(node) is not None
        if (is_settled or is_drawn(node)) and found.issuperset(node.users):
            found.add(node)
    return [node for node in graph.nodes if node in found]


@fx.node.has_side_effect
def draw_where(is_met: Any, behind: Any, *args: Any, **kwargs: Any) -> None:
    """Draw by `torch.rand` as a forward does in one mode, which moves the generator.

    Args:
        is_met: whether the call is in this mode.
        behind: a value that is computed before the draw, so that draws keep their order.
        args: of `torch.rand`.
        kwargs: of `torch.rand`.
    """
    if isinstance(is_met, fx.Proxy):  # a tracer of the user may trace a net
        arguments = (is_met, behind, *args)
        is_met.tracer.create_proxy("call_function", draw_where, arguments, kwargs)
    elif is_met:
        torch.rand(*args, **kwargs)


OWN_GENERATOR = "it draws by a generator of its own, which a graph cannot hold"

SEEDED = (
    "it draws random numbers after it has set the seed of torch, as by torch.manual_seed(), which "
    "a graph cannot hold"
)

MOVED = (
    "it draws random numbers that do not depend on its input, as a distribution of numbers does, "
    "or it sets the state of torch's generator, which a graph cannot hold"
)

_TAKES_NUMBERS = (operator.getitem, "cpu", "detach", "view", "reshape", "squeeze")
_COMPARISONS = (operator.lt, operator.le, operator.gt, operator.ge)

DRAWS = (
    "it draws random numbers that do not depend on its input, which a graph would freeze "
    "(or another thread drew some)"
)
