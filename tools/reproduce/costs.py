"""The cost of a training step of each method: counted memory, and time side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial

import torch

from tools.costs import Training, relative_costs
from tools.reproduce.experiments import Experiment
from tools.reproduce.methods import METHODS
from tools.reproduce.networks import build, example


def costs(
    experiment: Experiment,
    strengths: Mapping[str, float | None],
    rounds: int = 20,
) -> dict[str, dict[str, float]]:
    """Return by method the peak memory of a step with AdamW, its activations and its time.

    All are relative to BP, and the peak is there in bytes as well.

    Args:
        experiment: whose methods are measured.
        strengths: that the search chose for methods with a recipe, by the method's name.
        rounds: of the time measurement.
    """
    x = torch.randn(experiment.batch, experiment.channels, experiment.size, experiment.size)
    x = x.contiguous(memory_format=torch.channels_last)  # as in training
    shape = example(experiment.size, experiment.channels)
    y = torch.randint(0, experiment.classes, (experiment.batch,))
    trainings = {}
    for name in dict.fromkeys(("BP", *experiment.methods)):
        method = METHODS[name].at(strengths.get(name))
        model = build(experiment.network, experiment.classes, experiment.size)
        net = method.prepare(model, experiment.policy, shape).train()
        net = net.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(method.groups(net, 1e-3, 1e-3))
        trainings[name] = Training(net, optimizer, partial(method.loss, net, x, y))
    # With one thread, the thread's own time leaves out what others do on the machine.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    return relative_costs(trainings, "BP", rounds=rounds, clock=clock)
