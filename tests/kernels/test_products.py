"""Products by oneDNN are those by torch's own operations, and are taken where they are faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sffx.kernels import products

# One product of these sizes has as many multiply-adds as oneDNN wants.
M, K, N = 160, 256, 128

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that oneDNN multiplied, on any processor."""
    shapes: list[tuple[int, ...]] = []
    linear = products._linear

    def recorded(rows: Tensor, weight: Tensor) -> Tensor:
        shapes.append((*rows.shape, len(weight)))
        return linear(rows, weight)

    monkeypatch.setattr(products, "_linear", recorded)
    monkeypatch.setattr(products, "_has_onednn", lambda: True)
    return shapes


def matrices(*shape: int, transposed: bool) -> Tensor:
    *batch, rows, columns = shape
    return torch.randn(*batch, columns, rows).mT if transposed else torch.randn(*shape)


FUNCTIONS: dict[str, tuple[Callable[..., Tensor | None], Callable[..., Tensor]]] = {
    "product": (lambda a, b, c: products.product(a[0], b[0]), lambda a, b, c: a[0] @ b[0]),
    "add_product": (
        lambda a, b, c: products.add_product(c[0, 0], a[0], b[0], 3.0),
        lambda a, b, c: 3 * (a[0] @ b[0] + c[0, 0]),
    ),
    "product_added": (
        lambda a, b, c: products.product_added(c[0].clone(), a[0], b[0], 2.0),
        lambda a, b, c: 2 * a[0] @ b[0] + c[0],
    ),
    "products": (lambda a, b, c: products.products(a, b), lambda a, b, c: a @ b),
    "add_products": (
        lambda a, b, c: products.add_products(c[:, :, :1], a, b, beta=0.5, alpha=2.0),
        lambda a, b, c: 2 * a @ b + 0.5 * c[:, :, :1],
    ),
    "add_products without a bias": (
        lambda a, b, c: products.add_products(c[:, :, :1] * torch.nan, a, b, beta=0, alpha=2.0),
        lambda a, b, c: 2 * a @ b,
    ),
    "sum_of_products": (
        lambda a, b, c: products.sum_of_products(None, a, b, c[0]),
        lambda a, b, c: (a @ b).sum(0),
    ),
    "sum_of_products with a total": (
        lambda a, b, c: products.sum_of_products(c[0].clone(), a, b, c[0]),
        lambda a, b, c: (a @ b).sum(0) + c[0],
    ),
}


@needs_onednn
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("layout", ["ab", "aT b", "a bT", "aT bT"])
@pytest.mark.parametrize("sizes", [(M, K, N), (N, K, M)])
def test_products_by_onednn(
    name: str, layout: str, sizes: tuple[int, int, int], taken: list[tuple[int, ...]]
) -> None:
    torch.manual_seed(0)
    rows, inner, columns = sizes
    a = matrices(3, rows, inner, transposed="aT" in layout)
    b = matrices(3, inner, columns, transposed="bT" in layout)
    c = torch.randn(3, rows, columns)
    function, oracle = FUNCTIONS[name]
    found = function(a, b, c)
    assert found is not None
    assert taken
    exact = oracle(a.double(), b.double(), c.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


@needs_onednn
@pytest.mark.parametrize("transposed", [False, True])
def test_onednn_reads_no_weight_with_gaps(
    transposed: bool, monkeypatch: pytest.MonkeyPatch, taken: list[tuple[int, ...]]
) -> None:
    weights = []
    pointwise = torch.ops.mkldnn._linear_pointwise

    def recorded(rows: Tensor, weight: Tensor, *others: Any) -> Tensor:
        weights.append(weight)
        return pointwise(rows, weight, *others)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", recorded)
    a = matrices(2 * M, 2 * K, transposed=transposed)[:M, :K]
    b = matrices(2 * K, 2 * N, transposed=transposed)[:K, :N]
    torch.testing.assert_close(products.product(a, b), a @ b, rtol=1e-4, atol=1e-4)
    # The result has so many rows that it is written in parts.
    a = matrices(2**10, 64, transposed=transposed)
    b = matrices(64, 2**10 - 1, transposed=transposed)
    torch.testing.assert_close(products.product(a, b), a @ b, rtol=1e-4, atol=1e-4)
    assert all(each.is_contiguous() or each.t().is_contiguous() for each in weights)
    assert weights


@needs_onednn
def test_a_weight_may_stand_for_each_sample(taken: list[tuple[int, ...]]) -> None:
    weight, y = torch.randn(M, K), torch.randn(3, K, N)
    found = products.products(weight.expand(3, -1, -1), y)
    assert len(taken) == 3
    torch.testing.assert_close(found, weight @ y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.randn(M, K).double(), torch.randn(K, N).double()),
        (torch.randn(M, K).bfloat16(), torch.randn(K, N).bfloat16()),
        (torch.randn(8, 8), torch.randn(8, 8)),
        (torch.randn(4, 2**11), torch.randn(2**11, 2**10)),
        (torch.randn(0, K), torch.randn(K, N)),
    ],
    ids=["float64", "bfloat16", "small", "few rows", "no rows"],
)
def test_other_products_are_those_of_torch(
    a: Tensor, b: Tensor, taken: list[tuple[int, ...]]
) -> None:
    assert torch.equal(products.product(a, b), a @ b)
    assert not taken


def test_counters_see_operations_of_torch(taken: list[tuple[int, ...]]) -> None:
    with FakeTensorMode():
        products.product(torch.randn(M, K), torch.randn(K, N))
    assert not taken


# torch warns of a setting of other devices, which the context restores.
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_onednn_can_be_switched_off(taken: list[tuple[int, ...]]) -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        products.product(torch.randn(M, K), torch.randn(K, N))
    assert not taken
