"""A head of flat values on many rows, part by part of them, with less memory and time.

A hidden layer at each pixel makes values that are many times as large as the pixels' own. Autograd
would keep several of them. Here nothing of that size is made: a part of the rows goes through the
head while its values are in the processor's cache. The backward pass computes each part again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sffx.kernels.batch_slices import joined, small_slices
from sffx.kernels.once import HandWritten, first_derivatives_only


def by_rows(head: nn.Module, rows: Tensor, width: int) -> Tensor:
    """Return head(rows), (N, J), keeping the rows alone for the backward pass.

    Args:
        head: looks at each row by itself, and draws no random numbers.
        rows: (N, C).
        width: of the largest value that the head computes for a row.
    """
    slices = small_slices(rows, width)
    # A graph that is made, by torch.compile or an exporter, cannot hold the function.
    if len(slices) == 1 or torch.compiler.is_compiling():
        return head(rows)
    parameters = dict(head.named_parameters())
    return _ByRows.apply(rows, head, slices, tuple(parameters), *parameters.values())


class _ByRows(HandWritten):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        head: nn.Module,
        slices: list[slice],
        names: tuple[str, ...],
        *parameters: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(rows, *parameters)
        ctx.head = head
        ctx.slices = slices
        ctx.names = names
        return joined(rows, slices, head)

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, d_scores: Tensor) -> tuple[Tensor | None, ...]:
        rows, *parameters = ctx.saved_tensors
        wants_rows, _, _, _, *wants_parameters = ctx.needs_input_grad
        leaves = [
            parameter.detach().requires_grad_(is_wanted)
            for parameter, is_wanted in zip(parameters, wants_parameters, strict=True)
        ]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        sums = [torch.zeros_like(leaf) for leaf in wanted]
        d_rows = torch.empty_like(rows) if wants_rows else None
        by_name = dict(zip(ctx.names, leaves, strict=True))
        for part in ctx.slices:
            own = rows[part].detach().requires_grad_(wants_rows)
            with torch.enable_grad():
                scores = functional_call(ctx.head, by_name, (own,))
            inputs = [own, *wanted] if wants_rows else wanted
            gradients = list(torch.autograd.grad(scores, inputs, d_scores[part]))
            if d_rows is not None:
                d_rows[part] = gradients.pop(0)
            for total, gradient in zip(sums, gradients, strict=True):
                total += gradient
        found = iter(sums)
        of_parameters = [next(found) if is_wanted else None for is_wanted in wants_parameters]
        return d_rows, None, None, None, *of_parameters
