"""Predicted peaks against counted ones."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import sffx
from sffx.compiler.fake import fake_copy
from sffx.errors import InputError
from sffx.kernels.batch_slices import counting, joined, small_slices
from sffx.memory.count import count_memory
from sffx.memory.footprint import fake_footprint
from tests.examples import shorter
from tests.memory.steps import counted
from tests.stream_models import HRNet
from tests.toys import Chain, Residual, SharedBias, TwoInputs


def vision_transformer(num_classes: int) -> nn.Module:
    """A ViT of two layers."""
    return torchvision.models.VisionTransformer(64, 16, 2, 4, 64, 128, num_classes=num_classes)


class LongSkip(nn.Module):
    """A wide value that passes by the block that sets the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.narrow = nn.Linear(6, 512), nn.Linear(512, 4)
        self.wide, self.back = nn.Linear(4, 1024), nn.Linear(1024, 4)
        self.head = nn.Linear(516, 4)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.stem(x)
        x = self.back(self.wide(self.narrow(skip)).relu()).relu()
        return self.head(torch.cat([x, skip], 1))


ARCHITECTURES = {
    "resnet18": (shorter.resnet18, (3, 32, 32), 1000, 128),
    "mobilenet_v3_small": (shorter.mobilenet_v3_small, (3, 64, 64), 10, 64),
    "vision_transformer": (vision_transformer, (3, 64, 64), 100, 16),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_predicted_peak_is_the_counted_one(name):
    build, shape, classes, batch_size = ARCHITECTURES[name]
    net = sffx.transform(build(num_classes=classes), "residual", torch.zeros(1, *shape))
    predicted = sffx.footprint(net, batch_size).peak
    assert predicted == pytest.approx(
        counted(net, batch_size, FakeTensorMode(allow_non_fake_inputs=True)), rel=0.001
    )


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("model", "example", "policy"),
    [
        (Chain(), torch.zeros(1, 3, 8, 8), "batchnorm"),
        (Residual(), torch.zeros(1, 3, 8, 8), "residual"),
        (SharedBias(), torch.zeros(1, 6), "layer"),
        (TwoInputs(), (torch.zeros(1, 6), torch.zeros(1, 5)), "layer"),
        (LongSkip(), torch.zeros(1, 6), ["stem", "narrow", "relu_1"]),
        (HRNet(), torch.zeros(1, 3, 16, 16), "residual"),
    ],
    ids=["chain", "residual", "side value", "two inputs", "skip", "streams"],
)
@pytest.mark.parametrize("batch_size", [7, 256])
def test_the_predicted_peak_is_that_of_a_real_step(model, example, policy, batch_size):
    net = sffx.transform(model, policy, example)
    assert sffx.footprint(net, batch_size).peak == pytest.approx(
        counted(net, batch_size, None), rel=0.05
    )


