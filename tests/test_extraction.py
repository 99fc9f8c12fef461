"""Extraction: the plain model has what was trained, under its own names, and nothing of the cut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import prune

import sffx
from sffx.tensors import copied
from tests.toys import Residual

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 4, (6,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net() -> fx.GraphModule:
    torch.manual_seed(0)
    return sffx.transform(Residual(), example_input=X)


def test_the_original_model_comes_back_with_the_trained_weights(net: fx.GraphModule) -> None:
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sffx.local_loss(net, X, Y).backward()
    optimizer.step()
    model = sffx.extract(net)
    assert type(model) is Residual
    assert model.state_dict().keys() == Residual().state_dict().keys()
    trained = {}
    for part in ("block_0", "block_1", "block_2", "classifier"):
        for name, value in net.get_submodule(part).state_dict().items():
            trained[name] = value
            if value.is_floating_point() and value.ndim > 1:
                assert not torch.equal(value, before[f"{part}.{name}"])
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[name])


def test_the_plain_model_shares_no_memory_with_the_cut_one(net: fx.GraphModule) -> None:
    model = sffx.extract(net)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for parameter in net.parameters():
        assert parameter.ndim == 1 or parameter.abs().sum() > 0


def test_a_layer_keeps_the_mode_of_its_own(net: fx.GraphModule) -> None:
    """Batch norms in eval mode are a common way to fine-tune; they were in train mode again."""
    net.train()
    net.block_1.eval()
    model = sffx.extract(net)
    assert not model.block1.bn1.training
    assert model.block2.bn1.training
    net.eval()
    net.block_2.train()
    model = sffx.extract(net)
    assert model.block2.bn1.training
    assert not model.block1.bn1.training


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_and_the_dtype_are_those_of_the_cut_model(
    net: fx.GraphModule, *, training: bool
) -> None:
    net.train(training).double()
    net.block_0.half()
    model = sffx.extract(net)
    assert all(module.training is training for module in model.modules())
    assert model.stem[0].weight.dtype == torch.float16
    assert model.head.weight.dtype == torch.float64


class Flagged(nn.Module):
    """Passes on its mode, and reads a constant tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.offset = [torch.ones(4)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + self.offset[0]
        return self.last(F.dropout(torch.relu(x), 0.5, self.training))


def test_what_the_trace_added_is_removed() -> None:
    model = Flagged()
    net = sffx.transform(model, "layer", torch.zeros(2, 4), norm="none").eval()
    plain = sffx.extract(net)
    assert [name for name, _ in plain.named_modules()] == ["", "first", "last"]
    assert list(plain.state_dict()) == list(model.state_dict())
    x = torch.randn(5, 4)
    for training in (True, False):
        outputs = []
        for each in (plain.train(training), model.train(training)):
            torch.manual_seed(0)
            outputs.append(each(x))
        assert torch.equal(*outputs)


class Adapter(nn.Module):
    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        self.low, self.high = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.high(self.low(x))


def test_modules_that_were_put_in_the_place_of_layers_come_back() -> None:
    net = sffx.transform(Residual(), norm="none", example_input=X)
    net.block_1.block1.conv1 = Adapter(net.block_1.block1.conv1)
    net.block_2.block2.bn1 = nn.GroupNorm(2, 8)
    net.readout.mode = "classifier"
    model = sffx.extract(net.eval())
    assert isinstance(model.block1.conv1, Adapter)
    assert isinstance(model.block2.bn1, nn.GroupNorm)
    assert torch.equal(model(X), net(X))


class WithUnused(nn.Module):
    """A model with a layer and a buffer that its forward does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Residual()
        self.unused = nn.Linear(4, 4)
        self.register_buffer("numbers", torch.ones(3))
        self.register_buffer("indices", torch.arange(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_layers_of_no_block_are_cast_as_those_of_blocks(dtype: torch.dtype, tmp_path: Path) -> None:
    expected = {name: value.dtype for name, value in WithUnused().to(dtype).state_dict().items()}
    net = sffx.transform(WithUnused(), example_input=X)
    # `AveragedModel` casts the net by the way that every wrapper does.
    averaged = torch.optim.swa_utils.AveragedModel(net).to(dtype)
    net.to(dtype)
    sffx.save_checkpoint(tmp_path / "net.pt", net)
    loaded = sffx.load_checkpoint(tmp_path / "net.pt").net(WithUnused())
    for each in (net, averaged, copy.deepcopy(net), loaded):
        found = sffx.extract(each).state_dict()
        assert {name: value.dtype for name, value in found.items()} == expected


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(sffx.InputError, match=r"Residual, not a cut model\. Hint: "):
        sffx.extract(Residual())  # type: ignore[arg-type]


class Keeping(nn.Module):
    """Keeps tensors in every way that torch allows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)
        self.mean = torch.linspace(-1, 1, 4)
        self.inner = nn.Module()
        self.inner.offset = torch.linspace(-1, 1, 8)
        self.register_buffer("scale", torch.full((8,), 1.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x - self.mean).relu()
        x = (self.b(x) + self.inner.offset).relu()
        return self.last((self.c(x) * self.scale).relu())


class Counting(nn.Linear):
    """A layer with state of its own in plain attributes."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.seen = 0
        self.table: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
            self.table["mean"] = x.detach().mean(0)
        return super().forward(x)


def plain(model: Keeping) -> None:
    pass


def shared_weight(model: Keeping) -> None:
    model.c.weight = model.b.weight


def shared_layer(model: Keeping) -> None:
    model.c = model.b


def shared_plain_tensor(model: Keeping) -> None:
    model.inner.offset = model.scale


def old_weight_norm(model: Keeping) -> None:
    torch.nn.utils.weight_norm(model.b)
    torch.nn.utils.weight_norm(model.last)


def old_spectral_norm(model: Keeping) -> None:
    torch.nn.utils.spectral_norm(model.b)
    torch.nn.utils.spectral_norm(model.c)


def new_weight_norm(model: Keeping) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.b)


def pruned(model: Keeping) -> None:
    prune.l1_unstructured(model.b, "weight", 0.5)


KEPT = [
    plain,
    shared_weight,
    shared_layer,
    shared_plain_tensor,
    old_weight_norm,
    old_spectral_norm,
    new_weight_norm,
    pruned,
]


@pytest.mark.parametrize("is_copied", [False, True])
@pytest.mark.parametrize("change", KEPT)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_every_way_to_keep_a_tensor_survives_training(
    change: Callable[[Keeping], None], *, is_copied: bool
) -> None:
    torch.manual_seed(0)
    model = Keeping()
    change(model)
    x = torch.randn(6, 4)
    net = sffx.transform(model, "layer", x, norm="none").train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(2):
        sffx.local_step(net, x, Y % 3, optimizer)
    if is_copied:
        net = copied(net)
    plain_model = sffx.extract(net)
    net.readout.mode = "classifier"
    net.eval()
    assert torch.equal(plain_model.eval()(x), net(x))
    assert list(plain_model.state_dict()) == list(model.state_dict())
    before = [name for name, _ in model.named_parameters()]  # the shared ones once
    assert [name for name, _ in plain_model.named_parameters()] == before
    with torch.no_grad():
        for parameter in plain_model.parameters():
            parameter.zero_()
    assert any(parameter.abs().sum() > 0 for parameter in net.parameters())
    net.readout.mode = "ensemble"
    assert torch.equal(sffx.EarlyExit(net, 2.0)(x).scores, net(x))


def test_state_that_a_layer_keeps_by_itself_comes_back() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Counting(), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(6, 4)
    model(x)
    net = sffx.transform(model, "layer", x, norm="none").train()
    layer = next(module for module in net.modules() if isinstance(module, Counting))
    if layer.seen:  # where the trace keeps the layer as it is
        for each in (net, copied(net)):
            for _ in range(3):
                each(x)
            kept = next(module for module in each.modules() if isinstance(module, Counting))
            back = sffx.extract(each)
            assert back[2].seen == kept.seen
            assert torch.equal(back[2].table["mean"], kept.table["mean"])
            assert back[2].table["mean"] is not kept.table["mean"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_layer_that_was_reparametrised_after_the_cut_comes_back(net: fx.GraphModule) -> None:
    net = sffx.transform(Residual(), norm="none", example_input=X)
    torch.nn.utils.weight_norm(net.block_1.block1.conv1)
    net.readout.mode = "classifier"
    net.train()
    sffx.local_loss(net, X, Y).backward()
    model = sffx.extract(net)
    assert torch.equal(model.eval()(X), net.eval()(X))
    assert "weight_g" in model.block1.conv1._parameters


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize(
    "script", [torch.jit.script, lambda m: torch.jit.trace(m, torch.zeros(2, 8))]
)
def test_scripted_parts_learn_in_copies_and_come_back(script) -> None:
    """torch copies their parameters as values that are computed from the originals."""
    part = script(nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), part, nn.Linear(8, 4))
    before = dict(part.named_parameters())["0.weight"].detach().clone()
    net = sffx.transform(model, "layer", torch.zeros(1, 6), norm="none")
    for each in (copy.deepcopy(net).train(), net.train()):
        assert all(parameter.is_leaf for parameter in each.parameters())
        x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 0])
        sffx.local_loss(each, x, y).backward()
        torch.optim.SGD(each.parameters(), 0.1).step()
        plain = sffx.extract(each)
        weight = dict(plain[2].named_parameters())["0.weight"]
        assert weight.is_leaf
        assert not torch.equal(weight, before)
    assert torch.equal(dict(part.named_parameters())["0.weight"], before)
