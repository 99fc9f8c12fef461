"""Batches that batch norms count, put together: the numbers are those of torch in every case."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sffx
from sffx.kernels.batch_counts import counts_added_at_end, counts_postponed


class Normed(nn.Module):
    """Norms of each kind: cumulative, without statistics, called twice, behind a hook, in eval."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.plain = nn.BatchNorm2d(6)
        self.cumulative = nn.BatchNorm2d(6, momentum=None)
        self.untracked = nn.BatchNorm2d(6, track_running_stats=False)
        self.twice = nn.BatchNorm2d(6)
        self.hooked = nn.BatchNorm2d(6)
        self.frozen = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.untracked(self.cumulative(self.plain(self.conv(x)).relu()))
        y = self.frozen(self.hooked(self.twice(self.twice(y).relu())))
        y = self.last(self.second(y)).relu()
        return self.head(y.mean((2, 3)))


@contextmanager
def together(norms: list[nn.Module]) -> Iterator[None]:
    """Let norms count at the end of the context."""
    with counts_added_at_end(True), counts_postponed(lambda: norms):
        yield


def seen_by(norm: nn.Module) -> list[int]:
    """Return a list to which a hook adds the number that a norm has after each forward."""
    seen: list[int] = []
    norm.register_forward_hook(lambda *_: seen.append(int(norm.num_batches_tracked)))
    return seen


class Adds(TorchDispatchMode):
    """Counts additions of whole numbers, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        is_single = name == "aten::add_" and args[0].dtype == torch.int64
        self.count += is_single or name == "aten::_foreach_add_"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("on_block", [None, lambda name, scores, loss: None])
@pytest.mark.parametrize("train", ["local_loss", "block_losses", "local_step"])
def test_a_step_counts_what_the_forward_pass_of_torch_counts(train, on_block):
    torch.manual_seed(0)
    net = sffx.transform(Normed(), ["frozen", "relu_2"], torch.zeros(1, 3, 6, 6)).double()
    net.train()
    net.get_submodule("block_0.frozen").eval()
    twin = copy.deepcopy(net)
    seen = seen_by(net.get_submodule("block_0.hooked"))
    x, y = torch.randn(5, 3, 6, 6).double(), torch.arange(5) % 4
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    for _ in range(3):
        twin(x)
        if train == "local_step":
            sffx.local_step(net, x, y, optimizer, on_block=on_block)
        else:
            getattr(sffx, train)(net, x, y, on_block=on_block)
    expected = twin.state_dict()
    for name, value in net.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert int(net.get_submodule("block_0.twice").num_batches_tracked) == 6
    assert seen == [1, 2, 3]


@pytest.mark.parametrize("on_block", [None, lambda name, scores, loss: None])
def test_one_operation_counts_for_all_norms(on_block):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(4)),
        nn.Flatten(),
        nn.Linear(48, 2),
    )
    net = sffx.transform(model, "module", torch.zeros(1, 3, 4, 4)).train()
    with Adds() as adds:
        sffx.local_loss(net, torch.randn(2, 3, 4, 4), torch.tensor([0, 1]), on_block=on_block)
    # One for each norm where somebody may look in between.
    assert adds.count == (1 if on_block is None else 4)


def test_a_forward_that_fails_has_counted_the_norms_that_ran():
    norms = [nn.BatchNorm1d(2), nn.BatchNorm1d(3), nn.BatchNorm1d(3)]
    twins = copy.deepcopy(norms)
    with pytest.raises(RuntimeError), together(norms):
        nn.Sequential(*norms)(torch.randn(4, 2))
    with pytest.raises(RuntimeError):
        nn.Sequential(*twins)(torch.randn(4, 2))
    for norm, twin in zip(norms, twins, strict=True):
        assert torch.equal(norm.num_batches_tracked, twin.num_batches_tracked)
        assert "num_batches_tracked" not in vars(norm)


def test_the_state_dict_is_whole_while_a_norm_counts():
    norm = nn.BatchNorm1d(2)
    before = norm.state_dict()["num_batches_tracked"]
    with together([norm]):
        norm(torch.randn(4, 2))
        assert norm.state_dict()["num_batches_tracked"] is not None
    assert norm.num_batches_tracked.data_ptr() == before.data_ptr()
    assert int(before) == 1


def test_norms_that_share_their_number_both_count():
    first, second = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    second.num_batches_tracked = first.num_batches_tracked
    with together([first, second, first]):
        second(first(torch.randn(4, 2)))
    assert int(first.num_batches_tracked) == 2


def test_a_norm_of_another_kind_counts_itself():
    synced = nn.SyncBatchNorm(2)
    with together([synced, nn.BatchNorm1d(2, momentum=None), nn.LayerNorm(2)]):
        assert "num_batches_tracked" not in vars(synced)
