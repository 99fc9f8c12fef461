from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sffx.compiler.fake import fake_copy, fake_copy_but_constants, fake_tensors
from sffx.tensors import storage_key


class _Mixed(nn.Module):
    """Parameters, two buffers with one storage, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3).t())
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.register_buffer("whole", torch.randn(6))
        self.register_buffer("folded", self.whole.view(2, 3))
        self.constant = torch.randn(5)


def _like(tensor: Tensor) -> tuple[object, ...]:
    kind = isinstance(tensor, nn.Parameter)
    return kind, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def test_twins_are_like_the_originals():
    model = _Mixed()
    twin = fake_copy(model, FakeTensorMode())
    originals = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    twins = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    assert twins.keys() == originals.keys()
    for name, tensor in twins.items():
        assert isinstance(tensor, FakeTensor), name
        assert _like(tensor) == _like(originals[name]), name
    assert storage_key(twin.folded) == storage_key(twin.whole)


def test_tensors_that_share_a_storage_are_left_to_torch():
    model = _Mixed()
    assert fake_tensors(model, FakeTensorMode()).keys() == {id(model.weight), id(model.frozen)}


def test_constants_keep_their_values():
    model = _Mixed()
    twin = fake_copy_but_constants(model, FakeTensorMode())
    assert torch.equal(twin.constant, model.constant)
    assert isinstance(twin.whole, FakeTensor)
