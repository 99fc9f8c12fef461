"""Training from cached outputs is training from the images, to the bit."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

import sffx
from sffx import InputError
from sffx.objectives import Objective
from sffx.runtime.cut_values import CutValues
from tests.runtime.three_blocks import CLASSES, cut

SAMPLES = 10


def images() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(SAMPLES, 1, 8, 8, generator=generator)
    return TensorDataset(x, torch.arange(SAMPLES) % CLASSES)


def shuffled(data: Any, **options: Any) -> DataLoader:
    return DataLoader(data, 5, shuffle=True, generator=torch.Generator().manual_seed(2), **options)


def trained(net: fx.GraphModule, data: Any, blocks: Any, **options: Any) -> dict[str, Tensor]:
    """Train for two epochs by local_step, and one by local_loss."""
    net = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(sffx.parameter_groups(net, 1e-2), weight_decay=0.5)
    torch.manual_seed(3)
    loader = shuffled(data, **options)
    for epoch in range(3):
        for x, y in loader:
            if epoch < 2:
                sffx.local_step(net, x, y, optimizer, blocks=blocks)
                continue
            optimizer.zero_grad()
            sffx.local_loss(net, x, y, blocks=blocks).backward()
            optimizer.step()
    return net.state_dict()


def assert_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    for key, value in one.items():
        assert torch.equal(value, two[key]), key


@dataclass(frozen=True)
class Mirrored(Objective):
    """Learns an image and its mirror image, in every step in the same way."""

    name: ClassVar[str] = "mirrored"
    views = 2

    def training_views(self, batch):
        return {name: torch.cat([x, x.flip(-1)]) for name, x in batch.inputs.items()}

    def loss(self, scores, y, place):
        return place.task.loss(scores, y.repeat(2))

    classifier_loss = loss


@pytest.mark.parametrize("place", ["memory", "file"])
@pytest.mark.parametrize(
    ("after", "blocks"),
    [
        ("block_0", ["block_1", "block_2", "classifier"]),
        ("block_1", ["block_2", "classifier"]),
        ("block_2", ["classifier"]),
    ],
)
def test_training_on_cached_outputs_is_training_on_the_images(after, blocks, place, tmp_path):
    net = cut()
    path = None if place == "memory" else tmp_path / "cache.bin"
    cached = sffx.cache_outputs(net, DataLoader(images(), 4), after, path=path)
    assert len(cached) == SAMPLES
    assert cached.after == after
    if path is not None:
        assert path.stat().st_size == cached.nbytes
    expected = trained(net, images(), blocks)
    assert any(not torch.equal(value, net.state_dict()[key]) for key, value in expected.items())
    assert_equal(trained(net, cached, blocks), expected)
    # All blocks behind the cut learn where none is named.
    assert_equal(trained(net, cached, None), expected)


@pytest.mark.parametrize("objective", ["cwc", sffx.objectives.CwC("cwg", superclasses=[[0, 1, 1]])])
def test_other_objectives(objective):
    net = cut(objective)
    cached = sffx.cache_outputs(net, DataLoader(images(), 4), "block_0")
    blocks = ["block_1", "block_2", "classifier"]
    assert_equal(trained(net, cached, blocks), trained(net, images(), blocks))


def test_views_are_cached_only_where_they_are_to_stay():
    for objective in ("ff", Mirrored()):
        with pytest.raises(InputError, match=r"makes new views .*Hint: fixed_views=True"):
            sffx.cache_outputs(cut(objective), DataLoader(images(), 4), "block_0")
    net = cut(Mirrored())
    cached = sffx.cache_outputs(net, DataLoader(images(), 4), "block_0", fixed_views=True)
    x, _ = cached[3]
    assert [value.shape for value in x.values()] == [(2, 6, 8, 8)]
    blocks = ["block_1", "block_2", "classifier"]
    assert_equal(trained(net, cached, blocks), trained(net, images(), blocks))


def test_fixed_negatives_stay_with_their_samples():
    net = cut("ff")
    cached = sffx.cache_outputs(net, DataLoader(images(), 4), "block_0", fixed_views=True)
    losses = [trained(net, cached, ["block_1", "block_2"]) for _ in range(2)]
    assert_equal(*losses)
    # The positive view is that of an image with its own label.
    positive = torch.stack([next(iter(x.values()))[0] for x, _ in cached])
    x, y = images().tensors
    labelled = x.clone()
    labelled[:, 0, 0, :CLASSES] = nn.functional.one_hot(y, CLASSES).float()
    with torch.no_grad():
        output = net.norm_0(net.block_0.eval()(labelled))
    torch.testing.assert_close(positive, output)


def test_a_cache_goes_on_from_an_earlier_one(tmp_path):
    net = cut()
    first = sffx.cache_outputs(net, DataLoader(images(), 4), "block_0", path=tmp_path / "a.bin")
    second = sffx.cache_outputs(net, DataLoader(first, 4), "block_1", path=tmp_path / "a.bin")
    direct = sffx.cache_outputs(net, DataLoader(images(), 4), "block_1")
    for (x, y), (other, label) in zip(second, direct, strict=True):
        assert torch.equal(y, label)
        assert x.keys() == other.keys()
        assert all(torch.equal(x[key], other[key]) for key in x)
    with pytest.raises(InputError, match=r"cached behind block_0. Hint: pass values of an earlier"):
        sffx.cache_outputs(net, DataLoader(second, 4), "block_0")


class Skipping(nn.Module):
    """A model whose last layer reads a value of the first block, and a mask-like second input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 6)
        self.third = nn.Linear(6, 6)
        self.last = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        first = self.first(x).relu()
        second = self.second(first).relu()
        third = self.third(second).relu()
        return self.last(third * scale[:, None])


