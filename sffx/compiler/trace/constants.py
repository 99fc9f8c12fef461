"""Tensors that a forward makes from nothing that is traced, as `torch.zeros(8)`: constants.

fx keeps them on the model. A forward may write on one in place. It makes a fresh one in each call,
so the graph clones it first. From the write on, all that the forward does with it must be part of
the graph, though fx sees no proxy in it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sffx.compiler.facts import (
    Facts,
    change_facts,
    facts,
    module_stack,
    set_facts,
    storages_written,
)
from sffx.tensors import storage_key

if TYPE_CHECKING:
    from sffx.compiler.trace.tracer import GuidedTracer


# What the tensors are called in the model. fx calls them `_tensor_constant0`, as those of a model
# that fx has traced before are called, too.
ADDED_CONSTANT = "_sffx_constant"


@dataclass(frozen=True)
class _Read:
    """One reading of a tensor that no trace has made.

    Attributes:
        value: the tensor.
        version: of it at that time, which torch counts up with each write.
        node: reads it in the graph.
        is_constant: whether the forward has made it, and no module keeps it.
    """

    value: Tensor
    version: int
    node: fx.Node
    is_constant: bool


class Constants(TorchFunctionMode):
    """The constants of one trace. As a mode, it traces what is done with the written ones.

    Attributes:
        tracer: creates the nodes.
        names: of the constants, as fx calls them.
    """

    def __init__(self, tracer: GuidedTracer) -> None:
        super().__init__()
        self.tracer = tracer
        self.names: dict[str, None] = {}
        self._read: list[_Read] = []
        self._written: set[int] = set()  # keys of storages
        self._is_entered = False

    def node(self, value: Tensor, make: Callable[[Tensor], Any]) -> fx.Node:
        """Return a node that reads a tensor which the forward uses and no trace has made.

        Args:
            value: the tensor.
            make: makes a node, and keeps a tensor on the model where it is none of its own.
        """
        with torch._C.DisableTorchFunction():  # what is asked here is no part of the forward
            return self._node(value, make)

    def _node(self, value: Tensor, make: Callable[[Tensor], Any]) -> fx.Node:
        """Return the node that has read a tensor before, if it is still the same; else a new one.

        Raises:
            RuntimeError: other nodes write on the memory of the tensor.
        """
        is_written = storage_key(value) in self._written
        for read in self._read:
            # The node of a written constant has the writes as well, since the graph makes them.
            has_values = is_written or read.version == value._version
            if read.value is value and read.is_constant and has_values:
                return read.node
        if is_written:
            raise RuntimeError("it writes a tensor in place that it made, and reads a view of it")
        is_constant = not _is_kept(self.tracer.root, value)
        # A copy, since the forward may write other values before the trace ends.
        node = make(value.clone() if is_constant else value)
        name = str(node.target)
        # A tensor in a list of the model has no name there, and gets one from fx as well.
        if "." not in name and not hasattr(self.tracer.original, name):
            self.names[name] = None
        self._read.append(_Read(value, value._version, node, is_constant))
        return node

    def note_writes(self, node: fx.Node) -> None:
        """From now on, trace what is done with the constants that a node writes."""
        keys = storages_written([node])
        if not keys:
            return
        with torch._C.DisableTorchFunction():
            for read in self._read:
                if storage_key(facts(read.node).example) in keys:
                    self._note_written(read)

    def _note_written(self, written: _Read) -> None:
        key = storage_key(written.value)
        nodes = {read.node for read in self._read if storage_key(read.value) == key}
        if len(nodes) > 1:
            raise RuntimeError("it writes a tensor in place that it made, and reads a view of it")
        buffers = self.tracer.root.buffers()
        if not written.is_constant or any(each is written.value for each in buffers):
            raise RuntimeError("it writes a tensor in place that is no buffer of a module")
        self._written.add(key)
        if not self._is_entered:
            self._is_entered = True
            self.__enter__()

    def close(self) -> None:
        """End the mode, if it was needed."""
        if self._is_entered:
            self._is_entered = False
            self.__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.tracer.is_running:
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, self._traced, (args, kwargs))
        # For an attribute of a tensor, as `x.T`, torch calls its getter, which takes no proxy.
        is_getter = getattr(func, "__name__", "") == "__get__"
        if is_getter and isinstance(args[0], fx.Proxy):
            return getattr(args[0], func.__self__.__name__)
        return func(*args, **kwargs)

    def _traced(self, value: Tensor) -> Any:
        if isinstance(value, fx.Proxy) or type(value) is not Tensor:
            return value
        with torch._C.DisableTorchFunction():
            if storage_key(value) not in self._written:
                return value
        return self.tracer.proxy(self.tracer.create_arg(value))


def place_constants(graph: fx.Graph, names: Collection[str]) -> None:
    """Clone each constant that the graph writes, and let each reader of another read its own.

    So a constant that several blocks read is no value that crosses a cut.

    Args:
        graph: of the model.
        names: of the constants.
    """
    written = storages_written(graph.nodes)
    for node in list(graph.nodes):
        if node.op != "get_attr" or node.target not in names:
            continue
        if storage_key(facts(node).example) in written:
            _clone(node)
        else:
            _repeat(node)


def _clone(node: fx.Node) -> None:
    graph = node.graph
    with graph.inserting_after(node):
        clone = graph.call_method("clone", (node,))
    clone.meta = {"nn_module_stack": module_stack(node)}
    value = facts(node).example
    # The clone has the example's storage, which the examples of its views share.
    set_facts(clone, Facts(value, value))
    change_facts(node, example=torch.empty_like(value))
    node.replace_all_uses_with(clone, delete_user_cb=lambda user: user is not clone)
    for other in graph.nodes:
        writes = tuple(clone if each is node else each for each in facts(other).writes)
        change_facts(other, writes=writes)


def _repeat(node: fx.Node) -> None:
    """Give each reader of a node but the first one a node of its own."""
    for user in list(node.users)[1:]:
        with node.graph.inserting_before(user):
            again = node.graph.get_attr(str(node.target))
        again.meta = dict(node.meta)
        user.replace_input_with(node, again)


def _is_kept(root: nn.Module, value: Tensor) -> bool:
    """Whether an attribute of a module holds a tensor."""
    return any(held is value for held in _held(root))


def _held(root: nn.Module) -> Iterator[Any]:
    for module in root.modules():
        for name, attribute in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                yield from tree_leaves(attribute)
