"""The cosine goodness against its definition, in every layout."""

import pytest
import torch
import torch.nn.functional as F

import sffx
from sffx.learning.cosine import CosineGoodness
from sffx.learning.pooling import _pooled_by_products
from tests.learning.values import LAYOUTS
from tests.toys import Chain


@pytest.mark.parametrize("hidden", [None, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_every_layout(layout, hidden):
    shape, axis = LAYOUTS[layout]
    torch.manual_seed(0)
    head = CosineGoodness(6, 3, axis, len(shape) - 1, hidden=hidden).double()
    y = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    assert head(y).shape == (2, 3)
    names = [name for name, _ in head.named_parameters()]
    assert torch.autograd.gradcheck(
        lambda y, *w: torch.func.functional_call(head, dict(zip(names, w, strict=True)), (y,)),
        (y, *head.parameters()),
    )


def test_image_by_hand():
    head = CosineGoodness(3, 5, scale=2.0)
    y = torch.randn(4, 3, 4, 6)
    regions = [y[:, :, h : h + 2, w : w + 3].mean((2, 3)) for h in (0, 2) for w in (0, 3)]
    features = torch.stack(regions, dim=2).flatten(1)
    expected = 2 * F.cosine_similarity(
        (features - features.mean(1, keepdim=True))[:, None], head.weight[None], dim=2
    )
    torch.testing.assert_close(head(y), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("shape", "regions"), [((4, 6), 2), ((7, 5), 3), ((2, 9), 4), ((5, 4, 7), 2)]
)
def test_regions_in_an_exported_file_are_those_of_adaptive_pooling(shape, regions):
    y = torch.randn(3, 5, *shape, dtype=torch.float64)
    pool = {2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[len(shape)]
    torch.testing.assert_close(_pooled_by_products(y, regions), pool(y, regions))


def test_hidden_layer_by_hand():
    head = CosineGoodness(3, 5, hidden=7)
    y = torch.randn(4, 3, 4, 6)
    even = F.layer_norm(F.adaptive_avg_pool2d(y, 2).flatten(1), (12,))
    hidden = torch.relu(even @ head.hidden.weight.t() + head.hidden.bias)
    expected = 10 * F.cosine_similarity(
        (hidden - hidden.mean(1, keepdim=True))[:, None], head.weight[None], dim=2
    )
    torch.testing.assert_close(head(y), expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("value", [0.0, 7.3])
def test_gradient_of_a_constant_output_is_bounded(value):
    head = CosineGoodness(3, 5)
    y = torch.full((2, 3, 4, 4), value, requires_grad=True)
    (gradient,) = torch.autograd.grad(head(y)[:, 0].sum(), y)
    assert gradient.abs().max() < 1e3
    torch.testing.assert_close(head(y), torch.zeros(2, 5), atol=1e-2, rtol=0)


def test_neither_the_length_of_the_output_nor_a_constant_counts():
    head = CosineGoodness(3, 5)
    y = torch.randn(4, 3, 4, 4)
    torch.testing.assert_close(head(7 * y + 3), head(y), atol=1e-3, rtol=1e-3)
    assert head(y).abs().max() <= 10


@pytest.mark.parametrize("hidden", [None, 8])
def test_padding_changes_neither_the_goodness_nor_a_gradient(hidden):
    head = CosineGoodness(6, 4, channel_axis=2, spatial=1, hidden=hidden).double()
    y = torch.randn(2, 5, 6, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 0]])
    padded = torch.where(mask.bool()[:, :, None], y, 1e3).requires_grad_()
    expected = torch.cat([head(y[i][mask[i].bool()][None]) for i in range(2)])
    torch.testing.assert_close(head(padded, mask), expected)
    (gradient,) = torch.autograd.grad(head(padded, mask).sum(), padded)
    assert not gradient[~mask.bool()].any()


@pytest.mark.parametrize("hidden", [None, 8])
def test_low_precision_is_computed_in_float32(hidden):
    head = CosineGoodness(8, 4, hidden=hidden)
    y = torch.randn(2, 8, 4, 4).bfloat16()
    assert torch.equal(head(y), head(y.float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(y), head(y.float()))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("goodness", ["cosine", "mlp"])
def test_cut_model_learns_locally_and_exports(tmp_path, goodness):
    torch.manual_seed(0)
    net = (
        sffx.transform(Chain(), example_input=torch.zeros(1, 3, 8, 8), goodness=goodness)
        .double()
        .train()
    )
    x, y = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    sffx.local_loss(net, x, y).backward()
    local = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    sffx.sff_loss(net(x), y).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(local, net.parameters(), strict=True))
    sffx.export_onnx(net, tmp_path / "net.onnx")  # which compares with ONNX Runtime