class Recurrent(nn.Module):
    """Two LSTMs one behind the other."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        width = 128 if options.get("bidirectional") else 64
        self.first = nn.LSTM(16, 64, batch_first=True, **options)
        self.second = nn.LSTM(width, 64, batch_first=True, **options)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)[0])[0][:, -1])


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}])
def test_what_onednn_keeps_inside_an_lstm_is_predicted(options):
    """It is most of the memory, and fake tensors alone do not show it."""
    net = sffx.transform(Recurrent(**options), "layer", torch.zeros(1, 20, 16))
    predicted = sffx.footprint(net, 64)
    assert predicted.peak == pytest.approx(counted(net, 64, None), rel=0.1)
    plain = Recurrent(**options)
    optimizer = torch.optim.AdamW(plain.parameters())
    x, y = torch.zeros(64, 20, 16), torch.arange(64) % 4

    def step() -> None:
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    peak = count_memory(step, model=plain, optimizer=optimizer).peak
    assert predicted.backpropagation == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.inference_mode])
def test_a_prediction_is_that_of_a_training_step_wherever_it_is_asked_for(surroundings):
    net = sffx.transform(Residual(), example_input=torch.zeros(1, 3, 8, 8))
    peak = sffx.footprint(net, 64).peak
    budget = 2 * peak

    def found() -> tuple[object, ...]:
        cut = sffx.transform(Residual(), f"memory({peak}, 64)", torch.zeros(1, 3, 8, 8))
        return sffx.footprint(net, 64), sffx.largest_batch(net, budget), len(cut.plan)

    expected = found()
    with surroundings():
        assert found() == expected


@pytest.mark.parametrize("learning", ["head", "nothing"])
def test_a_frozen_model_has_no_rival(learning):
    net = sffx.transform(Residual(), example_input=torch.zeros(1, 3, 8, 8))
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.startswith(learning))
    predicted = sffx.footprint(net, 64)
    assert predicted.backpropagation is None
    assert predicted.peak == sffx.footprint(net, 64, backpropagation=False).peak
    assert sffx.largest_batch(net, 2 * predicted.peak).backpropagation is None


def test_norms_stay_on_the_device_when_blocks_are_offloaded():
    def norm(block: sffx.Block) -> nn.Module:
        return nn.LayerNorm(block.shape[1:]).requires_grad_(False)

    example = torch.zeros(1, 3, 8, 8)
    alone = sffx.footprint(sffx.transform(Residual(), "residual", example), 8, offloaded=True)
    net = sffx.transform(Residual(), "residual", example, norm=norm)
    tensors = [p for name, p in net.named_parameters() if name.startswith("norm")]
    predicted = sffx.footprint(net, 8, offloaded=True)
    assert tensors
    assert predicted.held - alone.held == sum(p.nbytes for p in tensors)


def test_a_prediction_touches_nothing_and_prints_as_a_table():
    net = sffx.transform(Residual(), example_input=torch.zeros(1, 3, 8, 8)).eval()
    before = copy.deepcopy(net.state_dict())
    rng = torch.get_rng_state()
    found = sffx.footprint(net, 64)
    assert torch.equal(rng, torch.get_rng_state())
    assert not net.training
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert found.peak == max(found.peaks)
    lines = str(found).splitlines()
    assert lines[0].split() == [
        "MiB,",
        "batch",
        "64",
        "block",
        "alone",
        "peak",
        "of",
        "the",
        "step",
    ]
    assert lines[-1].startswith("peak by backpropagation: ")
    assert [line.split()[0] for line in lines[1:-2]] == [
        "block_0",
        "block_1",
        "block_2",
        "classifier",
        "optimizer.step()",
    ]


@pytest.mark.parametrize("batch_size", [0, -3, 2.0, True])
def test_batch_size_that_is_none_is_refused(batch_size):
    net = sffx.transform(Residual(), example_input=torch.zeros(1, 3, 8, 8))
    with pytest.raises(InputError, match=r"batch_size is .*\. Hint: pass a positive integer"):
        sffx.footprint(net, batch_size)


def tokens() -> nn.Module:
    """A ViT whose goodness and whose layers are computed in a slice for each sample."""
    return torchvision.models.VisionTransformer(64, 8, 2, 4, 128, 512, num_classes=2000)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("batch_size", [1, 2, 5, 16])
def test_slices_that_are_passed_over_change_no_byte(batch_size):
    net = sffx.transform(tokens(), "residual", torch.zeros(1, 3, 64, 64))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    net_of_fakes = fake_copy(net, mode).train()
    with mode, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sffx.memory.footprint.counting", nullcontext)
        whole = fake_footprint(net_of_fakes, batch_size)
    assert sffx.footprint(net, batch_size, backpropagation=False) == whole


def test_an_absurd_batch_is_predicted_at_once():
    net = sffx.transform(tokens(), "residual", torch.zeros(1, 3, 64, 64))
    counts = {}
    for batch_size in (10**6, 2 * 10**6, 3 * 10**6):
        operators = Operators()
        with operators:
            counts[batch_size] = sffx.footprint(net, batch_size).peak
        assert operators.count < 20_000
    first, second, third = counts.values()
    assert third - second == second - first > 10**9


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_while_one_thread_counts_real_numbers_are_whole():
    y = torch.randn(9, 3)
    with counting():
        slices = small_slices(y, 2**18)
        assert len(slices) == 9
        assert torch.equal(joined(y, slices, torch.exp), y.exp())


class PairsOnly(nn.Module):
    """A head that takes an even batch only."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) % 2:
            raise ValueError(f"{len(x)} samples make no pairs")
        return self.linear(x)


def own_head(block: sffx.Block, classes: int) -> nn.Module:
    return PairsOnly(block.channels, classes)


def test_a_value_error_of_the_users_own_code_is_told_with_its_place():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    net = sffx.transform(model, "layer", torch.zeros(1, 6), goodness=own_head)
    assert sffx.footprint(net, 4).peak
    with pytest.raises(
        InputError, match=r"7 samples make no pairs \(.*in forward\). Hint"
    ) as caught:
        sffx.footprint(net, 7)
    assert isinstance(caught.value.__cause__, ValueError)
    assert "larger" not in str(caught.value)


def test_a_batch_that_a_norm_refuses_is_told_to_be_larger():
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)]
    net = sffx.transform(nn.Sequential(*layers), "layer", torch.zeros(1, 6))
    with pytest.raises(InputError, match=r"batch size 1: Expected more.*larger batch"):
        sffx.footprint(net, 1)


@pytest.mark.parametrize("raised", [InputError("wrong"), sffx.errors.CutError("wrong")])
def test_an_error_of_sffx_inside_a_prediction_stays_as_it_is(raised, monkeypatch):
    net = sffx.transform(
        nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), "layer", torch.zeros(1, 6)
    )

    def fail(*args):
        raise raised

    monkeypatch.setattr(net.head_0, "forward", fail)
    with pytest.raises(type(raised), match=r"^wrong$"):
        sffx.footprint(net, 4)