def test_inputs_that_later_blocks_read_are_cached_with_them(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, 4)
    scale = torch.rand(SAMPLES)
    y = torch.arange(SAMPLES) % CLASSES
    net = sffx.transform(Skipping(), "layer", (x, scale)).train()
    data = [((x[i], scale[i]), y[i]) for i in range(SAMPLES)]
    cached = sffx.cache_outputs(net, DataLoader(data, 3), "block_0", path=tmp_path / "c")
    assert {value.shape for value in cached[0][0].values()} == {(6,), ()}
    both = ["block_1", "block_2", "classifier"]
    flat = TensorDataset(x, scale, y)
    optimizers = []
    nets = [copy.deepcopy(net), copy.deepcopy(net)]
    for each in nets:
        optimizers.append(torch.optim.AdamW(sffx.parameter_groups(each, 1e-2)))
    for x, scale, y in shuffled(flat):
        sffx.local_step(nets[0], (x, scale), y, optimizers[0], blocks=both)
    for x, y in shuffled(cached):
        sffx.local_step(nets[1], x, y, optimizers[1], blocks=both)
    # A matrix product rounds a sample as the size of its batch has it.
    torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_of_other_dtypes_come_back_as_they_were(dtype, tmp_path):
    net = cut().to(dtype)
    x, y = images().tensors
    loader = [(x.to(dtype), y)]
    cached = sffx.cache_outputs(net, loader, "block_1", path=tmp_path / "c")
    with torch.no_grad():
        parts = [net.block_0, net.norm_0, net.block_1, net.norm_1]
        expected = x.to(dtype)
        for part in parts:
            expected = part.eval()(expected)
    found = torch.stack([next(iter(x.values())) for x, _ in cached])
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_samples_are_copies_and_travel_to_worker_processes(tmp_path):
    net = cut()
    cached = sffx.cache_outputs(net, [images().tensors], "block_0", path=tmp_path / "c")
    again = pickle.loads(pickle.dumps(cached))
    x, y = again[-1]
    assert isinstance(x, CutValues)
    value = next(iter(x.values()))
    assert torch.equal(value, next(iter(cached[9][0].values())))
    value.zero_()
    assert next(iter(again[-1][0].values())).any()
    assert y == images()[9][1]
    assert str(cached).startswith("CachedOutputs(10 samples after block_0, ")
    with pytest.raises(IndexError):
        cached[SAMPLES]
    with pytest.raises(InputError, match=r"the index is slice\(None, 2, None\), .*Subset"):
        cached[:2]
    assert isinstance(x.to("cpu"), CutValues)


