"""Run a node on fake tensors as soon as it is created, and write down its facts."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, UntypedStorage, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils._pytree import tree_leaves, tree_map_only

from sffx.arguments import Arguments
from sffx.compiler.batch_axis import at_batch_size, batch_sizes, find_batch
from sffx.compiler.examples import DATA_DEPENDENT, runs
from sffx.compiler.facts import Cost, Facts, facts
from sffx.compiler.fake import fake_copy_but_constants, ones_like
from sffx.compiler.qualnames import attribute
from sffx.compiler.trace.batch import depends_on_batch
from sffx.compiler.trace.costs import CountMacs, note_kept, noting_saved
from sffx.compiler.trace.flags import is_added, is_flag
from sffx.compiler.trace.leaves import has_forward_hooks
from sffx.compiler.trace.randomness import generators_restored, torch_restored
from sffx.compiler.trace.run_function import FunctionTarget
from sffx.compiler.trace.sizes import is_guard
from sffx.compiler.trace.state import in_mode
from sffx.tensors import can_learn, storage_key, tensors_in


def example_of(node: fx.Node) -> Any:
    """Return the value of a node that has been traced, on its example."""
    return facts(node).example


def _other_of(node: fx.Node) -> Any:
    """Return the value of a node that has been traced, at the second batch size."""
    return facts(node).other


@dataclass(frozen=True)
class Example:
    """The arguments on which a model is traced.

    Attributes:
        form: of the arguments.
        values: of the inputs in them, by name.
    """

    form: Arguments
    values: Mapping[str, Any]


class OtherFormError(RuntimeError):
    """A module returns other things in eval mode than in train mode."""


class NodeRunner:
    """Runs the nodes of one trace.

    Attributes:
        mode: in which the fake tensors live.
        probe: the model on fake tensors, which is traced.
        original: the model with values, for leaves that fake tensors cannot run.
        example: the arguments of the forward.
        inputs: the values of the inputs, by the targets of their placeholders; the tracer adds
            them.
        sizes: of the batch in the arguments, and of a second batch, on which each node runs too.
        training: what `self.training` is, for every module.
        is_running: whether a node runs now, and calls of modules are to be no nodes.
        resized: class of a module that returns other sizes in eval mode; "" where none does.
        uncopied: tensors that a leaf reads themselves where it runs with values, by their `id`.
    """

    def __init__(
        self,
        mode: FakeTensorMode,
        probe: nn.Module,
        original: nn.Module,
        example: Example,
        *,
        training: bool,
    ) -> None:
        self.mode = mode
        self.probe = probe
        self.original = original
        self.example = example
        self.inputs: dict[str, Any] = {}
        self.sizes = batch_sizes(example.values)
        self.training = training
        self.is_running = False
        self.resized = ""
        self.uncopied: dict[int, Tensor] = {}
        self._saved_storages: list[UntypedStorage] = []
        self._given = {storage_key(tensor) for tensor in (*probe.parameters(), *probe.buffers())}

    def run(self, node: fx.Node) -> Facts:
        """Return the facts of a node whose arguments have theirs."""
        versions = _versions_read(node)
        buffers = self._buffer_states(node)
        cost = Cost()
        value = self._counted(node, cost)
        # Before the node runs again, which may write again.
        writes = _arguments_written(node, versions)
        buffers_now = self._buffer_states(node)
        written_buffers = [name for name in buffers_now if buffers_now[name] != buffers.get(name)]
        if node.op == "call_module" and not is_added(node):
            self._require_same_form(node, value)
        other = self._at_other_size(node)
        return Facts(
            example=value,
            other=other,
            batch=find_batch(node, self.probe, value, other, self.sizes),
            of_batch=depends_on_batch(node, value, other),
            cost=cost,
            writes=tuple(writes),
            buffers=frozenset(written_buffers),
        )

    def values_on(self, graph: fx.Graph, inputs: Mapping[str, Any]) -> dict[fx.Node, Any]:
        """Return the values of a graph's nodes on other inputs, as far as it runs on them.

        Args:
            graph: that was traced.
            inputs: by name.
        """
        by_name = iter(inputs.values())
        values: dict[fx.Node, Any] = {}
        self.is_running = True
        with suppress(Exception), in_mode(self.probe, self.training):
            for node in graph.nodes:
                if node.op == "placeholder":
                    values[node] = next(by_name)
                elif node.op != "output" and not is_guard(node):
                    with self._mode(node), torch.no_grad():
                        values[node] = self._value(node, values.__getitem__)
        self.is_running = False
        return values

    def takes(self, size: int) -> bool:
        """Return whether the model itself runs with a batch of some size, in eval mode."""
        model = fake_copy_but_constants(self.original, self.mode).eval()
        self.is_running = True
        try:
            return runs(model, self.example.form, at_batch_size(self.example.values, size))
        finally:
            self.is_running = False

    def _require_same_form(self, node: fx.Node, value: Any) -> None:
        """Refuse a module that returns other things in eval mode than in train mode.

        Other sizes, as of tokens that are dropped, are only noted: sizes are no part of a graph.
        torch's own do not. The graph goes on with what one mode returns.

        Raises:
            OtherFormError: says what is returned in each mode.
        """
        module = self.probe.get_submodule(str(node.target))
        if _is_of_torch(module):
            return
        run = self._run_in_other_mode(node, module)
        if run is None:
            return
        (other,) = run
        here, there = _form(value), _form(other)
        if here == there:
            return
        self.resized = type(module).__name__
        if _axes(value) != _axes(other):
            names = (here, there) if self.training else (there, here)
            raise OtherFormError(
                f"{type(module).__name__} returns {names[0]} in train mode and {names[1]} in eval "
                "mode"
            )

    def _run_in_other_mode(self, node: fx.Node, module: nn.Module) -> tuple[Any] | None:
        """Run a node that calls a module in the other mode.

        Returns:
            Its value there, in a tuple; None where it does not run, as when it needs real values.
        """
        # A `train` of its own may read weights. And while nothing runs, to read `training` would
        # make a node of a flag.
        self.is_running = True
        modes = {each: each.training for each in module.modules()}
        try:
            module.train(not self.training)
            with torch.no_grad():
                return (self._value(node),)
        except Exception:
            return None
        finally:
            module.train(self.training)
            # Parts may have had other modes, and `train` sets one for all.
            for each, training in modes.items():
                each.training = training
            self.is_running = False

    def _buffer_states(self, node: fx.Node) -> dict[str, tuple[int, int]]:
        """Return the identity and the version of each buffer of the module that a node calls."""
        if node.op != "call_module" or is_added(node):
            return {}
        module = self.probe.get_submodule(str(node.target))
        return {name: (id(buffer), buffer._version) for name, buffer in module.named_buffers()}

    def _counted(self, node: fx.Node, cost: Cost) -> Any:
        """Return a node's value, and add to `cost` what it costs."""
        note_saved = noting_saved(cost.saved, self._saved_storages, self._given)
        self.is_running = True
        try:
            # With gradients, whatever the caller has switched off: what autograd keeps is a cost.
            with self._mode(node), CountMacs(cost), note_saved, torch.enable_grad():
                return self._value(node)
        except RuntimeError as failure:
            if _NO_HOOKS not in str(failure):
                raise
            return self._counted_without_hooks(node, cost)
        finally:
            self.is_running = False

    def _counted_without_hooks(self, node: fx.Node, cost: Cost) -> Any:
        """Return the value of a node in which `torch.func` differentiates, and count its cost.

        What is kept there cannot be noted. Its arguments and results stand for it.
        """
        cost.macs = 0
        cost.saved.clear()
        with self._mode(node), CountMacs(cost), torch.enable_grad():
            value = self._value(node)
        read = [example_of(arg) for arg in node.all_input_nodes]
        for tensor in tensors_in([*read, value]):
            if storage_key(tensor) not in self._given:
                note_kept(tensor, cost.saved, self._saved_storages)
        return value

    def _at_other_size(self, node: fx.Node) -> Any:
        """Return a node's value at the second batch size."""
        if node.op == "placeholder":
            return at_batch_size(self.inputs[str(node.target)], self.sizes[1])
        self.is_running = True
        try:
            with self._mode(node), torch.enable_grad():
                return self._value(node, _other_of)
        finally:
            self.is_running = False

    def _mode(self, node: fx.Node) -> AbstractContextManager[Any]:
        """Return the mode in which what a node makes is fake.

        A module runs outside of it: a table that it makes, and may keep in a cache, has values.
        """
        return nullcontext() if node.op == "call_module" else self.mode

    def _value(self, node: fx.Node, value_of: Callable[[fx.Node], Any] = example_of) -> Any:
        """Run a node, and return its value.

        Args:
            node: to run.
            value_of: returns the value of a node that it reads.
        """
        args: Any = fx.node.map_arg(node.args, value_of)
        kwargs: Any = fx.node.map_arg(node.kwargs, value_of)
        target: Any = node.target
        if node.op == "placeholder":
            return self.inputs[target]
        if node.op == "get_attr":
            return self._attribute(target)
        if node.op == "call_function":
            return target(*_plain(args), **_plain(kwargs))
        if node.op == "call_method":
            return getattr(args[0], target)(*_plain(args[1:]), **_plain(kwargs))
        if isinstance(target, FunctionTarget):
            return self._run_function(target, args, kwargs)
        if is_flag(node):
            return self.training
        return self._call_module(target, args, kwargs)

    def _attribute(self, target: str) -> Any:
        value = attribute(self.probe, target)
        # The mode makes one fake twin of a constant and gives the same one again. Each read of the
        # constant must have the same storage, by which writes on it are found.
        return self.mode.from_tensor(value) if type(value) is Tensor else value

    def _call_module(self, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.probe.get_submodule(target)
        # A leaf may draw by itself, for it draws again whenever the graph calls it. Layers of torch
        # draw by torch alone, and the other generators take a tenth of the time of a trace.
        restored = torch_restored if _runs_torch_alone(module) else generators_restored
        with restored():
            try:
                return module(*_plain(args), **_plain(kwargs))
            except DATA_DEPENDENT:
                return self._computed(target, args, kwargs)
            except Exception as failure:
                # It may leave torch, or call what is stricter on fake tensors than for real.
                try:
                    return self._computed(target, args, kwargs)
                except Exception:
                    raise failure from None

    def _run_function(
        self, target: FunctionTarget, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        call = partial(target.value, self.training)
        with generators_restored():
            try:
                return call(_plain(args), _plain(kwargs))
            except Exception as failure:
                try:
                    return self._with_values(call, (), args, kwargs)
                except Exception:
                    raise failure from None

    def _computed(self, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a leaf whose shapes depend on values, with values, and return a fake result."""
        with unset_fake_temporarily():
            module = copy.deepcopy(self.original.get_submodule(target), dict(self.uncopied))

        def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return module(*args, **kwargs)

        return self._with_values(call, tuple(module.parameters()), args, kwargs)

    def _with_values(
        self,
        call: Callable[[tuple[Any, ...], dict[str, Any]], Any],
        parameters: tuple[Tensor, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call with values in the place of fake arguments, and return a fake result.

        The values are ones, which are valid as lengths and as indices as well.

        Raises:
            RuntimeError: the call writes on its arguments, which fake ones would not see.
        """
        with unset_fake_temporarily(), torch.no_grad():
            real_args, real_kwargs = tree_map_only(Tensor, ones_like, (args, kwargs))
            result = call(_plain(real_args), _plain(real_kwargs))
        for value in tree_leaves((real_args, real_kwargs)):
            if isinstance(value, Tensor) and value._version and not parameters:
                raise RuntimeError("a function writes in place on what it is given")
        sources = [*parameters, *tree_leaves((args, kwargs))]
        has_gradient = any(source.requires_grad for source in sources if isinstance(source, Tensor))

        def faked(tensor: Tensor) -> Tensor:
            fake = self.mode.from_tensor(tensor.detach())
            if not (has_gradient and can_learn(tensor)):
                return fake
            # A result is no leaf of autograd, so what comes next may write on it.
            return fake.requires_grad_().clone()

        return tree_map_only(Tensor, faked, result)


def _is_of_torch(module: nn.Module) -> bool:
    """Whether a module and all in it are torch's own layers."""
    return all(type(each).__module__.startswith("torch.nn.") for each in module.modules())


def _runs_torch_alone(module: nn.Module) -> bool:
    """Whether nothing but code of torch runs when a module is called."""
    if not _is_of_torch(module):
        return False
    for each in module.modules():
        if "forward" in vars(each) or has_forward_hooks(each) or each._forward_pre_hooks:
            return False
    return True


def _plain(value: Any) -> Any:
    """Return lists and dictionaries of Python in the place of those of fx, which none may write.

    Each call has its own, since what is called may write on them.
    """
    if isinstance(value, immutable_dict):
        return {key: _plain(each) for key, each in value.items()}
    if type(value) is tuple:
        return tuple(map(_plain, value))
    return list(map(_plain, value)) if isinstance(value, immutable_list) else value


# Of the error that `torch.func.grad` raises where what autograd keeps is noted.
_NO_HOOKS = "support saved tensor hooks"


def _versions_read(node: fx.Node) -> dict[fx.Node, int]:
    """Return the version of each tensor that a node reads, by its argument.

    torch counts the writes on a tensor in its version, also those through views of it.
    """
    versions = {}
    for arg in node.all_input_nodes:
        value = facts(arg).example
        if isinstance(value, Tensor):
            versions[arg] = value._version
    return versions


def _arguments_written(node: fx.Node, before: dict[fx.Node, int]) -> list[fx.Node]:
    """Return the arguments that a node has written in place.

    Args:
        node: that has run.
        before: the versions of its arguments before it ran.
    """
    written = [arg for arg in before if facts(arg).example._version != before[arg]]
    # torch counts no writes on these.
    written += [arg for arg in _statistics(node) if arg in before and arg not in written]
    return written


def _statistics(node: fx.Node) -> list[Any]:
    """Return the running statistics that a node writes; torch does not count these writes."""
    if node.target not in (F.batch_norm, F.instance_norm):
        return []
    given = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
    # The defaults are torch's.
    if node.target is F.instance_norm:
        writes = given.get("use_input_stats", True)
    else:
        writes = given.get("training", False)
    return [given.get("running_mean"), given.get("running_var")] if writes else []


def _axes(value: Any) -> Any:
    """Return the number of axes of a tensor, and of those in a tuple, however deep."""
    if isinstance(value, Tensor):
        return value.ndim
    if isinstance(value, (tuple, list)):
        return type(value), [_axes(each) for each in value]
    return type(value)


def _form(value: Any) -> str:
    """Write what kind of value it is: the shape of a tensor, and those in a tuple, however deep."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {('B', *value.shape[1:])}".replace("'", "")
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of ({', '.join(_form(each) for each in value)})"
    return f"a {type(value).__name__}"
