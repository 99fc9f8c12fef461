from __future__ import annotations

import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.compiler.trace.trace import trace
from sffx.errors import TraceError
from tests.compiler.trace.oracle import assert_same_logits, cut_without_norms
from tests.toys import Chain, Residual, TwoBranches


def test_the_callers_model_is_untouched():
    model = Residual().train()
    model.block1.bn1.eval()  # a mode of its own, as of a frozen BN
    model.stem.register_forward_hook(lambda *_: None)
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    identities = [id(p) for p in model.parameters()]
    children = [name for name, _ in model.named_modules()]

    net = sffx.transform(model)
    sffx.sff_loss(net(torch.randn(4, 3, 8, 8)), torch.tensor([0, 1, 2, 3])).backward()

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [id(p) for p in model.parameters()] == identities
    assert [name for name, _ in model.named_modules()] == children
    assert all(p.grad is None for p in model.parameters())
    assert len(model.stem._forward_hooks) == 1


def test_a_frozen_bn_stays_in_eval_mode():
    model = Residual().train()
    model.block1.bn1.eval()
    net = sffx.transform(model)
    assert not net.block_1.block1.bn1.training
    assert net.block_1.block1.bn2.training
    assert net.training


def _gradients(net: nn.Module) -> dict[str, Tensor]:
    x = torch.linspace(-1, 1, 4 * 3 * 8 * 8).view(4, 3, 8, 8)
    torch.manual_seed(0)  # for the dropout
    sffx.local_loss(net.train(), x, torch.tensor([0, 1, 2, 3])).backward()
    return {name: p.grad for name, p in net.named_parameters()}


def test_under_inference_mode_as_outside():
    model = Residual()
    outside = sffx.transform(model)
    with torch.inference_mode():
        inside = sffx.transform(model)
    assert inside.plan == outside.plan
    assert not any(t.is_inference() for t in (*inside.parameters(), *inside.buffers()))
    inside.load_state_dict(outside.state_dict())  # the heads start at random
    expected = _gradients(outside)
    found = _gradients(inside)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_model_that_cannot_be_copied_says_why():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    model.kept = threading.Lock()
    message = r"Sequential cannot be copied: .*lock.*Hint: it keeps something as an attribute"
    with pytest.raises(TraceError, match=message):
        trace(model)


def test_a_traced_model_does_not_stay():
    torch.overrides.get_ignored_functions.cache_clear()  # as in a process that has not traced yet
    torch.overrides._get_tensor_methods.cache_clear()
    torch.overrides._get_overridable_functions.cache_clear()
    model = TwoBranches()
    gone = weakref.ref(trace(model).root)
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert kept() is None


def test_threads_trace_one_after_the_other():
    zeros, model = torch.zeros, Chain()
    names = [node.name for node in trace(model).graph.nodes]
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: trace(model), range(6)):
            assert [node.name for node in found.graph.nodes] == names
    assert torch.zeros is zeros


class _Constants(nn.Module):
    """Computes with tensors that are plain attributes, no buffers."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.embed, self.mix, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.table = torch.linspace(-1, 1, 60).view(10, 6)
        self.tables = [self.table, {"half": 0.5 * self.table}]

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        constant = {
            "sliced": lambda: self.table[: x.shape[1]],
            "scaled": lambda: (0.5 * self.table)[:5],
            "in a list": lambda: self.tables[0][:5],
            "in a dict": lambda: self.tables[1]["half"][:5],
            "as it is": lambda: self.table[:5].exp(),
        }
        return self.out(self.mix(torch.relu(x + constant[self.way]())).mean(1))


@pytest.mark.parametrize("way", ["sliced", "scaled", "in a list", "in a dict", "as it is"])
def test_constants_have_values(way):
    torch.manual_seed(0)
    model, x = _Constants(way), torch.randn(7, 5, 4)
    net = cut_without_norms(model, example=x).train()
    tensors = (*net.parameters(), *net.buffers())
    assert all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
    assert_same_logits(net, model, x)
