"""A stage: one block of a cut model with its head and its norm.

Stages are the only way in which the package runs a cut model part by part. Training, evaluation,
verification, early exit, memory counting, offloading and sharding all go over the same stages.

    score:      block_1 = self.block_1(norm_0)         run the block
                goodness_1 = self.head_1(block_1)      and its head
    hand_on:    detached_1 = block_1.detach()          cut the gradient
                norm_1 = self.norm_1(detached_1)       what the next stage reads

A stage runs its nodes of the cut model's own graph. So it computes what `net(x)` computes, to the
bit, and a graph that a user edited is run as edited.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx, nn

from sffx.blocks import Block, BlockPlan, Value
from sffx.kernels.activation import private_gradients
from sffx.kernels.batch_counts import counts_postponed
from sffx.kernels.chain import BATCH_NORMS
from sffx.kernels.recompute import all_plain, is_plain
from sffx.net import plan_of
from sffx.parts import READOUT, head_name, norm_name
from sffx.runtime.gate import KeepsNothing
from sffx.runtime.randomness import numbers_of_block
from sffx.tensors import modules_in

# Values of the outer graph while it runs, by the node that computed them.
Values = dict[fx.Node, Any]


class Stage:
    """One block of a cut model with its head and its norm.

    The classifier is the last stage. It has no head, since its logits are its scores, and no norm.
    A block that several streams leave has a norm for each of them.

    Attributes:
        index: 0 for the first stage.
        name: "block_0", ..., "classifier"; the name of its parameter group as well.
        plan: of the block.
        task: of the model.
        reads: the values that the block reads: inputs of the model, or given by earlier stages.
        gives: the values that later stages read: the output, detached and normed, and side values.
    """

    def __init__(self, net: fx.GraphModule, index: int, nodes: _Nodes, order: _Order) -> None:
        plan = plan_of(net)
        self.index = index
        self.plan: Block = plan.all_blocks[index]
        self.task = plan.task
        self.name = self.plan.target
        self.reads = _reads(net, self.plan)
        self.gives = self.plan.gives if index < len(plan) else ()
        self._net = net
        self._scoring = nodes.scoring
        self._passing = nodes.passing
        self._order = order
        self._own_norms = _OwnNorms()

    @property
    def block(self) -> nn.Module:
        """The block's module."""
        return self._net.get_submodule(self.name)

    @property
    def head(self) -> nn.Module | None:
        """The block's head, None for the classifier."""
        return getattr(self._net, head_name(self.index), None)

    @property
    def norms(self) -> list[nn.Module]:
        """The norms behind the block: one for each of its outputs, unless it has none."""
        norms = []
        for i in range(len(self.plan.outputs)):
            norm = getattr(self._net, norm_name(self.index, i), None)
            if norm is not None:
                norms.append(norm)
        return norms

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that learn together, in the order in which they run: the block, its head."""
        if self.head is None:
            return [self.block]
        return [self.block, self.head]

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that require a gradient, of the block and its head."""
        parameters: dict[nn.Parameter, None] = {}
        for part in self.modules:
            for module in modules_in(part):
                for parameter in module._parameters.values():
                    if parameter is not None and parameter.requires_grad:
                        parameters[parameter] = None
        return list(parameters)

    @property
    def nodes(self) -> list[fx.Node]:
        """The nodes of the outer graph that run with this stage, in order."""
        return [*self._scoring, *self._passing]

    @property
    def parts(self) -> list[str]:
        """The names of the modules that run with this stage: its block, its head, its norm."""
        return [str(node.target) for node in self.nodes if node.op == "call_module"]

    @property
    def scoring(self) -> list[fx.Node]:
        """The nodes from the block to its head; for the classifier, its call."""
        return self._scoring

    @property
    def root(self) -> fx.GraphModule:
        """The cut model, which has the modules that the stage's nodes call."""
        return self._net

    def forget_read(self, values: Values) -> None:
        """Remove the values that nothing behind the block and its head reads."""
        for node in self._scoring:
            self._forget(node, values)

    def nodes_from(self, previous: Stage | None) -> list[fx.Node]:
        """Return the nodes of the outer graph that lead from a stage's scores to this one's.

        Args:
            previous: the stage before this one, None for the first stage.
        """
        handed_on = previous._passing if previous is not None else []
        return [*handed_on, *self._scoring]

    def score(self, values: Values) -> Tensor:
        """Run the block and its head, and return the goodness or logits, (B, J).

        Args:
            values: that the stage reads. What the block computed is added, and values that no
                later node reads are removed, so that their memory is free.
        """
        # Without hooks nobody sees the gradient of a value, so kernels may write over it.
        has_hooks = any(_has_inner_hooks(module) for module in self.modules)
        with (
            private_gradients(not has_hooks),
            numbers_of_block(self.index),
            counts_postponed(self._norms_without_hooks),
        ):
            for node in self._scoring:
                self._run(node, values)
        # The caller alone holds the scores now, and with them the activations of the stage.
        return values.pop(self._scoring[-1])

    def _norms_without_hooks(self) -> list[nn.Module]:
        """Return the batch norms of the block; none where a hook on it may read their numbers."""
        block = self.block
        return self._own_norms.of(block) if is_plain(block) else []

    @property
    def scores_are_seen(self) -> bool:
        """Whether a hook may keep what the block or its head returns, and so the scores."""
        if nn.modules.module._global_forward_hooks:
            return True
        for part in self.modules:
            for module in modules_in(part):
                hooks = module._forward_hooks.values()
                if not all(isinstance(hook, KeepsNothing) for hook in hooks):
                    return True
        return False

    def run_block(self, values: Values) -> None:
        """Run the block without its head, where nobody asks for its scores.

        Args:
            values: as for `score`.
        """
        *of_block, scorer = self._scoring
        with numbers_of_block(self.index):
            for node in of_block:
                self._run(node, values)
        # The head does not run, so its inputs are removed here.
        self._forget(scorer, values)

    def hand_on(self, values: Values) -> None:
        """Add the detached, normed output of the block to the values."""
        with numbers_of_block(self.index, part=1):
            for node in self._passing:
                self._run(node, values)

    def _run(self, node: fx.Node, values: Values) -> None:
        """Run one node, and remove the values that no later node reads."""
        values[node] = self._value(node, values)
        self._forget(node, values)

    def _forget(self, node: fx.Node, values: Values) -> None:
        """Remove the values that no node after this one reads."""
        for no_longer_read in self._order.last_read_by(node):
            values.pop(no_longer_read, None)

    def _value(self, node: fx.Node, values: Values) -> Any:
        args: Any = fx.node.map_arg(node.args, values.__getitem__)
        kwargs: Any = fx.node.map_arg(node.kwargs, values.__getitem__)
        target: Any = node.target
        if node.op == "call_module":
            return self._net.get_submodule(target)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        # The compiler writes no such node, but a user may add one.
        if node.op == "get_attr":
            return operator.attrgetter(target)(self._net)
        return target(*args, **kwargs)

    def __repr__(self) -> str:
        reads = ", ".join(value.name for value in self.reads)
        gives = ", ".join(value.name for value in self.gives)
        return f"Stage({self.name}: reads {reads}; gives {gives or 'logits'})"


