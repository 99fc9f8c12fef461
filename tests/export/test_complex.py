"""Complex numbers at the border of an ONNX file are refused by the name of the user's value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.errors import ExportError


class Signal(nn.Module):
    """Three layers that read the spectrum of a signal."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, wave: Tensor) -> Tensor:
        return self.head(self.second(self.first(wave.abs()).relu()).relu())


class Spectrum(Signal):
    """The spectrum crosses the first cut."""

    def forward(self, wave: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(wave)
        x = self.first(wave + spectrum.abs().sum(1, keepdim=True)).relu()
        x = self.second(x).relu()
        return self.head(x * spectrum.real.sum(1, keepdim=True))


class Parts(Signal):
    """Takes real and imaginary parts, as the hint says."""

    def forward(self, wave: Tensor) -> Tensor:
        return super().forward(torch.view_as_complex(wave))


WAVE = torch.zeros(1, 8, dtype=torch.complex64)


@pytest.mark.parametrize("export", [sffx.export_onnx, sffx.export_early_exit])
def test_a_complex_input_is_named(tmp_path, export):
    net = sffx.transform(Signal(), "layer", WAVE, check=False)
    message = r"'wave' is complex64.* Hint: .*view_as_complex\(wave\).*export_program"
    with pytest.raises(ExportError, match=message):
        export(net, tmp_path / "file")


def test_a_complex_value_that_crosses_a_cut_is_named(tmp_path):
    net = sffx.transform(Spectrum(), "layer", WAVE.real, check=False)
    message = "'fft_rfft' is complex64.* crosses the cut after block_0. Hint: cut elsewhere"
    with pytest.raises(ExportError, match=message):
        sffx.export_early_exit(net, tmp_path / "folder")


def test_real_and_imaginary_parts_are_exported(tmp_path):
    net = sffx.transform(Parts(), "layer", torch.zeros(1, 8, 2), check=False)
    sffx.export_onnx(net, tmp_path / "net.onnx")  # it compares the file with the net
