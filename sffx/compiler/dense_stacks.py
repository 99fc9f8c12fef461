"""Dense stacks: layers one after the other, each of which also goes straight to the end.

    for layer in self.layers:
        x = layer(x)
        outputs.append(x)
    return self.head(torch.cat(outputs, 1))

So it is in jumping-knowledge networks, hypercolumns and dense blocks. In a residual block only the
last layer goes straight to the sum, and parallel paths read no layer of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sffx.compiler.analyse import Analysis


def is_dense_stack(analysis: Analysis, names: Sequence[str], end: str) -> bool:
    """Return whether some nodes are a dense stack of at least two layers.

    Args:
        analysis: of the model.
        names: of the nodes.
        end: the last one of them.
    """
    flow = analysis.flow
    layers = [name for name in names if analysis.is_weighted(analysis.nodes[name])]
    layers = flow.in_order(filter(flow.leads_to_logits, layers))
    if len(layers) < 2 or end in layers:
        return False
    inside = set(names)
    others = set(layers)
    for layer, following in zip(layers, [*layers[1:], end], strict=True):
        # Up to the next layers, or to the end.
        reached = flow.behind(layer, inside - others)
        readers = {reader for name in (layer, *reached) for reader in flow.readers(name)}
        if end not in reached or following not in {*readers, end}:
            return False
    return True
