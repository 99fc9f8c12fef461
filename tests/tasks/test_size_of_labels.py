"""Labels of pixels have the size of the image or of the answer, whatever the blocks' own sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
from sffx import tasks


class Narrowed(nn.Module):
    """Kernels of 2 x 1, of which each makes the map one row smaller; or a map of half the width."""

    def __init__(self, grows_back: bool, stride: int = 1) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, (2, 1), (1, stride)), nn.Conv2d(4, 4, (2, 1))
        self.head = nn.Conv2d(4, 3, 1)
        self.grows_back = grows_back

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu()).relu()
        if self.grows_back:
            y = F.pad(y, (0, 0, 1, 1))
        return self.head(y)


def narrowed(grows_back: bool, stride: int = 1) -> sffx.net.CutModel:
    torch.manual_seed(0)
    image = torch.zeros(1, 3, 8, 8)
    return sffx.transform(
        Narrowed(grows_back, stride), ["relu", "relu_1"], image, task=tasks.Segmentation()
    )


def ways_to_take_labels(net, x, y):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    net.train()
    return [
        lambda: sffx.sff_loss(net(x), y, task=net.plan.task),
        lambda: sffx.local_loss(net, x, y),
        lambda: sffx.local_step(net, x, y, optimizer),
        lambda: sffx.evaluate(net, [(x, y)]),
        lambda: sffx.cache_outputs(net, [(x, y)], "block_0"),
    ]


@pytest.mark.parametrize(("height", "width"), [(8, 8), (11, 6)])
@pytest.mark.parametrize("grows_back", [False, True])
def test_labels_are_of_the_image_or_of_the_answer(grows_back, height, width):
    # Outputs of blocks with one row less than the image say nothing about the labels.
    net = narrowed(grows_back)
    x = torch.randn(2, 3, height, width)
    heights = (height,) if grows_back else (height, height - 2)
    for rows in heights:
        for take in ways_to_take_labels(net, x, torch.randint(0, 3, (2, rows, width))):
            take()


@pytest.mark.parametrize("size", [(8, 7), (9, 8), (7, 8)])
@pytest.mark.parametrize(("grows_back", "stride"), [(True, 1), (True, 2)])
def test_labels_off_by_a_pixel_along_one_axis_are_refused(size, grows_back, stride):
    net = narrowed(grows_back, stride)
    x, y = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, *size))
    refusing = ways_to_take_labels(net, x, y)
    # Scores of half the width say no more of the width.
    knows_width = stride == 1 or size[1] == 8
    for take in refusing if knows_width else refusing[1:]:
        with pytest.raises(sffx.InputError, match=r"but the (scores|input) 8 x .*of the image"):
            take()


def test_a_map_of_half_the_width_is_not_turned_labels():
    net = narrowed(grows_back=True, stride=4)
    x, y = torch.randn(2, 3, 8, 16), torch.randint(0, 3, (2, 8, 16))
    for take in ways_to_take_labels(net, x, y):
        take()


@pytest.mark.parametrize("scale", [1, 2])
def test_labels_with_height_and_width_exchanged_are_refused(scale):
    net = narrowed(grows_back=True)
    x = torch.randn(2, 3, 4, 6)
    y = torch.randint(0, 3, (2, 4 * scale, 6 * scale))
    for take in ways_to_take_labels(net, x, y):
        take()
    for take in ways_to_take_labels(net, x, y.mT):
        with pytest.raises(sffx.InputError, match=r"the height comes first"):
            take()


def test_the_sizes_of_the_example_are_no_option_of_a_record():
    task = narrowed(grows_back=False).plan.task
    assert task.example_sizes == ((8, 8), (6, 8))
    assert task == tasks.Segmentation()
    assert "example_sizes" not in tasks.records.task_record(task)
