"""The records of a traced model's inputs."""

from __future__ import annotations

from torch import Tensor, fx, nn

from sffx.blocks import Input
from sffx.compiler.facts import facts
from sffx.compiler.trace.packed import longest_packed
from sffx.inputs import marks_tokens


def input_records(graph: fx.Graph, root: nn.Module, names: tuple[str, ...]) -> tuple[Input, ...]:
    """Return a record of each placeholder, in their order.

    Args:
        graph: of the model.
        root: the model.
        names: of the inputs, in order.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    pairs = zip(placeholders, names, strict=True)
    return tuple(_record(node, root, name) for node, name in pairs)


def _record(node: fx.Node, root: nn.Module, name: str) -> Input:
    value = facts(node).example
    longest = longest_packed(node)
    # Lengths run from 1 to that of the longest sequence.
    low, high = (1, longest + 1) if longest else (0, _high(node, value, root))
    return Input(
        name=name,
        shape=tuple(value.shape[1:]),
        dtype=str(value.dtype).removeprefix("torch."),
        high=high,
        marks_tokens=marks_tokens(name, value),
        low=low,
        value="" if node.name == name else node.name,
    )


def _high(node: fx.Node, value: Tensor, root: nn.Module) -> int:
    """Return the number of valid values of an integer input, 0 for float inputs.

    It is the size of the embedding that reads the input. Where none does, 2 is safe.
    """
    if value.is_floating_point():
        return 0
    for user in node.users:
        if user.op != "call_module":
            continue
        reader = root.get_submodule(str(user.target))
        if isinstance(reader, nn.Embedding):
            return reader.num_embeddings
    return 2
