"""The parts of a step in which streams run side by side, and how much of the model they hold.

The *parts* of a step are the modules that its module calls one after the other. A part that holds
more than a third of the model is divided into its own parts. So is a part, other than a unit, whose
module goes on behind the step, as the decoder of a U-Net: cuts behind the step divide it anyway. A
single layer before a larger part belongs to that part, and single layers at the start of the model
are its stem. Behind the last larger part, each single layer is a part.

A module that the model repeats, such as a residual block, is a *unit*. It is divided only if it has
many layers and holds more than half of the model. A module that holds several residual blocks is no
unit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.fx import Node

from sffx.compiler.facts import facts
from sffx.compiler.layers import scopes

if TYPE_CHECKING:
    from sffx.compiler.analyse import Analysis

LARGE = 1 / 3  # share of the parameters or of the kept activations
LARGE_UNIT = 1 / 2
FEWEST_LAYERS = 5
FEWEST_LAYERS_OF_UNIT = 8


class Sizes:
    """Shares of a model's parameters and of the activations that it keeps."""

    def __init__(self, analysis: Analysis) -> None:
        self._analysis = analysis
        self._all_parameters, self._all_activations = self._of(analysis.nodes)

    def share(self, names: Iterable[str]) -> float:
        """Return the larger of the two shares that some nodes hold."""
        parameters, activations = self._of(names)
        of_parameters = parameters / max(self._all_parameters, 1)
        of_activations = activations / max(self._all_activations, 1)
        return max(of_parameters, of_activations)

    def layers(self, names: Iterable[str]) -> int:
        """Return the number of weight matrices and kernels that some nodes apply.

        One that is applied several times counts each time.
        """
        return sum(self._applied(names).values())

    def distinct_layers(self, names: Iterable[str]) -> int:
        """Return the number of weight matrices and kernels that some nodes apply, each once."""
        return len(self._applied(names))

    def _applied(self, names: Iterable[str]) -> Counter[Any]:
        """Return how often some nodes apply each matrix.

        The key is the `id` of the matrix. A function that reads a matrix from another node, as
        `F.linear(x, weight)` does, has its name as the key.
        """
        applied: Counter[Any] = Counter()
        for name in names:
            node = self._analysis.nodes[name]
            if not self._analysis.is_weighted(node):
                continue
            parameters = self._analysis.parameters(node).values()
            matrices: list[Any] = [id(p) for p in parameters if p.ndim > 1]
            applied.update(matrices or [name])
        return applied

    def is_too_large(self, names: Sequence[str], scope: str) -> bool:
        """Return whether some nodes, all of one module, are to be divided.

        Args:
            names: of the nodes.
            scope: qualname of the module, "" for the model.
        """
        if scope and is_unit(self._analysis, names, scope):
            is_long = self.distinct_layers(names) >= FEWEST_LAYERS_OF_UNIT
            return is_long and self.share(names) > LARGE_UNIT
        return self.layers(names) >= FEWEST_LAYERS and self.share(names) > LARGE

    def is_too_long(self, names: Sequence[str], scope: str) -> bool:
        """Return whether some nodes are those of a row of modules that is to be divided."""
        is_row = issubclass(self._analysis.kind(scope), nn.Sequential)
        return is_row and self.share(names) > LARGE and self.layers(names) > 1

    def _of(self, names: Iterable[str]) -> tuple[int, int]:
        """Return the number of parameters, and the bytes kept for the backward pass."""
        # By identity and by storage, so that what several nodes share counts once.
        parameters: dict[int, int] = {}
        saved: dict[int, int] = {}
        for name in names:
            node = self._analysis.nodes[name]
            for parameter in self._analysis.parameters(node).values():
                parameters[id(parameter)] = parameter.numel()
            saved.update(facts(node).cost.saved)
        return sum(parameters.values()), sum(saved.values())


