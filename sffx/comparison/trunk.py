"""The trunk of a cut model: its blocks alone. It must compute what the model computes."""

from __future__ import annotations

import copy
import operator
from typing import Any

from torch import Tensor, fx, nn

from sffx.comparison.weights import state_of
from sffx.compiler.verify import twin
from sffx.net import Origin, cut_model, plan_of, set_modes
from sffx.parts import is_head, is_norm, is_trial, name_in_model
from sffx.runtime.stage import Values, placeholders_of
from sffx.tensors import computed_tensors


class Trunk(nn.Module):
    """A copy of the blocks of a cut model, without heads, norms and trials.

    Its outer detaches are left out as well, so that gradients flow as in the model. It shares the
    graphs of the cut model, and no tensor.

    Attributes:
        detaches: whether gradients stop between blocks after all, as they do in the cut model.
        plan: of the cut model.
        blocks: the copies of the blocks and of the classifier, by name.
    """

    def __init__(self, net: fx.GraphModule) -> None:
        super().__init__()
        self.detaches = False
        self.plan = plan_of(net)
        self._graph = net.graph
        self._placeholders = placeholders_of(net)
        twins = computed_tensors(net)
        self.blocks = nn.ModuleDict()
        for block in self.plan.all_blocks:
            part: Any = net.get_submodule(block.target)
            self.blocks[block.target] = twin(part, twins)
        # Not as a child: the layers of this copy are those of the blocks.
        self._origin = Origin(copy.deepcopy(cut_model(net).origin.model, twins))

    def train(self, mode: bool = True) -> Trunk:
        """Set the modes as the cut model does."""
        set_modes(self, self._origin.model, mode)
        return self

    def forward(self, inputs: dict[str, Any]) -> Any:
        """Return the logits, (B, J).

        Args:
            inputs: the values of the model's inputs by name.
        """
        values: Values = {node: inputs[name] for name, node in self._placeholders.items()}
        for node in self._graph.nodes:
            if node.op == "placeholder":
                continue
            target = str(node.target)
            if node.op == "call_module" and is_head(target):
                continue
            if node.op == "call_module" and target == self.plan.classifier.target:
                return self._call(node, values)
            values[node] = self._value(node, values)
        raise AssertionError("the cut model does not call its classifier")

    def state(self) -> dict[str, list[Tensor]]:
        """Return the parameters and buffers of the blocks by their names in the model."""
        state: dict[str, list[Tensor]] = {}
        for part in self.blocks.values():
            for name, tensor in state_of(part).items():
                state.setdefault(name_in_model(name), []).append(tensor)
        return state

    def modules_by_name(self) -> list[tuple[str, nn.Module]]:
        """Return the modules inside the blocks, with their names in the model."""
        found: list[tuple[str, nn.Module]] = []
        for part in self.blocks.values():
            for name, module in part.named_modules():
                if name:
                    found.append((name_in_model(name), module))
        return found

    def _value(self, node: fx.Node, values: Values) -> Any:
        is_cut = node.op == "call_method" and node.target == "detach" and not self.detaches
        target_name = str(node.target)
        is_left_out = node.op == "call_module" and (is_norm(target_name) or is_trial(target_name))
        if is_cut or is_left_out:
            return values[node.all_input_nodes[0]]
        if node.op == "call_module":
            return self._call(node, values)
        args, kwargs = _arguments(node, values)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.blocks)
        target: Any = node.target
        return target(*args, **kwargs)

    def _call(self, node: fx.Node, values: Values) -> Any:
        args, kwargs = _arguments(node, values)
        return self.blocks[str(node.target)](*args, **kwargs)


def _arguments(node: fx.Node, values: Values) -> tuple[Any, Any]:
    args = fx.node.map_arg(node.args, values.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
    return args, kwargs
