"""A forward that squeezes gives one sample what it gives this sample among others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sffx

SQUEEZES: dict[str, Callable[[Tensor], Tensor]] = {
    "x.squeeze()": lambda x: x.squeeze(),
    "torch.squeeze(x)": torch.squeeze,
    "torch.squeeze(input=x)": lambda x: torch.squeeze(input=x),
    "x.squeeze(0).squeeze(-1).squeeze(-1)": lambda x: x.squeeze(0).squeeze(-1).squeeze(-1),
    "x.squeeze(dim=(0, 2, 3))": lambda x: x.squeeze(dim=(0, 2, 3)),
    "of (1, B, C, 1)": lambda x: x.permute(3, 0, 1, 2).squeeze(),
}


class Squeezing(nn.Module):
    """Squeezes features (B, C, 1, 1), or its answer (B, 1)."""

    def __init__(self, squeeze: Callable[[Tensor], Tensor], outputs: int, at_end: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, outputs)
        self.squeeze, self.at_end = squeeze, at_end

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu().mean((2, 3), keepdim=True)
        x = x.flatten(1) if self.at_end else self.squeeze(x)
        x = self.c(self.b(x).relu())
        return self.squeeze(x[:, :, None, None]) if self.at_end else x


@pytest.mark.parametrize("name", SQUEEZES)
@pytest.mark.parametrize(("outputs", "at_end"), [(4, False), (4, True), (1, True)])
def test_a_single_sample_keeps_its_batch_axis(name: str, outputs: int, at_end: bool) -> None:
    torch.manual_seed(0)
    model = Squeezing(SQUEEZES[name], outputs, at_end).eval()
    x = torch.randn(3, 3, 5, 5)
    net = sffx.transform(model, "layer", x, norm="none")
    net.readout.mode = "classifier"
    torch.testing.assert_close(net(x), model(x))
    torch.testing.assert_close(net(x[:1]), model(x)[:1])
    assert sum("keeps it" in note for note in net.plan.notes) == 1
    y = torch.zeros(1) if outputs == 1 else torch.zeros(1, dtype=torch.long)
    assert torch.isfinite(sffx.local_loss(net.train(), x[:1], y))


def test_a_squeeze_of_other_axes_stays_as_it_is() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)
            self.register_buffer("table", torch.randn(1, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.b((self.a(x)[:, None].squeeze(1) + self.table.squeeze()).relu())

    net = sffx.transform(Net(), "layer", torch.randn(2, 5))
    assert not net.plan.notes
