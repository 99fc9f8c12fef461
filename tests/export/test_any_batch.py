"""What fixes the batch size of a model is named before a file is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
from sffx.errors import ExportError

IMAGE = torch.zeros(2, 3, 8, 8)
EXPORTS: dict[str, Callable[..., Path]] = {
    "onnx": sffx.export_onnx,
    "program": sffx.export_program,
    "early exit": sffx.export_early_exit,
}


class NormOfHalves(nn.Module):
    def __init__(self, always: bool) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.always = always

    def forward(self, x: Tensor) -> Tensor:
        if self.always or self.training:
            first, second = x.chunk(2, 0)
            return torch.cat([self.first(first), self.second(second)])
        return self.first(x)


class Alone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y * 3 if x.shape[0] == 1 else y


class WeightsPerSample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(8, 8, 3, 3))
        self.style = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        samples, channels, height, width = x.shape
        style = self.style(x.mean((2, 3)))
        weight = (self.weight * style[:, None, :, None, None]).flatten(0, 1)
        folded = x.reshape(1, samples * channels, height, width)
        return F.conv2d(folded, weight, padding=1, groups=samples).view(x.shape)


class TriplesOne(nn.Sequential):
    """Layers in a row, whose forward treats a single sample in another way."""

    def forward(self, x: Tensor) -> Tensor:
        y = self[0](x)
        y = y * 3 if x.shape[0] == 1 else y
        for layer in self[1:]:
            y = layer(y)
        return y


def cut_around(middle: nn.Module, kind: type[nn.Sequential] = nn.Sequential) -> sffx.net.CutModel:
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    model = kind(first, nn.ReLU(), middle, nn.ReLU(), last, nn.ReLU(), pool)
    return sffx.transform(model, example_input=IMAGE)


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize(
    ("kind", "middle", "message"),
    [
        (
            nn.Sequential,
            NormOfHalves(always=True),
            r"a batch of 1, .*\(node 'getitem_1' in module '2'\)",
        ),
        (TriplesOne, nn.Conv2d(8, 8, 3), r"a batch of 1, .*something else with a batch of one"),
    ],
)
def test_what_fixes_the_batch_is_named(
    tmp_path: Path, export: str, kind: type[nn.Sequential], middle: nn.Module, message: str
) -> None:
    with pytest.raises(ExportError, match=message + r".*Hint: .*'if self\.training:'"):
        EXPORTS[export](cut_around(middle, kind), tmp_path / "file")
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("export", EXPORTS)
def test_a_file_that_would_freeze_a_branch_of_a_leaf_is_refused(
    tmp_path: Path, export: str
) -> None:
    with pytest.raises(ExportError, match=r"batch size 1.*Hint: .*not traced"):
        EXPORTS[export](cut_around(Alone()), tmp_path / "file")


def test_parts_of_the_batch_in_train_mode_leave_a_file_any_batch(tmp_path: Path) -> None:
    net = cut_around(NormOfHalves(always=False)).eval()
    session = onnxruntime.InferenceSession(sffx.export_onnx(net, tmp_path / "net.onnx"))
    for samples in (1, 5):
        x = torch.randn(samples, 3, 8, 8)
        (scores,) = session.run(None, {net.plan.inputs[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(scores), net(x))


def test_a_convolution_with_a_group_for_each_sample_is_named(tmp_path: Path) -> None:
    net = cut_around(WeightsPerSample())
    message = r"'aten::conv2d' takes its argument 'groups' \(node 'conv2d' in module '2'\)"
    for export in (sffx.export_onnx, sffx.export_early_exit):
        with pytest.raises(ExportError, match=message + r".*Hint: .*sffx\.export_program"):
            export(net, tmp_path / "net")
    path = sffx.export_program(net, tmp_path / "net.pt2")
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(torch.export.load(path).module()(x), net.eval()(x))
