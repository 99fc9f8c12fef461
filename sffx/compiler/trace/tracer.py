"""The tracer: creates the nodes of a graph, and refuses what a graph cannot hold."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.utils._pytree import tree_map_only

from sffx.arguments import is_writable
from sffx.compiler.calls import call, first_by_position
from sffx.compiler.facts import Facts, facts, set_facts
from sffx.compiler.trace.attribute_views import AttributeViews
from sffx.compiler.trace.constants import Constants
from sffx.compiler.trace.data_shapes import data_shaped_target
from sffx.compiler.trace.flags import flag_target
from sffx.compiler.trace.functions import (
    Callee,
    Functions,
    bound,
    own_method,
    require_plain_values,
)
from sffx.compiler.trace.identity import require_no_identity
from sffx.compiler.trace.leaves import has_forward_hooks, is_layer
from sffx.compiler.trace.module_calls import ModuleCalls
from sffx.compiler.trace.outputs import (
    Wanted,
    find_logits,
    keys_of_logits,
    notes_on_outputs,
    place_of_logits,
)
from sffx.compiler.trace.own_state import OwnState
from sffx.compiler.trace.packed import packing_target
from sffx.compiler.trace.parameter_forms import ParameterForms, reads_form_alone
from sffx.compiler.trace.patches import Patches
from sffx.compiler.trace.proxy import GuidedProxy, SequenceProxy, TensorProxy
from sffx.compiler.trace.randomness import (
    MOVED,
    OWN_GENERATOR,
    SEEDED,
    DrawnNumber,
    state_of_torch,
)
from sffx.compiler.trace.regions import Regions
from sffx.compiler.trace.run_function import Applied, HeldArray, function_target
from sffx.compiler.trace.runner import NodeRunner
from sffx.compiler.trace.settled import Settled
from sffx.compiler.trace.writes import Writes
from sffx.tasks import CLASSIFICATION, Task


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
            they do not run; or, where the name is "", a hook keeps what the forward reads.
        has_opened: whether another one was found, which the graph has called as a leaf before.
        own: what the modules hold themselves.
        tensors_left: qualnames of the attributes in which the forward has left tensors.
        views: the plain attributes that are views of parameters or buffers.
        forms: what the forward reads of parameters beside their values.
        patches: what stands in for torch's functions during the trace.
        settled: the branches and numbers that the graph will hold.
        calls: calls the modules of the model.
        branched: the qualnames of the modules on whose modes a forward branched, by that of the
            module whose forward it is. Most forwards branch on the mode of their own module.
        failed: qualname of the innermost module in which the trace failed.
        original: the model with values.
        runner: runs each node on its example.
        wanted: what the caller says of the output.
        place_of_logits: in what the forward returned.
        keys_of_logits: the keys and indices that lead to them there.
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
        self.views = AttributeViews(runner, views)
        self.forms = ParameterForms(self)
        self.own = OwnState(runner.probe)
        self.tensors_left: list[str] = []
        self.patches = Patches(self, runner.probe)
        self.constants = Constants(self)
        self.regions = Regions()
        self.writes = Writes()
        self.branched: dict[str, set[str]] = {}
        self.settled = Settled(self)
        self.calls = ModuleCalls(self)
        self.failed: str | None = None
        self.original = runner.original
        self.runner = runner
        self.wanted = wanted
        self.place_of_logits = ""
        self.keys_of_logits: tuple[Any, ...] = ()
        self.task: Task = CLASSIFICATION
        self.notes_on_task: list[str] = []
        self._generator = state_of_torch()
        self._seed = torch.initial_seed()

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
            self.keys_of_logits = keys_of_logits(returned, logits)
            self.notes_on_task = notes_on_outputs(returned, logits, self.wanted)
            return logits

        return forward, []

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *more: Any,
        **options: Any,
    ) -> Any:
        if kind == "call_method" and target in ("item", "tolist"):
            return self.settled.number(target, args[0].node)
        if target in _COMPUTE_GRADIENTS:
            raise RuntimeError("it computes gradients, which a graph cannot hold")
        if kind == "call_function":
            args, kwargs = first_by_position(target, args, kwargs)
            target = self._target_of_function(target, args)
        if kind in ("call_function", "call_method"):
            args, kwargs = self.forms.arguments(target, args, kwargs)
        create: Callable[..., fx.Proxy] = super().create_proxy
        if self.regions.is_without_gradients():
            create = functools.partial(self.regions.create, create)
            # Parameters that the forward found by `parameters()` are no proxies yet.
            args, kwargs = tree_map_only(Tensor, self._as_proxy, (args, kwargs))
        return self._instead_of(create(kind, target, args, kwargs, *more, **options))

    def _target_of_function(self, function: Any, args: tuple[Any, ...]) -> Any:
        """Return what a node is to call for a function of a forward: another one, or the same."""
        if function is torch._assert:
            self.settled.settle_assertion(args[0])
        if not self.place:
            # In a submodule such a function makes a leaf, which runs for real.
            function = data_shaped_target(function, args)
        return packing_target(function)

    def _as_proxy(self, tensor: Tensor) -> Any:
        """Return the proxy of a parameter that a forward read untraced; else the tensor itself."""
        return self.proxy(self.create_arg(tensor)) if self.is_untraced(tensor) else tensor

    def _instead_of(self, proxy: fx.Proxy) -> Any:
        """Return what a forward gets in the place of a new proxy: its value where that is known."""
        node = proxy.node
        if node.target is getattr and node.args[1] == "requires_grad":
            self.regions.asked[".requires_grad"] = None
        if reads_form_alone(node):
            return self.forms.value(node)
        example = facts(node).example
        # A proxy is never None. `if mask is None` must see None itself, also where a leaf returns
        # it among other values.
        return example if example is None or self.settled.is_known(node) else proxy

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Create a node and its facts; fx calls this for constants of a forward as well."""
        node = super().create_node(kind, target, *args, **kwargs)
        try:
            set_facts(node, Facts() if kind == "output" else self.runner.run(node))
        except Exception:
            # The forward may catch the error, and go on.
            self.graph.erase_node(node)
            raise
        if facts(node).cost.draws and self.has_generator_moved:
            raise RuntimeError(SEEDED if torch.initial_seed() != self._seed else MOVED)
        self.constants.note_writes(node)
        self.writes.note(node)
        self.settled.note(node)
        return node

    @property
    def has_generator_moved(self) -> bool:
        """Whether the forward has seeded torch's generator, or drawn where no node does."""
        return state_of_torch() != self._generator

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
        if isinstance(a, DrawnNumber):
            a.refuse()
        if isinstance(a, torch.Generator):
            raise RuntimeError(OWN_GENERATOR)
        if isinstance(a, np.generic):  # its text, np.float64(2.0), is no code of a graph
            return a.item()
        if isinstance(a, np.ndarray) and not a.dtype.hasobject:  # objects may be proxies
            return self._node_of_array(a)
        if type(a) is Tensor:
            return self.constants.node(a, super().create_arg)
        if isinstance(a, (FakeTensor, nn.Parameter)):
            return self._node_of_held(a)
        try:
            return super().create_arg(a)
        except NotImplementedError:
            raise RuntimeError(_cannot_be_passed(a)) from None

    def _node_of_array(self, array: np.ndarray[Any, Any]) -> fx.Node:
        """Create a node that gives an array of NumPy, for which fx has no constant."""
        held = HeldArray(array.copy())  # the forward may write other values before the trace ends
        target = function_target(self.graph, self.runner.probe, self.place, held)
        return self.create_node("call_module", target, (), {})

    def _node_of_held(self, tensor: Tensor) -> fx.Node:
        """Create a node that reads a parameter or a buffer of the model.

        fx would look for the tensor in the model, where it may lie at another place now.
        """
        name = self.own.name(tensor)
        if name is not None:
            return self.create_node("get_attr", name, (), {})
        if isinstance(tensor, nn.Parameter):
            raise RuntimeError(
                "it uses a parameter that the model does not own, of a layer in a plain list or "
                "one that the forward makes; register it, as by nn.ModuleList or nn.ParameterList"
            )
        self.views.require_none()
        self._open_hooked()
        raise RuntimeError(
            "it uses a tensor that an earlier call has computed and kept, outside of the model "
            "or in a container, or one computed from what parameters() or state_dict() return, "
            "which a graph cannot hold"
        )

    def _open_hooked(self) -> None:
        """Open the layers with hooks for the next attempt: one may have kept what is read.

        The hook of a leaf is given no traced values.
        """
        for module in self.submodule_paths or ():
            if is_layer(module) and has_forward_hooks(module) and module not in self.opened:
                self.opened[module] = ""
                self.has_opened = True

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
        return self.calls.call(m, forward, super().call_module, args, kwargs)

    def mode_of(self, m: nn.Module) -> Any:
        """Return what a forward reads as the mode of a module: the proxy of a flag.

        It is the mode itself while a node runs on its example, and for modules of other models.
        """
        if "training" not in vars(m):
            raise AttributeError("training")  # Python then asks `__getattr__`; scripts have one
        qualname = (self.submodule_paths or {}).get(m)
        if self.is_running or qualname is None:
            return vars(m)["training"]
        return self.create_proxy("call_module", flag_target(m, qualname), (), {})

    def refuse_mode(self, m: nn.Module) -> None:
        """Raise a RuntimeError if a forward sets the mode of a module of the model."""
        paths = self.submodule_paths or {}
        if m in paths:
            raise RuntimeError(
                f"it sets the mode of {repr(paths[m]) if paths[m] else 'the model'}, which a graph "
                "cannot hold; override train() instead, and set the mode there"
            )

    def run_function(self, callee: Callee, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the graph call a function that could not be traced.

        Args:
            callee: the function.
            args: of the call; of a method, with its module.
            kwargs: of the call.
        """
        if self.is_running or (callee.is_method and args[0] not in (self.submodule_paths or ())):
            return callee.function(*args, **kwargs)
        try:
            return self._run_function(callee, args, kwargs)
        except Exception:
            self.functions.give_up(callee)
            raise

    def _run_function(self, callee: Callee, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        function = callee.function
        if callee.is_method:
            owner = self.path_of_module(args[0])
            function = own_method(callee, self.original.get_submodule(owner))
            args = args[1:]
        return self._function_proxy(function, args, kwargs)

    def apply(self, kind: type[Function], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the graph apply an autograd function, with its own backward pass.

        In a submodule it makes a leaf, as all that leaves the graph does.

        Raises:
            RuntimeError: the forward is that of a submodule, or a graph cannot hold the arguments.
        """
        if self.place:
            raise RuntimeError(
                f"it calls the autograd function {kind.__name__}, which a graph cannot hold"
            )
        return self._function_proxy(Applied(kind), args, kwargs)

    def _function_proxy(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        function, kwargs = bound(function, args, kwargs)
        target = function_target(self.graph, self.runner.probe, self.place, function)
        proxy = self.create_proxy("call_module", target, args, kwargs)
        if isinstance(proxy, fx.Proxy):
            require_plain_values(facts(proxy.node).example)
        return proxy

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self.runner.is_running:
            return attr_val
        if isinstance(attr_val, fx.Proxy):  # the forward has assigned it, in the place of a buffer
            return attr_val
        if type(attr_val) is Tensor:  # registered by the forward; the model's own are fake
            return attr_val
        name = self.own.name(attr_val)
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    @property
    def place(self) -> str:
        """The qualname of the module whose forward runs, "" for the model itself."""
        scopes = [str(path) for path, _ in self.module_stack.values()]
        return scopes[-1] if scopes else ""

    def to_bool(self, obj: fx.Proxy) -> bool:
        return self.settled.outcome(obj.node)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        number = self.settled.length(obj)
        return iter([operator.getitem(obj, i) for i in range(number)])


def _placeholder_target(name: str, taken: set[str]) -> str:
    """Return what the argument of the graph for an input is called: as the input, if it can be."""
    if is_writable(name):
        return name
    target = re.sub(r"\W", "_", f"input_{name}")
    while target in taken:
        target += "_"
    return target


_COMPUTE_GRADIENTS = (torch.autograd.grad, torch.autograd.backward, "backward")


def _cannot_be_passed(value: Any) -> str:
    kind = type(value).__name__
    reason = f"it passes on an object of the class {kind}, which a graph cannot hold"
    if "cache" in kind.lower():
        reason += "; use_cache=False, an argument of the call or of model.config, leaves it out"
    return reason