def is_unit(analysis: Analysis, names: Sequence[str], scope: str) -> bool:
    """Return whether the model has several modules of a module's class, which is no stack.

    A stack is a `Sequential`, or holds several modules with a sum of paths, as residual blocks.
    """
    kind = analysis.kind(scope)
    if issubclass(kind, nn.Sequential):
        return False
    same = [module for module in analysis.trace.root.modules() if type(module) is kind]
    blocks_inside = analysis.modules_with_sum(names) - {scope}
    return len(same) > 1 and len(blocks_inside) < 2


@dataclass
class Part:
    """What one module does in a step.

    Attributes:
        scope: qualname of the module.
        nodes: names of its nodes on paths, in order.
    """

    scope: str
    nodes: list[str] = field(default_factory=list)


def parts_of_module(
    analysis: Analysis, names: Sequence[str], scope: str, sizes: Sizes, later: set[str]
) -> list[Part]:
    """Return the parts with a weight that some nodes of a module make up.

    If the modules are stem, pool, layer1, layer2 and fc, these are layer1, layer2 and fc, or the
    parts of layer1 and layer2 if these are to be divided. The stem is a single layer, so it goes
    with layer1.

    Args:
        analysis: of the model.
        names: of the nodes, in order.
        scope: qualname of the module, "" for the model.
        sizes: of the model.
        later: qualnames of the modules that go on behind the step.
    """
    found = _children(analysis, names, scope)
    # The only part does the work of the module, as a backbone does beside a function at its end. So
    # the parts inside it are those of the module, unless one is no more than a layer. A unit that
    # the module adds to its input, `x + block(x)`, is not divided for that.
    if len(found) == 1 and not _is_whole(analysis, found[0], sizes):
        (only,) = found
        inside = parts_of_module(analysis, only.nodes, only.scope, sizes, later)
        have_several_layers = all(sizes.distinct_layers(part.nodes) > 1 for part in inside)
        if len(inside) > 1 and have_several_layers:
            return inside
    larger: list[Part] = []
    single_since: list[Part] = []  # the single layers since the last larger part
    for part in found:
        num_layers = sizes.layers(part.nodes)
        if num_layers == 0:
            continue  # an activation or a pool is a module, but no part
        divided = _divided(analysis, part, sizes, later)
        if len(divided) < 2:
            divided = [part]
        if num_layers > 1:
            larger += divided
            # The single layers before a larger part go with that one.
            single_since = []
        else:
            single_since += divided
    return larger + single_since


def _children(analysis: Analysis, names: Sequence[str], scope: str) -> list[Part]:
    """Return what each child of a module does; nodes of its own forward are in none.

    Args:
        analysis: of the model.
        names: of nodes of the module, in order.
        scope: qualname of the module, "" for the model.
    """
    children: dict[str, Part] = {}
    for name in names:
        inner = _inner_scope(analysis.nodes[name], scope)
        if inner:
            children.setdefault(inner, Part(inner)).nodes.append(name)
    return list(children.values())


def _is_whole(analysis: Analysis, part: Part, sizes: Sizes) -> bool:
    """Return whether a part is a unit that is not large enough to be divided."""
    if not is_unit(analysis, part.nodes, part.scope):
        return False
    return not sizes.is_too_large(part.nodes, part.scope)


def _divided(analysis: Analysis, part: Part, sizes: Sizes, later: set[str]) -> list[Part]:
    """Return the parts of a part that is to be divided; none if it is not."""
    is_large = sizes.is_too_large(part.nodes, part.scope)
    is_long = sizes.is_too_long(part.nodes, part.scope)
    goes_on = part.scope in later and not is_unit(analysis, part.nodes, part.scope)
    if is_large or is_long or goes_on:
        return parts_of_module(analysis, part.nodes, part.scope, sizes, later)
    return []


def _inner_scope(node: Node, scope: str) -> str:
    """Return the module in which a node lies in another module, "" if it is directly there."""
    stack = scopes(node)
    if scope in stack:
        stack = stack[stack.index(scope) + 1 :]
    return stack[0] if stack else ""