def stages_of(net: fx.GraphModule) -> tuple[Stage, ...]:
    """Return the stages of a cut model, made once for its present graph.

    Raises:
        InputError: `net` is no cut model.
    """
    plan_of(net)
    memo: _Memo | None = net.__dict__.get(_MEMO)
    if memo is None or not memo.is_of(net):
        memo = _Memo(net)
        net.__dict__[_MEMO] = memo
    return memo.stages


def stages_that_learn(net: fx.GraphModule) -> list[Stage]:
    """Return the stages that the objective trains: all of them, or all but the classifier.

    Raises:
        InputError: `net` is no cut model.
    """
    stages = list(stages_of(net))
    if not plan_of(net).objective.trains_classifier:
        stages.pop()
    return stages


def placeholders_of(net: fx.GraphModule) -> dict[str, fx.Node]:
    """Return the nodes of the model's inputs by the inputs' names."""
    placeholders = [node for node in net.graph.nodes if node.op == "placeholder"]
    names = [each.name for each in plan_of(net).inputs]
    return dict(zip(names, placeholders, strict=True))


def nodes_read_by(nodes: list[fx.Node]) -> list[fx.Node]:
    """Return the nodes that some nodes read and that are not among them, each once, in order."""
    inside = set(nodes)
    outside: dict[fx.Node, None] = {}
    for node in nodes:
        for read in node.all_input_nodes:
            if read not in inside:
                outside[read] = None
    return list(outside)


_MEMO = "_stages"


class _Memo:
    """The stages of one cut model.

    They refer to its modules and nodes, so a copy of the model makes its own: `__reduce__` gives
    the copy an empty memo. A graph that was edited has other code, and other stages.
    """

    def __init__(self, net: fx.GraphModule | None = None) -> None:
        self._net = net
        self._code = None if net is None else net.code
        self.stages = () if net is None else _make_stages(net)

    def is_of(self, net: fx.GraphModule) -> bool:
        """Return whether these are the stages of a model and of its graph as it is now."""
        return self._net is net and self._code == net.code

    def __reduce__(self) -> Any:
        return _Memo, ()


