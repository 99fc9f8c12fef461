"""What the saved memory buys: the batch, or the image, that fits into the peak of backpropagation.

All is counted on fake tensors, with AdamW, so it depends on no machine.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import sffx
from sffx.memory.largest import largest_within
from sffx.net import CutModel
from tools.tasks.experiments import Experiment, Method

# Widths of images are tried in steps of so many pixels, up to so many times the experiment's.
STEP = 24
MOST = 4


def largest(experiment: Experiment) -> dict[str, Any]:
    """Return the batch and the image that fit into the peak of backpropagation, by method.

    Args:
        experiment: of images; its data are not read.

    Returns:
        The "peak" of backpropagation in bytes, with the "batch" and the "image" of the experiment.
        For each "method", the largest batch of such images, and the largest image of the same form
        in such a batch, (height, width).
    """
    height, width = experiment.image_size
    size = (height, width)
    methods: dict[str, dict[str, Any]] = {"BP": {"batch": experiment.batch, "image": size}}
    budget = 0
    for name, method in experiment.methods.items():
        if method.kind != "local":
            continue
        net = _cut(experiment, method, size)
        if not budget:
            budget = _peak_of_backpropagation(net, experiment.batch)
        batch = largest_within(partial(_peak, net), budget)
        image = _largest_image(experiment, method, budget)
        methods[name] = {"batch": batch, "image": image}
    return {"peak": budget, "batch": experiment.batch, "image": size, "methods": methods}


def _peak_of_backpropagation(net: CutModel, batch: int) -> int:
    peak = sffx.footprint(net, batch).backpropagation
    assert peak is not None
    return peak


def _peak(net: CutModel, batch: int) -> int:
    return sffx.footprint(net, batch, backpropagation=False).peak


def _largest_image(experiment: Experiment, method: Method, budget: int) -> tuple[int, int]:
    """Return height and width of the largest image of the experiment's form that fits."""
    height, width = experiment.image_size
    fits, too_large = width // STEP, MOST * width // STEP
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        size = (middle * STEP * height // width, middle * STEP)
        net = _cut(experiment, method, size)
        if _peak(net, experiment.batch) <= budget:
            fits = middle
        else:
            too_large = middle
    return fits * STEP * height // width, fits * STEP


def _cut(experiment: Experiment, method: Method, size: tuple[int, int]) -> CutModel:
    image: Tensor = torch.zeros(2, 3, *size)
    net = method.net(experiment.build(), experiment.task, experiment.policy, image)
    assert isinstance(net, CutModel)
    return net
