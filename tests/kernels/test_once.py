"""No derivative of a gradient is silently missing."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch
from torch import Tensor, fx, nn
from torch.autograd import Function, forward_ad

import sffx
from sffx import kernels
from sffx.kernels.once import HandWritten
from tests.toys import kept


@kept
def case(goodness: str) -> tuple[fx.GraphModule, Tensor, Tensor]:
    """Return a net, and a batch."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, 3))
    x = torch.randn(4, 2, 8, 8)
    return sffx.transform(model, "layer", x, goodness=goodness).train(), x, torch.arange(4) % 3


@pytest.mark.parametrize("goodness", ["sff", "mlp", "cosine", "cwc"])
def test_a_penalty_on_gradients_is_refused(goodness: str) -> None:
    net, x, y = case(goodness)
    parameters = [p for p in net.parameters() if p.requires_grad]
    loss = sffx.sff_loss(net(x), y)
    refused = pytest.raises(sffx.InputError, match=r"second derivatives.*Hint: leave it out")
    with refused:
        torch.autograd.grad(loss, parameters, create_graph=True)
    of_step = sffx.local_loss(net, x, y)
    with refused:
        torch.autograd.grad(of_step, parameters, create_graph=True)
    of_step.backward()  # the gradients are still there
    of_scores = net(x.requires_grad_())[0].sum()
    with refused:
        torch.autograd.grad(of_scores, x, create_graph=True)


# torch's own, of the first derivative forwards in a process.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
@pytest.mark.parametrize("goodness", ["sff", "mlp", "cosine", "cwc"])
def test_the_transforms_of_torch_are_refused(goodness: str) -> None:
    net, x, y = case(goodness)
    parameters = dict(net.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return sffx.sff_loss(torch.func.functional_call(net, parameters, (x,)), y)

    assert loss(parameters).isfinite()
    net.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for transformed in (
        lambda: torch.func.grad(loss)(parameters),
        lambda: torch.func.jacrev(net)(x),
        lambda: torch.func.jvp(net, (x,), (x,)),
        lambda: torch.func.vmap(lambda one: net(one[None]))(x),
        lambda: _forwards(net, x),
    ):
        with pytest.raises(
            sffx.InputError, match=r"do not pass what a cut model.*Hint: loss\.back"
        ):
            transformed()
    assert all(torch.equal(before[name], net.state_dict()[name]) for name in before)


def _forwards(net: fx.GraphModule, x: Tensor) -> None:
    with forward_ad.dual_level():
        net(forward_ad.make_dual(x, x))


def test_every_kernel_refuses_it() -> None:
    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        importlib.import_module(module.name)
    own = [each for each in Function.__subclasses__() if each.__module__.startswith("sffx.")]
    assert own == [HandWritten], "a kernel that does not refuse transforms of torch.func"
    every = HandWritten.__subclasses__()
    assert len(every) > 8
    for each in every:
        with pytest.raises(sffx.InputError, match="second derivatives"), torch.enable_grad():
            each.backward(None, torch.zeros(()))
