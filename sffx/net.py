"""The cut model: what it carries beside its graph, and how to tell it from others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY

from sffx.blocks import BlockPlan
from sffx.errors import InputError


@dataclass(frozen=True)
class Origin:
    """The model that a cut model was made from. It is wrapped so that it does not become a child module of the cut model.

    Attributes:
        model: a copy of the original, whose layers are those of the blocks.
    """

    model: nn.Module


class CutModel(fx.GraphModule):
    """A `GraphModule` that keeps its plan and its origin when it is pickled, and in copies of what was unpickled."""

    def __reduce__(self) -> Any:
        return _restored, super().__reduce__()


def _restored(function: Any, arguments: tuple[Any, ...]) -> fx.GraphModule:
    net = function(*arguments)
    return with_plan(net, net.plan, net.origin.model)


def with_plan(net: fx.GraphModule, blocks: BlockPlan, skeleton: nn.Module) -> fx.GraphModule:
    """Let the plan, and the model that `extract` fills, travel with the cut model through copies and pickles."""
    net = CutModel(net, net.graph, class_name=type(net).__name__)
    attributes = {"plan": blocks, "origin": Origin(skeleton)}
    net.meta[_USER_PRESERVED_ATTRIBUTES_KEY] = (
        attributes  # what fx carries over when a GraphModule is copied
    )
    for name, value in attributes.items():
        setattr(net, name, value)
    return net


def is_cut(model: nn.Module) -> bool:
    """Whether a model was cut by sffx."""
    return isinstance(getattr(model, "plan", None), BlockPlan)


def plan_of(net: nn.Module) -> BlockPlan:
    """Return the block plan that a cut model carries.

    Raises:
        InputError: the model was not cut by sffx.
    """
    found = getattr(net, "plan", None)
    if not isinstance(found, BlockPlan):
        raise InputError(
            f"net is a {type(net).__name__}, not a cut model. Hint: pass what sffx.transform returned"
        )
    return found
