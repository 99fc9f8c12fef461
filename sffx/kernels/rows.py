"""An activation and a linear layer, part by part of the rows: nothing large lies between them.

A part has few enough values to stay in a processor's cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sffx.kernels.batch_slices import small_slices
from sffx.kernels.chain import Chain


def output_by_rows(x: Tensor, weight: Tensor, bias: Tensor | None, chain: Chain) -> Tensor:
    """Return the linear layer's output, (..., out), for x (..., in)."""
    rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty(len(rows), len(weight))
    for part in small_slices(rows, rows.shape[1]):
        y = chain.activated(rows[part])
        if bias is None:
            torch.mm(y, weight.t(), out=out[part])
        else:
            torch.addmm(bias, y, weight.t(), out=out[part])
    return out.view(*x.shape[:-1], len(weight))


def gradients_by_rows(
    dout: Tensor, x: Tensor, weight: Tensor, chain: Chain, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, of the weight and of the bias, those that are wanted."""
    assert chain.activation is not None  # what `Chain.by_rows` says
    wants_x, wants_weight, wants_bias = wanted
    rows = x.reshape(-1, x.shape[-1])
    dout_rows = dout.reshape(-1, dout.shape[-1])
    dx = None
    if wants_x:
        dx = rows if chain.overwrite else torch.empty_like(rows)
    dw = torch.zeros_like(weight) if wants_weight else None
    for part in small_slices(rows, rows.shape[1]):
        if dw is not None:
            dw.addmm_(dout_rows[part].t(), chain.activated(rows[part]))
        if dx is not None:
            # The weight's gradient comes first: this may be written over the rows themselves.
            dx[part] = chain.activation.write_gradient(dout_rows[part] @ weight, rows[part])
    db = dout_rows.sum(0) if wants_bias else None
    if dx is not None:
        # A view would keep x, and with it its memory, as long as autograd holds the gradient.
        dx = dx.view_as(x).data
    return dx, dw, db