class _OwnNorms:
    """Finds the batch norms that the graph of a block calls itself. Those inside layers are out."""

    def __init__(self) -> None:
        self._code: str | None = None
        self._paths: list[list[str]] = []

    def of(self, block: nn.Module) -> list[nn.Module]:
        """Return the batch norms; none if the block is no graph, or reads their buffers itself."""
        if not isinstance(block, fx.GraphModule):
            return []
        if self._code is not block.code:
            # The names are looked up once for a graph. Their modules may be replaced later.
            self._paths = [name.split(".") for name in _names_of_norms(block)]
            self._code = block.code
        return [_module_at(block, path) for path in self._paths]


def _module_at(module: Any, path: list[str]) -> nn.Module:
    # `get_submodule` takes ten times the time.
    for name in path:
        module = module._modules[name]
    return module


def _names_of_norms(block: fx.GraphModule) -> list[str]:
    """Return the qualnames of the batch norms in a graph; none if it reads what they count."""
    names: dict[str, None] = {}
    for node in block.graph.nodes:
        # The kernel `recomputed` is passed its norm, by a node "get_attr".
        if node.op not in ("call_module", "get_attr"):
            continue
        target = str(node.target)
        if target.endswith("num_batches_tracked"):
            return []
        if isinstance(operator.attrgetter(target)(block), BATCH_NORMS):
            names[target] = None
    return list(names)


class _Nodes:
    """The nodes of one stage in the outer graph.

    Attributes:
        scoring: from the block to its head; for the classifier, the call of the classifier.
        passing: the detach and the norm, which make the value that the next block reads.
    """

    def __init__(self) -> None:
        self.scoring: list[fx.Node] = []
        self.passing: list[fx.Node] = []


class _Order:
    """Knows which node of the outer graph is the last to read a value."""

    def __init__(self, graph: fx.Graph) -> None:
        last_reader: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            # A later reader takes the place of an earlier one.
            for read in node.all_input_nodes:
                last_reader[read] = node
        self._last_read_by: dict[fx.Node, list[fx.Node]] = {}
        for node, reader in last_reader.items():
            self._last_read_by.setdefault(reader, []).append(node)

    def last_read_by(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes whose values this node is the last to read."""
        return self._last_read_by.get(node, [])


def _make_stages(net: fx.GraphModule) -> tuple[Stage, ...]:
    order = _Order(net.graph)
    stages = []
    for index, nodes in enumerate(_split(net.graph, plan_of(net))):
        stages.append(Stage(net, index, nodes, order))
    return tuple(stages)


def _split(graph: fx.Graph, plan: BlockPlan) -> list[_Nodes]:
    """Divide the outer graph among the stages: at each call of a block, and after each head."""
    index_of_block = {block.target: i for i, block in enumerate(plan.all_blocks)}
    # The head of a block, and the classifier itself, give the scores.
    scorers = {part[-1] for part in plan.parts}
    stages = [_Nodes() for _ in plan.all_blocks]
    # Nodes before the call of a block belong to the stage before it, but for those of the first.
    index = 0
    is_scored = False
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output" or node.target == READOUT:
            break
        called = str(node.target) if node.op == "call_module" else ""
        begins_next_stage = index_of_block.get(called, -1) > index
        if begins_next_stage:
            index += 1
            is_scored = False
        if is_scored:
            stages[index].passing.append(node)
        else:
            stages[index].scoring.append(node)
        if called in scorers:
            is_scored = True
    return stages


def _reads(net: fx.GraphModule, block: Block) -> tuple[Value, ...]:
    """Return the values that a block reads, with their shapes and dtypes."""
    plan = plan_of(net)
    placeholders = placeholders_of(net)
    values: dict[str, Value] = {}
    for each in plan.inputs:
        # The node of an input called "input" is called "input_1": fx keeps clear of builtins.
        name = placeholders[each.name].name
        values[name] = Value(name, (None, *each.shape), each.dtype)
    for earlier in plan.blocks:
        for value in earlier.gives:
            values[value.name] = value
    return tuple(values[name] for name in block.inputs)


def _has_inner_hooks(part: nn.Module) -> bool:
    """Return whether hooks on a block or a head, or inside it, may see gradients.

    Forward hooks on the part itself do not count: they see no gradient, and offloading sets some.
    """
    if part._backward_hooks or part._backward_pre_hooks:
        return True
    return not all_plain(modules_in(part)[1:])