def test_the_blocks_before_a_cache_and_the_cache_stay_as_they_are():
    net = cut()
    before = copy.deepcopy(net.state_dict())
    sffx.cache_outputs(net, [images().tensors], "block_2")
    assert_equal(net.state_dict(), before)
    assert all(module.training for module in net.modules())


def cached_batch(net: fx.GraphModule) -> tuple[CutValues, Tensor]:
    return next(iter(DataLoader(sffx.cache_outputs(net, [images().tensors], "block_0"), 4)))


def test_blocks_that_cannot_learn_from_a_cache_are_refused():
    net = cut()
    x, y = cached_batch(net)
    for blocks in (["block_0"], ["block_0", "block_1"]):
        with pytest.raises(InputError, match=r"block_0 cannot learn from values .* after block_0"):
            sffx.local_loss(net, x, y, blocks=blocks)
    other = sffx.transform(
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "layer", torch.ones(1, 2)
    )
    with pytest.raises(InputError, match=r"at no cut of net. Hint: cache the outputs of this net"):
        sffx.local_loss(other.train(), CutValues(strange=torch.ones(2, 2)), y)
    with pytest.raises(InputError, match="Hint: "):
        sffx.evaluate(net, [(x, y)])


def test_values_without_the_views_of_an_objective_are_refused():
    x, y = cached_batch(cut())
    with pytest.raises(InputError, match=r"cached norm_0 is .*'ff' has 2 views, \(B, 2, .*Hint: "):
        sffx.local_loss(cut("ff"), x, y)


