"""What a stage runs, as a module and its tensors apart from each other.

Blocks of the same structure have the same module up to the tensors. So code that was compiled for
one of them serves all.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sffx.kernels.recompute import is_plain
from sffx.runtime.stage import Stage, Values, nodes_read_by
from sffx.tensors import OF_EVERY_MODULE, differ


class Skeleton:
    """The module of a stage, whose tensors are passed to it in a call.

    Attributes:
        module: the nodes of a stage as a graph of its own, whose modules have names without the
            stage's index. It returns the scores and the values that later stages read.
        reads: the nodes of the outer graph whose values it takes.
        keeps: the nodes whose values it returns behind the scores.
        task: of the model.
    """

    def __init__(self, stage: Stage) -> None:
        nodes = stage.scoring
        self._stage = stage
        self.task = stage.task
        self.reads = nodes_read_by(nodes)
        self.keeps = _read_outside(nodes)
        self.module = _module_of(stage, nodes, self.reads, self.keeps)
        self._layers = list(self.module.modules())
        self._structure = _structure_of(self.module)
        # As they are before the first step. A setting that changes later is not in compiled code.
        self._attributes = [_attributes_of(layer) for layer in self._layers]

    def why_not(self) -> str:
        """Return why the stage cannot be compiled now, "" if it can."""
        # The block is written out, so hooks on the block itself would not run either.
        for layer in (*self._stage.block.modules(), *self._layers):
            if not is_plain(layer):
                return f"a {type(layer).__name__} in it has hooks or a forward of its own"
        for parameter in self.module.parameters():
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                return "a parameter in it has hooks"
        return self._why_changed()

    def _why_changed(self) -> str:
        """Return which attributes of a layer have changed since the first step, "" if none has."""
        for layer, before in zip(self._layers, self._attributes, strict=True):
            now = _attributes_of(layer)
            # An attribute may have been added or removed since.
            names = {**before, **now}
            changed = [name for name in names if differ(before.get(name), now.get(name))]
            if changed:
                return (
                    f"{', '.join(changed)} of a {type(layer).__name__} in it changed after the "
                    "first step. Hint: if its forward did not change it, sffx.compile(net) again"
                )
        return ""

    def structure(self) -> Any:
        """Return a key that two stages have in common if they can run the same compiled code.

        The mode of a layer, and whether a parameter learns, may change between steps.
        """
        modes = tuple(layer.training for layer in self._layers)
        learning = tuple(parameter.requires_grad for parameter in self.module.parameters())
        return self._structure, modes, learning

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters and buffers by name."""
        parameters = dict(self.module.named_parameters())
        buffers = dict(self.module.named_buffers())
        return {**parameters, **buffers}

    def inputs(self, values: Values) -> tuple[Any, ...]:
        """Return the values that the stage reads."""
        return tuple(values[node] for node in self.reads)

    def keep(self, values: Values, kept: Sequence[Any]) -> None:
        """Add what the stage computed to the values, and remove what no later stage reads."""
        values.update(zip(self.keeps, kept, strict=True))
        self._stage.forget_read(values)


