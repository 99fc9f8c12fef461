"""Products of matrices on a CPU, by the fastest library that torch has for them.

torch multiplies float32 matrices by MKL. On AMD's processors MKL uses half of what a core can do.
oneDNN, by which torch computes convolutions, uses all of it. On two cores of such a processor
products of the heads take half the time by oneDNN. torch has it as an operation that its compiler
uses for linear layers.

Small products, other devices, other dtypes and graphs in the making use torch's own operations.
`torch.backends.mkldnn.flags(enabled=False)` switches oneDNN off, here as in torch.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sffx.kernels.batch_slices import small_slices

# With fewer multiply-adds than this, a call of oneDNN takes longer than MKL's product.
_LEAST_MACS = 2**22

# A large result is written part by part, so that what oneDNN returns is small beside it. It has so
# many parts at most, each of so many values at least.
_MOST_PARTS = 4
_LEAST_VALUES = 2**18

# A product that has so few rows or columns is no faster by oneDNN.
_FEW = 8


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b, (M, N), for a (M, K) and b (K, N)."""
    return _by_onednn(a, b) if _is_faster(a, b) else a @ b


def add_product(bias: Tensor, a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
    """Return factor (a b + bias), (M, N), for a bias that broadcasts."""
    if _is_faster(a, b):
        total = _by_onednn(a, b).add_(bias)
        return total if factor == 1 else total.mul_(factor)
    return torch.addmm(bias, a, b, beta=factor, alpha=factor)


def product_added(total: Tensor | None, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """Return alpha a b, added to a total in place where there is one."""
    if total is None:
        found = product(a, b)
        return found if alpha == 1 else found.mul_(alpha)
    if not _is_faster(a, b):
        return total.addmm_(a, b, alpha=alpha)
    _write(total, total, a, b, alpha)
    return total


def products(a: Tensor, b: Tensor) -> Tensor:
    """Return the products of each sample, (B, M, N), for a (B, M, K) and b (B, K, N)."""
    return _each(None, a, b, 1.0) if _is_faster(a, b) else torch.bmm(a, b)


def add_products(
    bias: Tensor, a: Tensor, b: Tensor, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """Return alpha a b + beta bias of each sample, (B, M, N), for a bias that broadcasts.

    A beta of 0 leaves the bias out, whatever its values are.
    """
    if not _is_faster(a, b):
        return torch.baddbmm(bias, a, b, beta=beta, alpha=alpha)
    scaled = beta * bias if beta else None
    return _each(scaled, a, b, alpha)


def sum_of_products(total: Tensor | None, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Return the sum over samples of a b, (J, C), for a (B, J, P) and b (B, P, C).

    Args:
        total: the sum is added to it in place, where there is one.
        a: the gradient of z.
        b: the values that z was made from.
        weight: whose gradient the sum is, (J, C).
    """
    if len(a) and _is_faster(a, b):
        for i in range(len(a)):
            total = product_added(total, a[i], b[i])
        assert total is not None  # there is a sample
        return total
    if a.device.type != "cpu" or has_many_classes(weight, a.shape[2]):
        if total is not None:
            return total.addbmm_(a, b)
        # With a beta of 0, the values of the first argument do not count.
        return torch.addbmm(weight, a, b, beta=0)
    # On a CPU, `addbmm` computes one small product after the other.
    for part in small_slices(a, weight.numel()):
        found = torch.bmm(a[part], b[part]).sum(0)
        total = found if total is None else total.add_(found)
    assert total is not None  # there is always a slice
    return total


def has_many_classes(weight: Tensor, positions: int) -> bool:
    """Return whether the weight, (J, C), is large beside what one sample adds to its gradient."""
    return weight.shape[0] > 2 * positions


def _by_onednn(a: Tensor, b: Tensor) -> Tensor:
    if not _is_swapped(a, b):
        return _linear(a, b.t())
    # Rows must lie in memory as torch's own product has them.
    out = a.new_empty(len(a), b.shape[1])
    _write(out, None, a, b, 1.0)
    return out


def _each(bias: Tensor | None, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Return alpha a b + bias of each sample, (B, M, N), by oneDNN."""
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    biases = bias.expand_as(out) if bias is not None else None
    for i in range(len(a)):
        own = biases[i] if biases is not None else None
        _write(out[i], own, a[i], b[i], alpha)
    return out


def _write(out: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, alpha: float) -> None:
    """Write alpha a b + bias, part by part: nothing large lies beside the result."""
    if _is_swapped(a, b):
        # Of the parts of a transposed matrix, oneDNN would make copies.
        bias_t = bias.t() if bias is not None else None
        _write_rows(out.t(), bias_t, b.t(), a.t(), alpha)
    else:
        _write_rows(out, bias, a, b, alpha)


def _write_rows(out: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, alpha: float) -> None:
    columns = b.shape[1]
    least_rows = _LEAST_VALUES // columns
    rows_of_most_parts = math.ceil(len(a) / _MOST_PARTS)
    rows = max(least_rows, rows_of_most_parts)
    for start in range(0, len(a), rows):
        part = slice(start, start + rows)
        found = _linear(a[part], b.t())
        if bias is not None:
            torch.add(bias[part], found, alpha=alpha, out=out[part])
        else:
            torch.mul(found, alpha, out=out[part])


def _is_swapped(a: Tensor, b: Tensor) -> bool:
    # Of two transposed matrices, oneDNN takes up to four times as long if the larger one is first.
    return a.stride(0) == 1 and a.shape[0] > b.shape[1]


def _linear(rows: Tensor, weight: Tensor) -> Tensor:
    # oneDNN takes a thousand times as long with a weight that has gaps in memory.
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")


def _is_faster(a: Tensor, b: Tensor) -> bool:
    """Return whether oneDNN computes the product of (..., M, K) and (..., K, N), and faster."""
    are_float32 = a.dtype == torch.float32 and b.dtype == torch.float32
    if a.device.type != "cpu" or not are_float32:
        return False
    rows, inner = a.shape[-2:]
    columns = b.shape[-1]
    macs = rows * inner * columns
    if macs < _LEAST_MACS or min(rows, inner, columns) < _FEW:
        return False
    # Counters of memory and of multiply-adds know torch's own operations.
    if torch.compiler.is_compiling() or isinstance(a, FakeTensor):
        return False
    return _has_onednn() and bool(torch.backends.mkldnn.enabled)


@cache
def _has_onednn() -> bool:
    """Return whether torch has oneDNN's product, and the processor AVX-512, where it is faster."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    has_operation = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and has_operation
