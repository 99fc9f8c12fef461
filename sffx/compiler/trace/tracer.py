"""The tracer: creates the nodes of a graph, and refuses what a graph cannot hold."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from sffx.arguments import is_writable
from sffx.compiler.aliases import views_in_attributes
from sffx.compiler.calls import call
from sffx.compiler.facts import Facts, facts, set_facts
from sffx.compiler.qualnames import attribute
from sffx.compiler.trace.batch import differs_at_one, is_settled, length
from sffx.compiler.trace.constants import Constants
from sffx.compiler.trace.data_shapes import (
    data_shaped_target,
    depends_on_data,
    is_data_shaped,
    require_data,
)
from sffx.compiler.trace.flags import PlantedFlag, owners_of_flags
from sffx.compiler.trace.functions import (
    Callee,
    Functions,
    bound,
    depends_on_function,
    own_method,
    require_plain_values,
)
from sffx.compiler.trace.identity import require_no_identity
from sffx.compiler.trace.leaves import has_no_code, is_layer
from sffx.compiler.trace.mapped import MappedCall, TakesApart
from sffx.compiler.trace.outputs import Wanted, find_logits, notes_on_outputs, place_of_logits
from sffx.compiler.trace.own_state import OwnState
from sffx.compiler.trace.patches import Patches
from sffx.compiler.trace.proxy import GuidedProxy, SequenceProxy, TensorProxy, has_proxy
from sffx.compiler.trace.randomness import (
    OWN_GENERATOR,
    SEEDED,
    Drawn,
    call_without_draws,
    is_drawn,
    outcome_of_draw,
    state_of_torch,
)
from sffx.compiler.trace.regions import Regions
from sffx.compiler.trace.run_function import function_target
from sffx.compiler.trace.runner import NodeRunner
from sffx.compiler.trace.size_tensors import value_of_sizes
from sffx.compiler.trace.sizes import reads_a_size, require_settled, require_several
from sffx.compiler.trace.state import Reads
from sffx.compiler.trace.writes import Writes, versions
from sffx.errors import TraceError
from sffx.tasks import CLASSIFICATION, Task
from sffx.tensors import tensors_in


class GuidedTracer(fx.Tracer):
    """A tracer that runs every node on fake tensors as it creates it.

    fx calls the methods that have names of its own. An error in one of them ends the attempt; the
    module whose forward ran then becomes a leaf.

    Attributes:
        leaves: qualnames of modules that an earlier attempt could not trace, with the reasons.
        functions: that the graph is to call, since they could not be traced.
        constants: that the forward makes.
        regions: that it enters.
        writes: on the model's tensors.
        opened: modules that can be no leaves: one of their attributes, named here, is set while
            they do not run.
        has_opened: whether another one was found, which the graph has called as a leaf before.
        own: what the modules hold themselves.
        tensors_left: qualnames of the attributes in which the forward has left tensors.
        views: qualnames of the plain attributes that are views of parameters or buffers.
        patches: what stands in for torch's functions during the trace.
        branched: qualnames of modules that branched on their `training`.
        failed: qualname of the innermost module in which the trace failed.
        original: the model with values.
        runner: runs each node on its example.
        wanted: what the caller says of the output.
        place_of_logits: in what the forward returned.
        task: what the model predicts, once it was traced.
        notes_on_task: whether the task was inferred, and of which output.
    """

    def __init__(
        self,
        runner: NodeRunner,
        leaves: Mapping[str, str],
        functions: Functions,
        wanted: Wanted,
        opened: dict[nn.Module, str],
        views: Collection[str] = (),
    ) -> None:
        super().__init__()
        # fx takes a buffer for a constant. What is computed from it alone would be frozen, and
        # writes on it would be lost.
        self.proxy_buffer_attributes = True
        self.leaves = leaves
        self.functions = functions
        self.opened = opened
        self.has_opened = False
        self.views = views
        self.own = OwnState(runner.probe)
        self.tensors_left: list[str] = []
        self._parted = _parted_views(runner, views)
        runner.uncopied = {key: tensor for key, (tensor, _) in self._parted.items()}
        self.patches = Patches(self, runner.probe)
        self.constants = Constants(self)
        self.regions = Regions()
        self.writes = Writes()
        self.branched: set[str] = set()
        self._settled: set[tuple[fx.Node, Any]] = set()
        self.failed: str | None = None
        self._has_data_shapes = False
        self.original = runner.original
        self.runner = runner
        self.wanted = wanted
        self.place_of_logits = ""
        self.task: Task = CLASSIFICATION
        self.notes_on_task: list[str] = []
        self._empty: dict[str, Tensor] = {}  # by the qualname of the parameter that each is like
        self._generator = state_of_torch()
        self._entered: list[nn.Module] = []  # those whose own `__call__` runs, innermost last

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.leaves:
            return True
        if is_layer(m) and m not in self.opened:
            return True
        return isinstance(m, torch.jit.ScriptModule)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Make a placeholder of each tensor in the arguments; what else they hold, they keep.

        fx reads the arguments off the code object of `root_fn`, which is that of a decorator where
        there is one. Here they are those of the example, and all others take their defaults.
        """
        example = self.runner.example
        inputs: dict[str, Any] = {}
        for name, value in example.values.items():
            target = _placeholder_target(name, set(self.runner.inputs) | set(example.values))
            self.runner.inputs[target] = value
            inputs[name] = self.create_proxy("placeholder", target, (), {})

        def forward() -> Any:
            require_no_identity(self.root)
            # Not `root_fn`, the forward of the class: an instance may have one of its own.
            returned = call(self.root, example.form, inputs)
            self.place_of_logits = place_of_logits(returned)
            logits = find_logits(returned, self.wanted)
            self.notes_on_task = notes_on_outputs(returned, logits)
            return logits

        return forward, []

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], *more: Any, **options: Any
    ) -> Any:
        if kind == "call_function" and target is torch._assert:
            self._settle_assertion(args[0])
        if kind == "call_method" and target in ("item", "tolist"):
            return self._number(target, args[0].node)
        if target in _COMPUTE_GRADIENTS:
            raise RuntimeError("it computes gradients, which a graph cannot hold")
        if kind == "call_function" and not self.place:
            # In a submodule it makes a leaf, which runs for real.
            target = data_shaped_target(target, args)
        if kind == "call_method":
            args = self._without_data(target, args)
        create: Callable[..., fx.Proxy] = super().create_proxy
        if self.regions.is_without_gradients():
            create = functools.partial(self.regions.create, create)
        return self._instead_of(create(kind, target, args, *more, **options))

    def _instead_of(self, proxy: fx.Proxy) -> Any:
        """Return what a forward gets in the place of a new proxy: its value where that is known."""
        node = proxy.node
        if node.target is getattr and node.args[1] == "requires_grad":
            self.regions.asked[".requires_grad"] = None
        if _reads_no_data(node):
            return self._description(node)
        example = facts(node).example
        # A proxy is never None. `if mask is None` must see None itself, also where a leaf returns
        # it among other values.
        return example if example is None or self._is_known(node) else proxy

    def _is_known(self, node: fx.Node) -> bool:
        """Whether a value is a bool that is the same in every call.

        `x.is_cuda is False` needs the bool itself. A comparison of sizes does not count: it is
        settled where the forward branches on it.
        """
        record = facts(node)
        if type(record.example) is not bool or record.of_batch or reads_a_size(node):
            return False
        depends = self._depends_on_data(node) or self._depends_on_function(node)
        return not depends and not owners_of_flags(node)

    def _number(self, method: str, node: fx.Node) -> Any:
        """Return the number that a forward takes out of a tensor: drawn, or made of sizes."""
        if is_drawn(node):
            return Drawn(0.5)
        return getattr(self.value_of_sizes(node), method)()

    def value_of_sizes(self, node: fx.Node) -> Tensor:
        """Return the value of a tensor that is made of sizes alone, and settle these.

        Raises:
            RuntimeError: it is made of anything else.
        """
        made = value_of_sizes(node, self.runner.probe, self.constants.names)
        if made is None:
            raise RuntimeError("a number is read from a tensor, which depends on the data")
        value, sizes = made
        for size in sizes:
            self.settle(size, facts(size).example)
        return value

    def _settle_assertion(self, condition: Any) -> None:
        """Guard what the model asserts about sizes, since the graph will not assert it."""
        is_node = isinstance(condition, fx.Proxy)
        if is_node and reads_a_size(condition.node) and self._is_settled(condition.node):
            self.settle(condition.node, bool(facts(condition.node).example))

    def _without_data(self, method: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments of a method, parameters left out where only a dtype is read.

        `weight.new_zeros(1)` and `x.to(weight)` do not use the weight, which may belong to a later
        block.
        """
        if method not in _DTYPE_METHODS and not method.startswith("new_"):
            return args
        # `weight.to(x)` does use the weight.
        first = 1 if method in _DTYPE_METHODS else 0
        like = [self._like(each) if _is_parameter(each) else each for each in args[first:]]
        return (*args[:first], *like)

    def _like(self, parameter: fx.Proxy) -> fx.Proxy:
        """Return an empty tensor, a constant of the model, with a parameter's dtype and device."""
        key = str(parameter.node.target)
        if key not in self._empty:
            example = facts(parameter.node).example
            self._empty[key] = torch.empty(0, dtype=example.dtype, device=example.device)
        return self.proxy(self.create_arg(self._empty[key]))

    def _description(self, node: fx.Node) -> Any:
        """Return, in the place of a node that reads no data of a parameter, what it reads.

        Sizes are constants. A dtype or a device changes with the model, so it is read off an empty
        tensor that changes as well.
        """
        value = facts(node).example
        name = node.args[1] if node.target is getattr else None
        parameter = node.all_input_nodes[0]
        node.graph.erase_node(node)
        if not isinstance(value, (torch.dtype, torch.device)):
            return value
        return self.create_proxy(
            "call_function", getattr, (self._like(self.proxy(parameter)), name), {}
        )

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Create a node and its facts; fx calls this for constants of a forward as well."""
        node = super().create_node(kind, target, *args, **kwargs)
        try:
            set_facts(node, Facts() if kind == "output" else self.runner.run(node))
        except Exception:
            # The forward may catch the error, and go on.
            self.graph.erase_node(node)
            raise
        if facts(node).cost.draws and state_of_torch() != self._generator:
            raise RuntimeError(SEEDED)
        self.constants.note_writes(node)
        self.writes.note(node)
        self._has_data_shapes = self._has_data_shapes or is_data_shaped(node)
        return node

    @property
    def is_running(self) -> bool:
        """Whether a node runs now, on its example, and nothing is traced."""
        return self.runner.is_running

    @property
    def resized(self) -> str:
        """The class of a module that returns other sizes in eval mode; "" where none does."""
        return self.runner.resized

    def create_arg(self, a: Any) -> Any:
        # fx asks whether `a` is a tensor before it asks whether it is a proxy. Ours is both.
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Drawn):
            a.refuse()
        if isinstance(a, torch.Generator):
            raise RuntimeError(OWN_GENERATOR)
        if isinstance(a, np.generic):  # its text, np.float64(2.0), is no code of a graph
            return a.item()
        if isinstance(a, FakeTensor) and not self._is_held(a):
            self._require_no_views()
            raise RuntimeError(
                "it uses a tensor that an earlier call has computed and kept, outside of the model "
                "or in a container, or one computed from what parameters() or state_dict() return, "
                "which a graph cannot hold"
            )
        if type(a) is Tensor:
            return self.constants.node(a, super().create_arg)
        if isinstance(a, nn.Parameter) and self.own.name(a) is None:
            raise RuntimeError(
                "it uses a parameter that the model does not own, of a layer in a plain list or "
                "one that the forward makes; register it, as by nn.ModuleList or nn.ParameterList"
            )
        # fx would look for the tensor in the model, where it may lie at another place now.
        name = self.own.name(a) if isinstance(a, FakeTensor) else None
        if name is not None:
            return self.create_node("get_attr", name, (), {})
        try:
            return super().create_arg(a)
        except NotImplementedError:
            raise RuntimeError(_cannot_be_passed(a)) from None

    def _require_no_views(self) -> None:
        """Raise a TraceError if a module keeps a view of a parameter or a buffer in an attribute.

        The trace does not see what is computed from it. A leaf would not help: in a copy of the
        leaf the view has memory of its own.
        """
        for name in self.views:
            raise self._reads_view(name)

    def _reads_view(self, name: str) -> TraceError:
        return TraceError(
            f"{type(self.root).__name__} reads its attribute {name!r}, a view of a parameter "
            "or a buffer, which a graph would freeze. Hint: register it as a buffer, "
            "self.register_buffer(...), or take the view in the forward"
        )

    def is_untraced(self, tensor: Any) -> bool:
        """Whether the forward has a parameter or a buffer itself, and no proxy of it."""
        if self.is_running or not isinstance(tensor, FakeTensor):
            return False
        return self._is_held(tensor)

    def _is_held(self, tensor: FakeTensor) -> bool:
        """Whether a tensor is a parameter or a buffer of the model."""
        return isinstance(tensor, nn.Parameter) or self.own.name(tensor) is not None

    def proxy(self, node: fx.Node) -> GuidedProxy:
        example = facts(node).example
        if isinstance(example, Tensor):
            return TensorProxy(node, self)
        return (SequenceProxy if isinstance(example, (tuple, list)) else GuidedProxy)(node, self)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if self._entered and self._entered[-1] is m:
            # The `__call__` of its class now calls that of `nn.Module`. Hooks of the model itself
            # are no part of what is traced.
            return m.forward(*args, **kwargs) if m is self.root else forward(*args, **kwargs)
        if m is self.root:
            return forward(*args, **kwargs)
        # A module that a forward makes for itself is part of its code.
        is_part_of_model = m in (self.submodule_paths or ())
        if self.runner.is_running or not is_part_of_model:
            return forward(*args, **kwargs)
        qualname = self.path_of_module(m)
        if self.is_leaf_module(m, qualname):
            self._open_if_replaced(m, (args, kwargs))
        is_leaf = self.is_leaf_module(m, qualname)
        call = functools.partial(super().call_module, m, forward, args, kwargs)
        if is_leaf and m in self.opened:
            raise RuntimeError(self._why_no_leaf(m, qualname))
        try:
            # A leaf runs with the generators restored. To compare their states for each leaf would
            # cost a tenth of the trace.
            return self._called(m, call, is_leaf=is_leaf)
        except Exception:
            # A leaf is one already, and a container has no code that could have failed. The module
            # around them may do as a leaf.
            if self.failed is None and not is_leaf and not has_no_code(m):
                self.failed = qualname
            raise

    def _open_if_replaced(self, m: nn.Module, given: Any) -> None:
        """Open a module for the next attempt if a forward has set what it holds.

        Args:
            m: that would be called as a leaf.
            given: its arguments. A state that is one of them as well does not count.
        """
        name = "" if m in self.opened else self.own.replaced(m, tree_leaves(given))
        if name:
            self.opened[m] = name
            self.has_opened = True

    def _why_no_leaf(self, m: nn.Module, qualname: str) -> str:
        return (
            f"the attribute {self.opened[m]!r} of {qualname}, a {type(m).__name__}, is set while "
            f"it does not run, and it cannot be traced: {self.leaves[qualname]}"
        )

    def _called(self, m: nn.Module, call: Callable[[], Any], *, is_leaf: bool) -> Any:
        before = versions(m)
        if is_leaf:
            self._require_hooks_of_model(m)
            value = self._called_leaf(call)
            self.writes.note_leaf(before)
            self.own.note(m)
            return value
        require_no_identity(m)
        value = call_without_draws(call)
        self.writes.require_seen(before)
        return value

    def _called_leaf(self, call: Callable[[], Any]) -> Any:
        """Call a leaf, and require that it reads no view which a copy of the model has parted.

        It would read the numbers of before the training. A view of a buffer stays one.
        """
        reads = Reads(self._parted)
        with reads if self._parted else nullcontext():
            value = call()
        for key in reads.found:
            raise self._reads_view(self._parted[key][1])
        return value

    def _require_hooks_of_model(self, m: nn.Module) -> None:
        """Raise a RuntimeError if a forward has set hooks on a leaf for the time of a call."""
        own = self.original.get_submodule(self.path_of_module(m))
        if isinstance(m, torch.jit.ScriptModule):
            return
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            if len(vars(m)[hooks]) != len(vars(own)[hooks]):
                raise RuntimeError("it sets a hook on a layer that it calls, which is lost")

    def call_by_class(
        self, call: Callable[..., Any], m: nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        """Call a module whose class has a `__call__` of its own, which fx does not know of."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._entered.append(m)
            try:
                return call(m, *args, **kwargs)
            finally:
                self._entered.pop()

        if self._entered and self._entered[-1] is m:  # by the `__call__` of a subclass
            return call(m, *args, **kwargs)
        return self.call_module(m, forward, args, kwargs)

    def refuse_mode(self, m: nn.Module) -> None:
        """Raise a RuntimeError if a forward sets the mode of a module of the model."""
        paths = self.submodule_paths or {}
        if m in paths:
            raise RuntimeError(
                f"it sets the mode of {repr(paths[m]) if paths[m] else 'the model'}, which a graph "
                "cannot hold; override train() instead, and set the mode there"
            )

    def run_function(
        self, code: CodeType, callee: Callee, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Let the graph call a function that could not be traced.

        Args:
            code: of the function.
            callee: the function.
            args: of the call; of a method, with its module.
            kwargs: of the call.
        """
        if self.is_running or (callee.is_method and args[0] not in (self.submodule_paths or ())):
            return callee.function(*args, **kwargs)
        try:
            return self._run_function(callee, args, kwargs)
        except Exception:
            self.functions.give_up(code)
            raise

    def _run_function(self, callee: Callee, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        function = callee.function
        if callee.is_method:
            owner = self.path_of_module(args[0])
            function = own_method(callee, self.original.get_submodule(owner))
            args = args[1:]
        function, kwargs = bound(function, args, kwargs)
        target = function_target(self.graph, self.runner.probe, self.place, function)
        proxy = self.create_proxy("call_module", target, args, kwargs)
        if isinstance(proxy, fx.Proxy):
            require_plain_values(facts(proxy.node).example)
        return proxy

    def run_mapped(
        self,
        vmap: Callable[..., Any],
        function: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Let the graph map a function over the samples, or whatever `torch.vmap` is told.

        Args:
            vmap: maps it.
            function: that is mapped.
            args: of the call, as `vmap` takes them.
            kwargs: of the call.
        """
        place = self.place
        paths = self.submodule_paths or {}

        def is_traced(module: nn.Module) -> bool:
            return (
                paths[module] == place or place.startswith(f"{paths[module]}.") or not paths[module]
            )

        takes_apart = TakesApart(is_traced, paths.__contains__)
        mapped = MappedCall(vmap, takes_apart.apart(function))
        if not takes_apart.held and not has_proxy(args, kwargs):
            return vmap(function, *args, **kwargs)
        target = function_target(self.graph, self.runner.probe, place, mapped)
        return self.create_proxy("call_module", target, (takes_apart.held, *args), kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self.runner.is_running:
            return self.runner.training if isinstance(attr_val, PlantedFlag) else attr_val
        if isinstance(attr_val, fx.Proxy):  # the forward has assigned it, in the place of a buffer
            return attr_val
        if type(attr_val) is Tensor:  # registered by the forward; the model's own are fake
            return attr_val
        if isinstance(attr_val, PlantedFlag):
            return self.create_proxy("call_module", attr_val.target, (), {})
        name = self.own.name(attr_val)
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.branched |= owners_of_flags(obj.node)
        value = facts(obj.node).example
        self._require_no_function(obj.node)
        if isinstance(value, Tensor):
            return self._outcome_of_tensor(obj.node)
        if self._depends_on_data(obj.node):
            self._guard(obj.node, bool(value), require_data)
            return bool(value)
        if not self._is_settled(obj.node):
            if self._is_settled_but_for_one(obj.node):
                self._guard(obj.node, bool(value), require_several)
                return bool(value)
            raise RuntimeError("a branch depends on the batch size, which a graph would freeze")
        self.settle(obj.node, bool(value))
        return bool(value)

    def _outcome_of_tensor(self, condition: fx.Node) -> bool:
        """Return the outcome of a branch on a tensor, where it has one for all data."""
        outcome = outcome_of_draw(condition)
        if outcome is not None:
            return outcome
        if any(is_drawn(side) for side in condition.all_input_nodes):
            raise RuntimeError("a branch depends on random numbers")
        try:
            return bool(self.value_of_sizes(condition))
        except RuntimeError:
            raise RuntimeError("a branch depends on the values of a tensor") from None

    def _is_settled(self, condition: fx.Node) -> bool:
        return is_settled(condition, self.runner.sizes, self.runner.takes)

    def _is_settled_but_for_one(self, condition: fx.Node) -> bool:
        """Whether a batch of one sample is to be refused, for which a branch goes the other way.

        A submodule that branches on the batch alone is better a leaf, which takes any batch.
        """
        place = self.place
        is_allowed = not place or place in self.branched
        return is_allowed and differs_at_one(condition, self.runner.sizes)

    @property
    def place(self) -> str:
        """The qualname of the module whose forward runs, "" for the model itself."""
        scopes = [str(path) for path, _ in self.module_stack.values()]
        return scopes[-1] if scopes else ""

    def settle(self, node: fx.Node, outcome: Any) -> None:
        """Guard a number or a truth value that the graph will hold, if it is made of sizes."""
        self._require_no_data(node)
        self._require_no_function(node)
        self.branched |= owners_of_flags(node)
        if reads_a_size(node):
            self._guard(node, outcome)

    def _depends_on_data(self, node: fx.Node) -> bool:
        # Few models have such shapes, and to look for them takes a walk through the graph.
        return self._has_data_shapes and depends_on_data(node)

    def _depends_on_function(self, node: fx.Node) -> bool:
        return bool(self.functions.found) and depends_on_function(node)

    def _require_no_data(self, node: fx.Node) -> None:
        """Raise a RuntimeError if a number which the graph will hold depends on data."""
        if self._depends_on_data(node):
            raise RuntimeError("a number depends on the values of a tensor, by a shape")

    def _require_no_function(self, node: fx.Node) -> None:
        """Raise a RuntimeError if a graph would freeze what a function returns."""
        if self._depends_on_function(node):
            raise RuntimeError("a branch or a plain number depends on what a function returns")

    def _guard(
        self, node: fx.Node, outcome: Any, require: Callable[..., None] = require_settled
    ) -> None:
        if (node, outcome) not in self._settled:
            self._settled.add((node, outcome))
            self.create_node("call_function", require, (node, outcome, self.place), {})

    def settled_length(self, obj: fx.Proxy) -> int:
        """Return the length of a tensor, or the number of the parts that it was split into."""
        value = facts(obj.node).example
        self._require_no_function(obj.node)
        number = length(obj.node)
        if isinstance(value, Tensor):
            self._require_no_data(obj.node)
            size = obj.size(0)
            if isinstance(size, fx.Proxy):  # that of a parameter is a constant
                self.settle(size.node, number)
        elif any(isinstance(part, Tensor) for part in value):
            self._guard(obj.node, number)
        return number

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        number = self.settled_length(obj)
        return iter([operator.getitem(obj, i) for i in range(number)])


def _parted_views(runner: NodeRunner, views: Collection[str]) -> dict[int, tuple[Tensor, str]]:
    """Return the views whose memory a copy of the model has parted from that of their parameter.

    Args:
        runner: of the model and its copy.
        views: qualnames of the attributes that hold views.

    Returns:
        By `id` each tensor that stands for one, fake or with values, and its attribute.
    """
    parted = {}
    for name in set(views).difference(views_in_attributes(runner.original) if views else ()):
        for model in (runner.probe, runner.original):
            for leaf in tensors_in(attribute(model, name)):
                parted[id(leaf)] = (leaf, name)
    return parted


def _placeholder_target(name: str, taken: set[str]) -> str:
    """Return what the argument of the graph for an input is called: as the input, if it can be."""
    if is_writable(name):
        return name
    target = re.sub(r"\W", "_", f"input_{name}")
    while target in taken:
        target += "_"
    return target


_COMPUTE_GRADIENTS = (torch.autograd.grad, torch.autograd.backward, "backward")

# Methods that read but the dtype and the device of a tensor that is another argument.
_DTYPE_METHODS = ("to", "type_as")


def _cannot_be_passed(value: Any) -> str:
    kind = type(value).__name__
    reason = f"it passes on a {kind}, which a graph cannot hold"
    if "cache" in kind.lower():
        reason += "; use_cache=False, an argument of the call or of model.config, leaves it out"
    return reason


def _is_parameter(value: Any) -> bool:
    if not isinstance(value, fx.Proxy) or value.node.op != "get_attr":
        return False
    return isinstance(facts(value.node).example, nn.Parameter)


def _reads_no_data(node: fx.Node) -> bool:
    """Whether a node reads a size, a dtype or the like of a parameter."""
    reads = node.all_input_nodes
    if len(reads) != 1 or reads[0].op != "get_attr":
        return False
    if not isinstance(facts(reads[0]).example, nn.Parameter):
        return False
    value = facts(node).example
    parts = value if isinstance(value, tuple) else (value,)  # a shape, or strides
    return all(isinstance(part, _DESCRIPTIONS) for part in parts)


_DESCRIPTIONS = (bool, int, str, torch.dtype, torch.device)
