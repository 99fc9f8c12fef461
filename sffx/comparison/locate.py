"""Find the first node of a cut model whose value the plain model does not compute.

The plain model tells which values are right: every result of every operation of torch in it. A
node of a block is right if its value is among them. So no list of names ties the two together,
and rewritten blocks are looked at like others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sffx.comparison.runs import relative_error, tolerance
from sffx.comparison.trunk import Trunk
from sffx.compiler.walks import nodes_behind
from sffx.parts import name_in_model


@dataclass(frozen=True)
class Place:
    """A node of a block, and the module of the original model that it belongs to."""

    block: str = ""
    node: str = ""
    module: str = ""


class RightValues(TorchDispatchMode):
    """Keeps a copy of every tensor that is computed while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[Any, list[Tensor]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self.add(result)
        return result

    def add(self, result: Any) -> None:
        """Keep the tensors in a result, as they are now."""
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested:
                self._values.setdefault(_kind(value), []).append(value.detach().clone())

    def hold(self, value: Any) -> bool:
        """Return whether each tensor in a value is among those that were computed."""
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor) and not self._hold_tensor(tensor):
                return False
        return True

    def _hold_tensor(self, tensor: Tensor) -> bool:
        bound = tolerance(tensor.dtype)
        candidates = self._values.get(_kind(tensor), [])
        return any(relative_error(tensor, each) <= bound for each in candidates)


def first_wrong_node(
    run_model: Callable[[], Any], run_trunk: Callable[[], Any], model: nn.Module, trunk: Trunk
) -> Place:
    """Return the first node of the trunk whose value is wrong, or that raises an error.

    Args:
        run_model: runs the plain model.
        run_trunk: runs the trunk.
        model: the plain model.
        trunk: of the cut model.
    """
    right = RightValues()
    right.add([*model.parameters(), *model.buffers()])
    with right:
        run_model()
    recorders = {}
    for name, part in trunk.blocks.items():
        assert isinstance(part, fx.GraphModule)
        recorders[name] = _Recorder(part, right)
        # The instance's forward, so that hooks of the block run as they do in the net.
        part.__dict__["forward"] = recorders[name].run
    try:
        run_trunk()
    finally:
        for part in trunk.blocks.values():
            part.__dict__.pop("forward", None)
    for name, recorder in recorders.items():
        node = recorder.first_wrong()
        if node is not None:
            return Place(name, node.name, module_of(node))
    # All values are the model's, but its logits are another one, or what follows is left out.
    name = trunk.plan.classifier.target
    last = recorders[name].last_node()
    return Place(name, last.name, module_of(last))


def first_broken_block(run_trunk: Callable[[], Any], trunk: Trunk) -> Place:
    """Return the first block that has no backward pass of its own.

    Args:
        run_trunk: runs the trunk, with gradients.
        trunk: of the cut model. It is changed, and of no other use afterwards.
    """
    outputs: dict[str, Any] = {}
    trunk.detaches = True
    for name, part in trunk.blocks.items():
        part.__dict__["forward"] = partial(_noted, outputs, name, part)
    run_trunk()
    for name, output in outputs.items():
        floats = [value for value in tree_leaves(output) if _has_gradient(value)]
        try:
            torch.autograd.backward([value.sum() for value in floats])
        except RuntimeError:
            return Place(name)
    return Place()


def _noted(outputs: dict[str, Any], name: str, part: nn.Module, *args: Any) -> Any:
    """Run a block, and keep its output under its name."""
    outputs[name] = type(part).forward(part, *args)
    return outputs[name]


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and value.is_floating_point()


def module_of(node: fx.Node) -> str:
    """Return the qualname of the innermost module of the original model that a node came from."""
    stack = node.meta.get("nn_module_stack") or {}
    if stack:
        return str(list(stack.values())[-1][0])
    return name_in_model(str(node.target)) if node.op == "call_module" else ""


class _Recorder(fx.Interpreter):
    """Runs a block node by node, and notes which values the plain model does not have."""

    def __init__(self, block: fx.GraphModule, right: RightValues) -> None:
        super().__init__(block)
        # The error of a node is wanted as it is, without fx's report behind it.
        self.extra_traceback = False
        self._right = right
        self._wrong: set[fx.Node] = set()
        self._running: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self._running = n
        value = super().run_node(n)
        if not self._right.hold(value):
            self._wrong.add(n)
        self._running = None
        return value

    def last_node(self) -> fx.Node:
        """Return the node whose value leaves the block."""
        output = next(iter(reversed(self.graph.nodes)))
        return output.all_input_nodes[0]

    def first_wrong(self) -> fx.Node | None:
        """Return the node that spoils what leaves the block; None if all of that is right.

        A rewrite may change a value inside the block, as long as what follows is right. So this
        goes back from the output, over wrong values only.
        """
        if self._running is not None:
            return self._running
        output = next(iter(reversed(self.graph.nodes)))
        spoiling = self._wrong & set(
            nodes_behind(output, lambda each: each is output or each in self._wrong)
        )
        return next((node for node in self.graph.nodes if node in spoiling), None)


def _kind(value: Tensor) -> Any:
    return tuple(value.shape), value.dtype
