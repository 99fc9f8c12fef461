"""A cut model inside the wrappers of other libraries: unwrapped, or refused by name."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import timm.utils
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import sffx
from sffx.errors import InputError
from tests.toys import Chain, kept

X = torch.zeros(2, 3, 8, 8)
Y = torch.tensor([0, 1])
compiled = functools.partial(torch.compile, backend="eager")

WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": compiled,
    "AveragedModel": AveragedModel,
    "DataParallel": nn.DataParallel,
    "timm's EMA": timm.utils.ModelEmaV3,
    "two": lambda net: compiled(nn.DataParallel(net)),
}


@kept
def cut() -> nn.Module:
    torch.manual_seed(0)
    return sffx.transform(Chain(), "layer", X).train()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_net_is_evaluated_extracted_exported_and_saved(wrap, tmp_path):
    net = cut()
    wrapped = wrap(copy.deepcopy(net))
    loader = [(torch.randn(2, 3, 8, 8), Y)]
    assert str(sffx.evaluate(wrapped, loader)) == str(sffx.evaluate(net, loader))
    assert sffx.footprint(wrapped, 2) == sffx.footprint(net, 2)
    plain = sffx.extract(wrapped)
    assert type(plain) is Chain
    sffx.export_program(wrapped, tmp_path / "net.pt2")
    sffx.save_checkpoint(tmp_path / "net.pt", wrapped)
    loaded = sffx.load_checkpoint(tmp_path / "net.pt").net(Chain())
    for name, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert sffx.EarlyExit(wrapped)(X).scores.shape == (2, 4)
    sffx.weigh(wrapped, loader)


@pytest.mark.parametrize("step", ["local_loss", "local_step", "block_losses", "LocalLoss"])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_step_does_not_ignore_a_compilation(step, in_place):
    net = cut()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    if in_place:
        net.compile(backend="eager")
    else:
        net = compiled(net)
    calls = {
        "local_loss": lambda: sffx.local_loss(net, X, Y),
        "local_step": lambda: sffx.local_step(net, X, Y, optimizer),
        "block_losses": lambda: sffx.block_losses(net, X, Y),
        "LocalLoss": lambda: sffx.LocalLoss(net)(X, Y),
    }
    with pytest.raises(InputError, match=r"net was compiled as a whole.*Hint:.*sffx.compile"):
        calls[step]()


def test_compiled_blocks_train_as_they_do_uncompiled():
    net = cut()
    twin = copy.deepcopy(net)
    for block in net.plan.all_blocks:
        net.get_submodule(block.target).compile(backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 8, 8)
    found, expected = sffx.local_loss(net, x, Y), sffx.local_loss(twin, x, Y)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    ("wrap", "hint"),
    [
        (AveragedModel, r"net is a AveragedModel, not a cut model\. Hint: pass net\.module"),
        (sffx.LocalLoss, r"net is a LocalLoss, not a cut model\. Hint: pass net\.net"),
    ],
)
def test_a_step_on_a_wrapped_net_names_what_to_pass(wrap, hint):
    with pytest.raises(InputError, match=hint):
        sffx.local_loss(wrap(cut()), X, Y)


def test_a_plain_model_with_one_child_is_no_wrapper():
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Chain()

    with pytest.raises(InputError, match=r"net is a Whole, not a cut model\. Hint: pass what"):
        sffx.evaluate(Whole(), [(X, Y)])


@pytest.mark.parametrize("nested", [False, True])
def test_a_shallow_copy_is_a_cut_model_with_the_same_layers(nested):
    example = {"images": {"left": X, "right": X}} if nested else X
    net = sffx.transform(_OfTwo() if nested else Chain(), "layer", example).train()
    twin = copy.copy(net)
    assert twin.graph.owning_module is twin
    assert net.graph.owning_module is net
    assert dict(twin.named_parameters()) == dict(net.named_parameters())
    assert torch.equal(sffx.local_loss(twin, example, Y), sffx.local_loss(net, example, Y))
    assert str(sffx.extract(twin)) == str(sffx.extract(net))


class _OfTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.chain = Chain()

    def forward(self, images: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.chain(images["left"] + images["right"])


def test_an_argument_that_the_example_lacked_is_refused_by_name():
    net = sffx.transform(_Masked(), "layer", X)
    takes = "the model takes x, and not"
    for call, given in ((lambda: net(X, X), "2 arguments"), (lambda: net(X, mask=X), "mask")):
        with pytest.raises(InputError, match=f"{takes} {given}. Hint: an argument of the model"):
            call()


class _Masked(Chain):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x if mask is None else x * mask)
