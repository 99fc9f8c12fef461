"""A net whose blocks a pipeline has divided: whoever needs all of them says where they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import sffx
from sffx.errors import InputError
from sffx.runtime.pipeline.ownership import release, require_same_everywhere, summary
from tests.runtime.pipeline import models


def step(net: fx.GraphModule, folder: Path) -> Any:
    optimizer = torch.optim.SGD(sffx.parameter_groups(net, lr=0.1))
    return sffx.local_step(net, *models.images()[0], optimizer)


def predict(net: fx.GraphModule, folder: Path) -> Any:
    with torch.no_grad():
        return net(models.images()[0][0])


DOORS: dict[str, Callable[[Any, Path], Any]] = {
    "forward": predict,
    "local_step": step,
    "local_loss": lambda net, folder: sffx.local_loss(net, *models.images()[0]),
    "evaluate": lambda net, folder: sffx.evaluate(net, models.images()),
    "weigh": lambda net, folder: sffx.weigh(net, models.images()),
    "cache_outputs": lambda net, folder: sffx.cache_outputs(net, models.images(), "block_3"),
    "save_checkpoint": lambda net, folder: sffx.save_checkpoint(folder / "net.pt", net),
    "extract": lambda net, folder: sffx.extract(net),
    "export_onnx": lambda net, folder: sffx.export_onnx(net, folder / "net.onnx"),
    "EarlyExit": lambda net, folder: sffx.EarlyExit(net),
}


@pytest.fixture(scope="module")
def divided() -> dict[str, Any]:
    """A net without its first block, and one without a later one."""
    nets = {}
    for gone in ("block_0", "block_2"):
        nets[gone] = models.cut_images()
        release(nets[gone], [gone])
    return nets


@pytest.mark.parametrize("gone", ["block_0", "block_2"])
@pytest.mark.parametrize("door", DOORS)
def test_what_needs_all_blocks_refuses_a_part_of_them(divided, door, gone, tmp_path):
    with pytest.raises(InputError, match=r"on the meta device.*pipe\.gather\(\)"):
        DOORS[door](divided[gone], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_pipeline_of_a_divided_net_says_where_values_are_missing(divided):
    summaries = [summary(models.cut_images()), summary(divided["block_2"])]
    for rank, all_of_them in enumerate((summaries[::-1], summaries)):
        with pytest.raises(InputError, match=rf"block_2.* on the meta device in process {rank}"):
            require_same_everywhere(all_of_them)


def test_a_model_without_values_comes_back_as_it_is():
    net = models.cut_images().to("meta")
    assert all(parameter.is_meta for parameter in sffx.extract(net).parameters())
