"""The cut model: a `GraphModule` that carries its block plan and its origin."""

from __future__ import annotations

import copy
import json
import keyword
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY

from sffx.blocks import BlockPlan
from sffx.errors import InputError
from sffx.learning.readouts import Readout
from sffx.picklable import require_picklable_options
from sffx.pickled_graph import PickledGraph
from sffx.tensors import detach_scripts


@dataclass(frozen=True)
class Origin:
    """The model that a cut model was made from.

    The wrapper keeps the model from becoming a child module of the cut model.

    Attributes:
        model: a copy of the original. Its layers are those of the blocks.
    """

    model: nn.Module


class CutModel(PickledGraph):
    """An ordinary `GraphModule` with a block plan and an origin.

    Both survive copies and pickles, and copies of an unpickled model.

    Attributes:
        plan: where the model was cut, and how its blocks learn.
        origin: the model that `extract` copies and fills with the trained weights.
        readout: chooses what the model returns in eval mode, by `readout.mode`.
    """

    plan: BlockPlan
    origin: Origin
    readout: Readout

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the forward does.

        Raises:
            InputError: an argument is none of the model's, such as the labels of a trainer.
        """
        try:
            return super().__call__(*args, **kwargs)
        # Only after an error, so that a call of the model costs nothing more.
        except TypeError as error:
            others = set(kwargs).difference(each.name for each in self.plan.inputs)
            if self.plan.nested is None and others:
                raise _unknown_arguments(self.plan, ", ".join(sorted(others))) from error
            if self.plan.nested is None and len(args) > len(self.plan.inputs):
                raise _unknown_arguments(self.plan, f"{len(args)} arguments") from error
            raise

    def settle(self) -> None:
        """Apply the updates that are pending in a replicated model, before somebody reads it."""
        replication = vars(self).get("replication")
        if replication is not None:
            replication.settle_for_reader()

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Return what `nn.Module.named_parameters` does; `parameters` calls it as well."""
        self.settle()
        return super().named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """Return what `nn.Module.named_buffers` does; `buffers` calls it as well."""
        self.settle()
        return super().named_buffers(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return what `nn.Module.state_dict` does."""
        self.settle()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # A wrapper's load_state_dict calls this, and not load_state_dict.
        replication = vars(self).get("replication")
        if replication is not None:
            replication.forget()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # Behind `to`, `cuda` and `double`.
        self.settle()
        left_over = left_over_tensors(self)
        applied = super()._apply(*args, **kwargs)
        _cast(left_over, *args, **kwargs)
        return applied

    def __copy__(self) -> CutModel:
        self.settle()
        # fx's own leaves out the plan, and takes the graph away from this model.
        twin = CutModel(self, copy.deepcopy(self.graph), class_name=type(self).__name__)
        _attach(twin, {"plan": self.plan, "origin": self.origin})
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        self.settle()
        twin = super().__deepcopy__(memo)
        detach_scripts(twin)
        return twin

    def train(self, mode: bool = True) -> CutModel:
        """Set the mode of every layer as the model does, whose modules may have a `train` of their
        own."""
        set_modes(self, self.origin.model, mode)
        return self

    def eval(self) -> CutModel:
        """Set eval mode as the model does, which may have an `eval` of its own."""
        self.train(False)
        if overrides_mode(self.origin.model):
            self.origin.model.eval()
        return self

    def __reduce__(self) -> Any:
        self.settle()
        objective = self.plan.objective
        require_picklable_options(objective, f"the objective {objective.name!r}")
        return _restored, super().__reduce__()


def _unknown_arguments(plan: BlockPlan, given: str) -> InputError:
    return InputError(
        f"the model takes {', '.join(each.name for each in plan.inputs)}, and not {given}. "
        "Hint: an argument of the model is one here if example_input holds it; a trainer that "
        "passes labels, as that of transformers, trains sffx.KeywordLoss(net)"
    )


class NestedInputs(fx.graph.CodeGen):
    """Writes a forward that takes the arguments of the model, and looks for the inputs in them."""

    def gen_fn_def(
        self, free_vars: list[str], maybe_return_annotation: str, *, expanded_def: bool = False
    ) -> str:
        head = f"def forward(self, *args, **kwargs){maybe_return_annotation}:"
        # With the comma behind the last name, a single input is taken out of its tuple as well.
        return f"{head}\n    {', '.join(free_vars)}, = self.plan.input_values(args, kwargs)"


def use_codegen(net: fx.GraphModule, codegen: fx.graph.CodeGen) -> None:
    """Let a graph be written as code in another way."""
    net.graph.set_codegen(codegen)
    net.recompile()


def overrides_mode(module: nn.Module) -> bool:
    """Return whether a module has another `train()` or `eval()` than every module has."""
    for name in ("train", "eval"):
        own = getattr(type(module), name) is not getattr(nn.Module, name)
        if own or name in vars(module):
            return True
    return False


def set_modes(cut: nn.Module, model: nn.Module, mode: bool) -> None:
    """Set the modes of what was cut from a model as `model.train(mode)` sets them.

    Args:
        cut: holds layers of the model, and others.
        model: whose own layers these are.
        mode: True for train mode.
    """
    in_model = set(model.modules())
    if not any(overrides_mode(module) for module in in_model):
        nn.Module.train(cut, mode)
        return
    # The model sets the modes of its own layers, and what the cut added follows.
    model.train(mode)
    _set_other_modes(cut, mode, in_model)


def _set_other_modes(module: nn.Module, mode: bool, in_model: set[nn.Module]) -> None:
    """Set the modes of a module and of all in it, but of those that are in the model."""
    module.training = mode
    for child in module.children():
        if child in in_model:
            continue
        if overrides_mode(child):
            child.train(mode)
        else:
            _set_other_modes(child, mode, in_model)


def with_plan(net: fx.GraphModule, plan: BlockPlan, original: nn.Module) -> CutModel:
    """Return a cut model that carries its plan, and the model that `extract` fills.

    Args:
        net: the graph and the modules of the cut model.
        plan: by which it was cut.
        original: the model that it was cut from.
    """
    if plan.nested is not None:
        net.graph.set_codegen(NestedInputs())
    cut = CutModel(net, net.graph, class_name=type(net).__name__)
    _attach(cut, {"plan": plan, "origin": Origin(original)})
    return cut


def left_over_tensors(net: CutModel) -> list[Tensor]:
    """Return the tensors of the original model that belong to no block, as of unused layers.

    They stay with the model that `extract` copies.
    """
    held = {id(tensor) for tensor in (*net.parameters(), *net.buffers())}
    model = net.origin.model
    return [each for each in (*model.parameters(), *model.buffers()) if id(each) not in held]


def _cast(tensors: list[Tensor], fn: Callable[[Tensor], Tensor], recurse: bool = True) -> None:
    """Give tensors the dtype that a function of `Module._apply` gives them.

    Their device stays: nobody computes with them, and `extract` brings them to the net's.
    """
    for tensor in tensors:
        dtype = fn(tensor.detach().new_empty(0)).dtype
        if dtype != tensor.dtype:
            tensor.data = tensor.data.to(dtype)


def set_plan(net: CutModel, plan: BlockPlan) -> None:
    """Give a cut model another plan of the same cuts, such as one with more notes."""
    _attach(net, {"plan": plan, "origin": net.origin})


def _attach(net: fx.GraphModule, attributes: dict[str, Any]) -> None:
    """Set attributes that survive copies and pickles."""
    # fx copies a GraphModule by its graph. It also copies the attributes under this key.
    net.meta[_USER_PRESERVED_ATTRIBUTES_KEY] = attributes
    for name, value in attributes.items():
        setattr(net, name, value)


def is_cut(model: nn.Module) -> bool:
    """Return whether a model was cut by sffx."""
    return isinstance(getattr(model, "plan", None), BlockPlan)


def plan_of(net: nn.Module) -> BlockPlan:
    """Return the block plan that a cut model carries.

    Raises:
        InputError: the model was not cut by sffx.
    """
    plan = getattr(net, "plan", None)
    if not isinstance(plan, BlockPlan):
        raise InputError(f"net is a {type(net).__name__}, not a cut model. Hint: {_hint(net)}")
    return plan


def cut_model(net: nn.Module) -> CutModel:
    """Return the cut model itself, where it may be inside wrappers such as `AveragedModel`.

    Raises:
        InputError: there is none.
    """
    inner = unwrapped(net)
    plan_of(inner)
    return cast(CutModel, inner)  # a copy of a CutModel is a GraphModule with the same attributes


def unwrapped(net: nn.Module) -> nn.Module:
    """Return the cut model inside wrappers, and any other model as it is.

    Wrappers are those of `torch.compile`, `DistributedDataParallel`, `DataParallel`,
    `AveragedModel` and others whose only child is the model, under one of these names.
    """
    inner = net
    while isinstance(inner, nn.Module) and not _carries_plan(inner):
        children = dict(inner.named_children())
        if len(children) != 1 or not _WRAPPED.issuperset(children):
            return net
        (inner,) = children.values()
    return inner


def require_uncompiled(net: nn.Module) -> None:
    """Raise an InputError if a model is compiled as a whole, but is to run block by block."""
    if _carries_plan(net) and net._compiled_call_impl is None:
        return
    raise InputError(
        "net was compiled as a whole, but a block-local step runs it block by block, so the "
        "compilation would be ignored. Hint: leave net as it is, and sffx.compile(net)"
    )


# The attribute of a net whose blocks `sffx.compile` has compiled.
COMPILATION = "compilation"


def require_blocks_uncompiled(net: nn.Module, what: str) -> None:
    """Raise an InputError if the blocks of a net are compiled.

    Args:
        net: a cut model.
        what: needs the blocks as they are: "sffx.offload".
    """
    if getattr(vars(net).get(COMPILATION), "net", None) is net:
        raise InputError(
            f"the blocks of net are compiled, and {what} needs them as they are. "
            "Hint: a copy is not compiled, copy.deepcopy(net)"
        )


# The names that wrappers give to the model inside.
_WRAPPED = {"module", "_orig_mod"}


def _carries_plan(model: nn.Module) -> bool:
    """Return whether a model itself was cut, and does not only wrap a cut model.

    The attributes of a compiled model are those of the model inside, so `getattr` would not tell.
    """
    return isinstance(vars(model).get("plan"), BlockPlan)


def _hint(net: Any) -> str:
    """Return what to pass instead of something that is no cut model."""
    modules = net.named_modules() if isinstance(net, nn.Module) else ()
    for name, module in modules:
        if not _carries_plan(module):
            continue
        if type(net).__name__ == "DistributedDataParallel":
            return f"train DistributedDataParallel(sffx.LocalLoss(net)); elsewhere pass net.{name}"
        return f"pass net.{name}"
    return "pass what sffx.transform returned"


def _restored(make: Any, arguments: tuple[Any, ...]) -> CutModel:
    """Return an unpickled cut model.

    Args:
        make: makes the model without what `with_plan` adds.
        arguments: of that function.
    """
    net = make(*arguments)
    return with_plan(net, net.plan, net.origin.model)


def _format_target(base: str, target: str) -> str:
    """Write the Python code that reads a module or tensor by its qualname.

    A module may have any name: "in", or one with a quote. torch writes such a name as it is.
    """
    code = base
    for name in target.split("."):
        is_plain = name.isidentifier() and name.isascii() and not keyword.iskeyword(name)
        # A text of JSON is one of Python, too, and has its quotes escaped.
        quoted = json.dumps(name, ensure_ascii=False)
        code = f"{code}.{name}" if is_plain else f"getattr({code}, {quoted})"
    return code


# For good, since an edited graph is written as code again.
fx.graph._format_target = _format_target
