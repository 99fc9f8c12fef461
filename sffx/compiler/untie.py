"""Untie an output layer from an embedding: a weight that two blocks learn cannot be cut.

Language models often share one weight between the embedding, in the first block, and the output
layer, in the classifier. No cut could lie between the two. So the output layer gets a weight of its
own, with the values that both had. Each block trains its own from then on.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sffx.compiler.aliases import notes_on_shared_memory
from sffx.compiler.trace.requirements import require_plain
from sffx.tensors import copied


def untied(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a model whose linear layers share no weight with an embedding.

    Returns:
        The model itself where they share none, else a copy; and the notes: on each such layer, and
        on other tensors that share memory, which they do not in a copy.
    """
    # The trace says so as well, but it comes later.
    require_plain(model)
    notes = list(notes_on_shared_memory(model))
    pairs = _tied(model)
    if not pairs:
        return model, tuple(notes)
    copy = copied(model)
    for name, embedding in pairs.items():
        layer: Any = copy.get_submodule(name)
        weight = layer.weight
        layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        notes.append(
            f"{name} shared its weight with {embedding}: in the cut model each has its own, which "
            "its own block trains"
        )
    config: Any = getattr(copy, "config", None)
    # transformers would tie them again when it saves or loads the model.
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
    return copy, tuple(notes)


def _tied(model: nn.Module) -> dict[str, str]:
    """Return the linear layers that share a weight with an embedding, with the embedding's name."""
    embeddings: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            embeddings.setdefault(_key_of_weight(module), name)
    pairs = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and _key_of_weight(module) in embeddings:
            pairs[name] = embeddings[_key_of_weight(module)]
    return pairs


def _key_of_weight(module: nn.Module) -> int:
    """Return the `id` of a module's parameter `weight`; of the module where it has none.

    Not by `module.weight`: a parametrised module computes that, and a spectral norm then changes
    its buffers.
    """
    return id(module._parameters.get("weight", module))
