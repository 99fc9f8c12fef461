"""The values at a cut, from which a step can begin in the place of the model's input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from sffx.errors import InputError, SffxError, shown
from sffx.net import plan_of
from sffx.runtime.stage import Stage, Values, nodes_read_by, stages_of


class CutValues(dict[str, Tensor]):
    """What the blocks behind a cut read: tensors by the names of their nodes in the cut model.

    `sffx.cache_outputs` makes them, (B, ...) each; (B, views, ...) where the objective makes views.
    Collate functions and `pin_memory` keep the type.
    """

    def to(self, device: torch.device | str) -> CutValues:
        """Return the values on a device."""
        return CutValues({name: value.to(device) for name, value in self.items()})

    @property
    def samples(self) -> int:
        """The batch size, B."""
        return len(next(iter(self.values())))

    def views_in_rows(self) -> CutValues:
        """Return the values with the views behind one another, (views * B, ...)."""
        rows = {name: value.movedim(1, 0).flatten(0, 1) for name, value in self.items()}
        return CutValues(rows)


def nodes_at(net: fx.GraphModule, stage: Stage) -> list[fx.Node]:
    """Return the nodes of the outer graph whose values the stages behind a stage read."""
    later: list[fx.Node] = []
    for each in stages_of(net)[stage.index + 1 :]:
        later += each.nodes
    return nodes_read_by(later)


def last_frozen(net: fx.GraphModule, x: CutValues) -> Stage:
    """Return the stage behind which values were taken.

    Raises:
        InputError: they are of no cut of this net.
    """
    # The last one: values of earlier stages may cross its cut as well.
    found = None
    for stage in stages_of(net):
        if any(node.name in x for node in stage.nodes):
            found = stage
    if found is not None:
        names = [node.name for node in nodes_at(net, found)]
        if set(names) == set(x):
            return found
    raise InputError(
        f"x holds cached values {', '.join(map(repr, x)) or 'of nothing'}, which are at no cut of "
        "net. Hint: cache the outputs of this net by sffx.cache_outputs"
    )


@contextmanager
def explaining_cached_errors(net: fx.GraphModule, x: CutValues) -> Iterator[None]:
    """Explain an error of torch by cached values of another dtype than the model.

    They are no error by themselves: under autocast, values of half precision are as they should be.

    Raises:
        InputError: instead of torch's error.
    """
    try:
        yield
    except SffxError:
        raise
    except RuntimeError as error:
        floats = [each.dtype for each in net.parameters() if each.is_floating_point()]
        for name, value in x.items():
            if floats and value.is_floating_point() and value.dtype != floats[0]:
                raise InputError(
                    f"the cached {name} is of {value.dtype}, and the model of {floats[0]}. Torch "
                    f"says: {str(error).rstrip('.')}. Hint: cache the outputs of the model as it "
                    "is now, under autocast if it trains under autocast"
                ) from error
        raise


def node_values(net: fx.GraphModule, x: CutValues, stage: Stage) -> Values:
    """Return values behind a stage by their nodes."""
    return {node: x[node.name] for node in nodes_at(net, stage)}


def require_by_sample(net: fx.GraphModule, stage: Stage) -> None:
    """Raise an InputError if a value behind a stage cannot be parted by samples."""
    stages = stages_of(net)
    given = [value for each in stages[: stage.index + 1] for value in each.gives]
    read_later = {value.name for each in stages[stage.index + 1 :] for value in each.reads}
    for value in given:
        if value.name not in read_later:
            continue
        axis = value.batch
        if value.parts or axis is None or axis.axis != 0 or axis.rows != 1:
            raise InputError(
                f"{value.name}, which later blocks read after {stage.name}, has no batch axis that "
                "comes first and has one row a sample, so it cannot be cached. "
                "Hint: cache after another block"
            )


def require_feature_block(net: fx.GraphModule, name: Any) -> Stage:
    """Return the stage of a feature block; raise an InputError if there is none of this name."""
    features = stages_of(net)[: len(plan_of(net))]
    for stage in features:
        # An array would compare each of its elements.
        if isinstance(name, str) and stage.name == name:
            return stage
    names = ", ".join(stage.name for stage in features)
    raise InputError(
        f"there is no feature block {shown(name)}. Hint: the feature blocks are {names}"
    )