def _read_outside(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Return the nodes of a stage whose values later stages read; the last node is the scores."""
    inside = set(nodes)
    kept = []
    for node in nodes[:-1]:
        if any(user not in inside for user in node.users):
            kept.append(node)
    return kept


def _module_of(
    stage: Stage, nodes: Sequence[fx.Node], reads: Sequence[fx.Node], keeps: Sequence[fx.Node]
) -> fx.GraphModule:
    """Return the nodes of a stage as a module that returns its scores and what it keeps.

    The block is written out. Layers and values are numbered, so that two blocks of the same
    structure have the same code.
    """
    writer = _Writer()
    # What stands in the new graph for each node of the outer one.
    values: dict[fx.Node, Any] = {}
    for i, node in enumerate(reads):
        values[node] = writer.graph.placeholder(f"input_{i}")
    for node in nodes:
        if node.op == "call_module" and str(node.target) == stage.name:
            inner: Any = stage.block
            arguments = fx.node.map_arg(list(node.args), values.__getitem__)
            values[node] = writer.write_out(inner, arguments)
        else:
            values[node] = writer.write(node, stage.root, values)
    scores = nodes[-1]
    returned = [scores, *keeps]
    writer.graph.output(tuple(values[node] for node in returned))
    writer.graph.lint()
    return fx.GraphModule(writer.root, writer.graph)


class _Writer:
    """Writes a graph in which layers, tensors and values are numbered.

    Attributes:
        graph: so far.
        root: holds the layers and tensors.
    """

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.root = nn.Module()
        self._names: dict[int, str] = {}

    def write_out(self, module: fx.GraphModule, arguments: Any) -> Any:
        """Write the nodes of a module in the place of a call, and return what it returns.

        Args:
            module: to call.
            arguments: the nodes of what it reads, in order.
        """
        values: dict[fx.Node, Any] = {}
        # The placeholders of a graph stand in the order of the arguments.
        ahead = iter(arguments)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(ahead)
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], values.__getitem__)
            else:
                values[node] = self.write(node, module, values)
        raise AssertionError("a graph has an output")

    def write(self, node: fx.Node, owner: nn.Module, values: dict[fx.Node, Any]) -> fx.Node:
        """Write a node.

        Args:
            node: of another graph.
            owner: has the layers and tensors that the node names.
            values: what stands for the nodes that it reads.
        """
        args: Any = fx.node.map_arg(node.args, values.__getitem__)
        kwargs: Any = fx.node.map_arg(node.kwargs, values.__getitem__)
        target: Any = node.target
        if node.op == "call_module":
            target = self._name_of(owner.get_submodule(target))
        elif node.op == "get_attr":
            target = self._name_of(operator.attrgetter(target)(owner))
        picks = node.op == "call_function" and target is operator.getitem
        if picks and isinstance(args[0], tuple):
            # It picks one of the values that a block returns. That block was written out, so the
            # tuple holds nodes, and nothing is left to compute.
            returned, index = args
            return returned[index]
        name = f"value_{len(self.graph.nodes)}"
        return self.graph.create_node(node.op, target, args, kwargs, name=name)

    def _name_of(self, part: Any) -> str:
        """Return the name of a layer or tensor in the root, which holds it from now on."""
        known = self._names.get(id(part))
        if known is not None:
            return known
        name = f"part_{len(self._names)}"
        self._names[id(part)] = name
        if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
            self.root.register_buffer(name, part)
        else:
            setattr(self.root, name, part)
        return name


def _structure_of(module: fx.GraphModule) -> Any:
    """Return a key that is equal only for modules with the same code, up to their tensors."""
    parts: list[Any] = []
    # The code of the graph itself is among the settings of its module.
    for name, layer in module.named_modules():
        parts.append((name, type(layer).__qualname__, _settings_of(layer)))
    for node in module.graph.nodes:
        if callable(node.target):
            # Two functions may have the same name.
            parts.append(node.target)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        parts.append((name, tensor.shape, tensor.dtype, tensor.device, tensor.stride()))
    return tuple(parts)


def _settings_of(layer: nn.Module) -> Any:
    """Return the settings of a layer as a key: equal only where its forward does the same."""
    if isinstance(layer, fx.GraphModule):
        return layer.code
    is_known = type(layer).__module__.startswith(("torch.nn.", "sffx."))
    if not is_known:
        # Nobody knows what its forward looks at.
        return id(layer)
    settings = []
    for name, value in _attributes_of(layer).items():
        is_simple = isinstance(value, (bool, int, float, str, tuple, torch.dtype, type(None)))
        # Two other values may be equal and be written to later, so each stands for itself.
        settings.append((name, value if is_simple else id(value)))
    return tuple(settings)


def _attributes_of(layer: nn.Module) -> dict[str, Any]:
    """Return the attributes that a layer has besides its tensors, modules and hooks."""
    attributes: dict[str, Any] = {}
    # The mode is an attribute of every module, so it is none of these. `structure` has it.
    for name, value in sorted(vars(layer).items()):
        if name not in OF_EVERY_MODULE and not name.startswith("_"):
            attributes[name] = value
    return attributes
