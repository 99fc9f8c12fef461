"""What the nodes of a traced model call: their modules, parameters and kinds of layers."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from sffx.compiler.facts import facts, module_stack
from sffx.compiler.qualnames import called_module, name_of_call, name_of_target, parameters_of
from sffx.compiler.trace.run_function import RunFunction

# Functions that are a layer if one of their arguments is a parameter. A string is a method.
_WEIGHTED_FUNCTIONS = (
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.embedding,
    F.bilinear,
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.baddbmm,
    torch.addmm,
    torch.einsum,
    torch.cdist,
    operator.matmul,
    "matmul",
    "mm",
)


class Layers:
    """Questions about the nodes of a traced model, by the modules that they call.

    Attributes:
        root: the traced model, which owns the modules. It does not change while questions are
            asked.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        # By target. Paths are counted for each join, so the same nodes are asked for many times.
        self._parameters: dict[str, dict[str, nn.Parameter]] = {}
        self._with_matrix: dict[str, bool] = {}

    def module(self, node: Node) -> nn.Module | None:
        """Return the module that a node calls, None for another kind of node."""
        return called_module(node, self.root)

    def parameters(self, node: Node) -> dict[str, nn.Parameter]:
        """Return the parameters that a node holds, by their qualname in the model."""
        if node.op not in ("call_module", "get_attr"):
            return {}
        target = str(node.target)
        if target not in self._parameters:
            self._parameters[target] = parameters_of(self.root, target)
        return self._parameters[target]

    def state(self, node: Node) -> dict[str, Tensor]:
        """Return the parameters of a node and the buffers of its module, by qualname."""
        state: dict[str, Tensor] = dict(self.parameters(node))
        module = self.module(node)
        if module is not None:
            for name, buffer in module.named_buffers():
                state[f"{node.target}.{name}"] = buffer
        return state

    def changing_state(self, node: Node) -> dict[str, Tensor]:
        """Return the parameters of a node and the buffers that it writes, by qualname.

        A module that writes one of its own buffers may write the others: torch counts no writes on
        the statistics of a BN layer, only those on its number of batches.
        """
        writers = {f"{node.target}.{name}".rpartition(".")[0] for name in facts(node).buffers}
        changing: dict[str, Tensor] = dict(self.parameters(node))
        for name, tensor in self.state(node).items():
            if name.rpartition(".")[0] in writers:
                changing[name] = tensor
        return changing

    def is_weighted(self, node: Node) -> bool:
        """Return whether a node is a layer with a weight matrix or a kernel.

        It is a module with one, or a function such as `F.linear` that reads one or what is made of
        weights alone.
        """
        # Norms and activations with parameters hold vectors only.
        if node.op == "call_module" and self._holds_matrix(node):
            return True
        # A function of the user, or one that is mapped, may do anything with a weight.
        is_users = isinstance(self.module(node), RunFunction)
        if not is_users and node.target not in _WEIGHTED_FUNCTIONS:
            return False
        return any(self._is_matrix(arg) for arg in node.all_input_nodes)

    def is_single_layer(self, node: Node) -> bool:
        """Return whether a node is one layer with a weight, and no leaf that holds several."""
        module = self.module(node)
        holds_several = module is not None and holds_several_layers(module)
        return self.is_weighted(node) and not holds_several

    def is_batch_norm(self, node: Node) -> bool:
        """Return whether a node is a BN layer, one of torch's or a class derived from one."""
        if node.target is F.batch_norm:
            return True
        module = self.module(node)
        # By name, so that BN layers of other libraries count as well.
        kinds = type(module).__mro__ if module is not None else ()
        return any("BatchNorm" in kind.__name__ for kind in kinds)

    def is_norm(self, node: Node) -> bool:
        """Return whether a node is a norm of any kind, by the name of its class or function."""
        module = self.module(node)
        if module is None:
            return name_of_target(node.target).endswith("_norm")
        return any("norm" in kind.__name__.lower() for kind in type(module).__mro__)

    def begins_with(self, node: Node, prefixes: tuple[str, ...]) -> bool:
        """Return whether the name of a node's class or function begins with one of these."""
        return name_of_call(node, self.root).lower().startswith(prefixes)

    def _is_matrix(self, node: Node) -> bool:
        """Whether a value is a weight matrix, or made of one alone, as by `weight.T`.

        Integers may pick some of it for each sample, as in `weight[task]`. But what is computed of
        picked rows, as of words, is no weight.
        """
        ahead, passed = [node], {node}
        found = is_picked = is_computed = False
        while ahead:
            each = ahead.pop()
            if each.op == "placeholder":
                return False
            found = found or self._holds_matrix(each)
            is_computed = is_computed or _computes(each)
            for source in each.all_input_nodes:
                # Sizes of an input may be among the arguments.
                value = facts(source).example
                if source in passed or not isinstance(value, Tensor):
                    continue
                if _picks(each) and not value.is_floating_point():
                    is_picked = True
                    continue
                passed.add(source)
                ahead.append(source)
        return found and not (is_picked and is_computed)

    def _holds_matrix(self, node: Node) -> bool:
        module = self.module(node)
        if module is None:
            return any(p.ndim > 1 for p in self.parameters(node).values())
        target = str(node.target)
        if target not in self._with_matrix:
            self._with_matrix[target] = _has_matrix(module)
        return self._with_matrix[target]

    def holds_vectors_alone(self, node: Node) -> bool:
        """Return whether all parameters of a node are vectors, as those of a norm; or it has none.

        A vector may have further axes of one place, as a scale of shape (1, C, 1, 1).
        """
        return all(map(_is_vector, self.parameters(node).values()))


def _has_matrix(module: nn.Module) -> bool:
    """Return whether a module or one of its parts holds a weight matrix or a kernel.

    Torch's layers, and those derived from them, may have a matrix of one column. In other modules
    such a parameter is a vector that is made for broadcasting.
    """
    for part in module.modules():
        bases = type(part).__mro__[: type(part).__mro__.index(nn.Module)]
        is_of_torch = any(kind.__module__.startswith("torch.nn.") for kind in bases)
        for parameter in part.parameters(recurse=False):
            if parameter.ndim > 1 and (is_of_torch or not _is_vector(parameter)):
                return True
    return False


def _is_vector(tensor: Tensor) -> bool:
    return sum(length > 1 for length in tensor.shape) < 2


def _picks(node: Node) -> bool:
    return name_of_target(node.target) in ("gather", "getitem", "index_select")


def _computes(node: Node) -> bool:
    return node.op == "call_module" or node.target in _WEIGHTED_FUNCTIONS


def holds_several_layers(module: nn.Module) -> bool:
    """Return whether several children of a module have a weight matrix or a kernel."""
    weighted = []
    for child in module.children():
        if any(p.ndim > 1 for p in child.parameters()):
            weighted.append(child)
    return len(weighted) > 1


def scopes(node: Node) -> tuple[str, ...]:
    """Return the qualnames of the modules whose forward created a node, outermost first."""
    return tuple(path for path, _ in module_stack(node).values())


def common_scope(stacks: list[tuple[str, ...]]) -> str:
    """Return the deepest module that all stacks have in common, "" for the model itself."""
    common = ""
    for level in zip(*stacks, strict=False):
        if len(set(level)) > 1:
            break
        common = level[0]
    return common
