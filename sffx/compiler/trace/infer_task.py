"""Infer what a model predicts from its output, where that is clear.

| output | task |
|---|---|
| (B, J), J of 2 or more | classes of a sample |
| (B,), (B, 1) | a number |
| (B, J, H, W) called "out" or "logits", or alone and as large as an image that is read | pixels |
| (B, J, D, H, W) likewise | voxels |
| (B, T, J) called "logits", or alone and of the tokens that the model reads | classes of tokens |
| (B, T, V) of a class that transformers names "...ForCausalLM" or "...LMHeadModel" | next token |

What is inferred but for classes of a sample is noted in the plan. What is not clear is refused, and
`task=` of `transform` says it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from sffx.errors import TraceError, backbone_hint
from sffx.tasks import (
    CLASSIFICATION,
    LanguageModel,
    MultiLabel,
    Regression,
    Segmentation,
    Task,
    TokenClassification,
)

# Tasks by `config.problem_type`, an attribute of models of transformers.
_PROBLEM_TYPES: dict[str, Task] = {
    "multi_label_classification": MultiLabel(),
    "regression": Regression(),
}

# The ends of the names that transformers gives to language models that predict the next token.
_CAUSAL = ("ForCausalLM", "LMHeadModel")


def infer_task(model: nn.Module, output: Tensor, place: str, inputs: Sequence[Any]) -> Task:
    """Return the task of a model.

    Args:
        model: the model.
        output: an example of its output, a float tensor with the batch first.
        place: of the output in what the model returns: "only", "logits", "out" or "".
        inputs: examples of its inputs.

    Raises:
        TraceError: it is not clear.
    """
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem in _PROBLEM_TYPES and _PROBLEM_TYPES[problem].could_be_output(output.shape):
        return _PROBLEM_TYPES[problem]
    if output.ndim == 2 and output.shape[1] > 1:
        return CLASSIFICATION
    if output.ndim == 1 or tuple(output.shape[1:]) == (1,):
        return Regression()
    if output.ndim > 3 and _is_of_pixels(output, place, inputs):
        return Segmentation().settled(output.shape)
    if output.ndim == 3 and _is_of_tokens(model, output, place, inputs):
        return _task_of_tokens(model, output)
    raise unclear(model, output)


def _is_of_pixels(output: Tensor, place: str, inputs: Sequence[Any]) -> bool:
    if place in ("out", "logits"):
        return True
    if place != "only":
        return False
    shapes = [value.shape for value in inputs if isinstance(value, Tensor)]
    # What looks like an image that it was made from may be an image.
    if output.shape in shapes:
        return False
    return output.shape[2:] in [shape[2:] for shape in shapes]


def _is_of_tokens(model: nn.Module, output: Tensor, place: str, inputs: Sequence[Any]) -> bool:
    if place == "logits":
        return True
    # A backbone returns features of the width of its embedding.
    widths = [layer.embedding_dim for layer in _embeddings(model)]
    if place != "only" or output.shape[2] in widths:
        return False
    for value in inputs:
        is_tokens = isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point()
        if is_tokens and value.shape == output.shape[:2]:
            return True
    return False


def _task_of_tokens(model: nn.Module, output: Tensor) -> Task:
    """Return the task of a model of tokens.

    Raises:
        TraceError: it may be a language model of the next token or of masked ones.
    """
    vocabularies = [layer.num_embeddings for layer in _embeddings(model)]
    if output.shape[2] not in vocabularies:
        return TokenClassification()
    if type(model).__name__.endswith(_CAUSAL):
        return LanguageModel()
    raise TraceError(
        f"{type(model).__name__} returns {described(output)}, as wide as its vocabulary, which may "
        "be the next token or the token itself. Hint: task=sffx.tasks.LanguageModel() for the next "
        "token, or task=sffx.tasks.TokenClassification() for masked tokens"
    )


def _embeddings(model: nn.Module) -> list[nn.Embedding]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Embedding)]


def unclear(model: nn.Module, value: object) -> TraceError:
    """Return the error of a model whose output has no clear task."""
    axes = value.ndim if isinstance(value, Tensor) else 0
    # What the values may be, by the number of their axes.
    hints = {
        3: "for scores of tokens, (B, T, J), pass task=sffx.tasks.TokenClassification(); for "
        "numbers of tokens, (B, T, N), task=sffx.tasks.TokenRegression(); for scores of a signal, "
        "(B, J, T), task=sffx.tasks.Segmentation(); for one number of each pixel, (B, H, W), "
        "task=sffx.tasks.DenseRegression(); ",
        4: "for classes of pixels, pass task=sffx.tasks.Segmentation(); for masks of 0 and 1, "
        "task=sffx.tasks.MultiLabelSegmentation(); for numbers of pixels, "
        "task=sffx.tasks.DenseRegression(); ",
        5: "for classes of voxels, pass task=sffx.tasks.Segmentation(); for masks of 0 and 1, "
        "task=sffx.tasks.MultiLabelSegmentation(); for numbers of voxels, "
        "task=sffx.tasks.DenseRegression(); ",
    }
    return TraceError(
        f"{type(model).__name__} returns {described(value)}, which does not tell the task. "
        f"Hint: {hints.get(axes, '')}{backbone_hint(model)}"
    )


def note_on(task: Task, output: Tensor) -> str:
    """Return the note of the plan on an inferred task."""
    hint = ""
    if isinstance(task, Regression):
        returned = " return it as (B, 1) and" if output.ndim == 1 else ""
        hint = f". Hint: for one logit of two classes{returned} pass task=sffx.tasks.MultiLabel()"
    return f"the task is inferred from the output, {described(output)}: sffx.tasks.{task!r}{hint}"


def described(value: object) -> str:
    """Return what a model returned, in words."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.ndim == 0:
        return "a tensor without axes"
    return f"a tensor of shape {shape_in_words(value)}"


def shape_in_words(value: Tensor) -> str:
    """Write the shape of a value whose first axis is the batch, such as "(B, 10)"."""
    sizes = ", ".join(["B", *map(str, value.shape[1:])])
    return f"({sizes})"