def test_an_offloaded_net_has_no_cache():
    net = cut()
    x, y = cached_batch(net)
    optimizer = torch.optim.AdamW(sffx.parameter_groups(net, 1e-2))
    sffx.offload(net, optimizer, device="cpu")
    with pytest.raises(InputError, match="offloaded, replicated or sharded has no cached values"):
        sffx.cache_outputs(net, [images().tensors], "block_0")
    with pytest.raises(InputError, match="offloaded, replicated or sharded has no cached values"):
        sffx.local_step(net, x, y, optimizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"after": "block_7"}, "no feature block 'block_7'. Hint: the feature blocks are block_0"),
        ({"after": "classifier"}, "no feature block 'classifier'"),
        ({"after": 1}, "no feature block 1"),
        ({"loader": []}, "the loader yielded no samples. Hint"),
        ({"loader": [torch.ones(2, 1, 8, 8)]}, "not a pair"),
        ({"max_bytes": 2000}, r"after block_0 take more than max_bytes, .* bytes each. Hint"),
        ({"path": "nowhere/cache.bin"}, "nowhere"),
    ],
    ids=str,
)
def test_what_cannot_be_cached(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = {"loader": [images().tensors], "after": "block_0", **options}
    with pytest.raises(InputError, match=message):
        sffx.cache_outputs(cut(), **arguments)
    with pytest.raises(InputError, match=message):
        sffx.cache_outputs(cut(), **{"path": tmp_path / "cache.bin", **arguments})
    assert not (tmp_path / "cache.bin").exists()


def test_samples_of_several_shapes_and_nets_in_eval_mode_are_refused():
    net = cut()
    y = torch.zeros(1, dtype=torch.long)
    loader = [(torch.ones(1, 1, 8, 8), y), (torch.ones(1, 1, 6, 6), y)]
    with pytest.raises(InputError, match=r"norm_0 is \(6, 6, 6\) .*Hint: cache samples of one"):
        sffx.cache_outputs(net, loader, "block_0")
    with pytest.raises(InputError, match="in eval mode"):
        sffx.cache_outputs(net.eval(), loader, "block_0")


class Folded(nn.Module):
    """Folds the frames of a sample into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.second = nn.Conv2d(4, 4, 3)
        self.last = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        batch, frames = x.shape[:2]
        y = self.second(self.first(x.flatten(0, 1)).relu()).relu()
        return self.last(y.mean((2, 3)).unflatten(0, (batch, frames)).mean(1))


def test_frames_that_a_model_folds_into_the_batch_are_cached():
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, 3, 1, 8, 8)
    net = sffx.transform(Folded(), "layer", x).train()
    data = TensorDataset(x, torch.arange(SAMPLES) % CLASSES)
    cached = sffx.cache_outputs(net, DataLoader(data, 5), "block_0")
    blocks = ["block_1", "classifier"]
    assert_equal(trained(net, cached, blocks), trained(net, data, blocks))


class Table(nn.Module):
    """Later layers read a table without a batch axis, which an early one makes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.scale = nn.Parameter(torch.rand(6))
        self.second = nn.Linear(6, 6)
        self.last = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        table = self.scale.exp()
        first = (self.first(x) * table).relu()
        return self.last(self.second(first).relu() * table)


def test_values_that_cannot_be_parted_by_samples_are_refused():
    x = torch.randn(6, 4)
    net = sffx.transform(Table(), "layer", x).train()
    with pytest.raises(InputError, match=r"cannot be cached. Hint: cache after another block"):
        sffx.cache_outputs(net, [(x, torch.zeros(6, dtype=torch.long))], "block_0")


@pytest.mark.parametrize("place", ["memory", "file"])
def test_values_come_to_the_cpu_whatever_the_default_device_is(place, tmp_path):
    net, loader = cut(), DataLoader(images(), batch_size=8)
    path = tmp_path / "values" if place == "file" else None
    expected = sffx.cache_outputs(net, loader, "block_1")[0]
    batches = list(loader)
    with torch.device("meta"):
        x, y = sffx.cache_outputs(net, batches, "block_1", path=path)[0]
    assert torch.equal(y, expected[1])
    assert_equal(x, expected[0])


def test_a_batch_without_samples_adds_nothing():
    net, data = cut(), list(DataLoader(images(), batch_size=5))
    empty = (data[0][0][:0], data[0][1][:0])
    expected = sffx.cache_outputs(net, data, "block_1")
    with_empty = sffx.cache_outputs(net, [data[0], empty, data[1]], "block_1")
    assert len(with_empty) == len(expected)
    for index in range(SAMPLES):
        assert_equal(with_empty[index][0], expected[index][0])


@pytest.mark.parametrize("change", ["another cache", "truncated", "removed"])
def test_a_file_that_is_no_longer_the_cache_is_refused(change, tmp_path):
    net, path = cut(), tmp_path / "values"
    data = list(DataLoader(images(), batch_size=5))
    first = sffx.cache_outputs(net, data, "block_0", path=path)
    kept = [first[index] for index in range(SAMPLES)]
    pickled = pickle.dumps(first)
    if change == "another cache":
        sffx.cache_outputs(net, data * 2, "block_0", path=path)
        # What this process has mapped is still the first one.
        assert all(torch.equal(first[i][1], y) for i, (_, y) in enumerate(kept))
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:100])
    if change == "removed":
        path.unlink()
    with pytest.raises(InputError, match=r"after block_0 had .* a path of its own"):
        pickle.loads(pickled)


def test_cached_values_of_another_dtype_than_the_model_are_named():
    net = cut()
    data = list(DataLoader(images(), batch_size=5))
    x, y = next(iter(DataLoader(sffx.cache_outputs(net, data, "block_1"), 5)))
    with pytest.raises(
        InputError, match=r"cached norm_1 is of torch.float32, and .* of torch.float64"
    ):
        sffx.local_loss(net.double(), x, y)
