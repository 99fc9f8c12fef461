"""What a training step of each method costs: counted memory, and time side by side."""

from __future__ import annotations

from typing import Any

import torch

from sffx.measure.memory import count_memory
from sffx.measure.timing import compare_time
from tools.reproduce.experiments import Experiment
from tools.reproduce.methods import METHODS
from tools.reproduce.networks import build, example


def costs(experiment: Experiment, classes: int = 10, rounds: int = 20) -> dict[str, Any]:
    """Return by method the peak memory of a step with AdamW, its activations and its time, each relative to BP.

    Raises:
        ValueError: the experiment has no BP.
    """
    if "BP" not in experiment.methods:
        raise ValueError(f"the methods are {', '.join(experiment.methods)}. Hint: costs are relative to BP")
    x, y = torch.randn(experiment.batch, 3, experiment.size, experiment.size), torch.randint(0, classes, (experiment.batch,))
    steps, counts = {}, {}
    for name in experiment.methods:
        method = METHODS[name]
        net = method.prepare(build(experiment.network, classes, experiment.size), experiment.policy, example(experiment.size)).train()
        optimizer = torch.optim.AdamW(method.groups(net, 1e-3, 1e-3))

        def step(method=method, net=net, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            method.loss(net, x, y).backward()
            optimizer.step()

        step()  # the optimizer's state exists from here on
        steps[name], counts[name] = step, count_memory(step, model=net, optimizer=optimizer)
    times = compare_time(steps, rounds=rounds)
    return {
        name: {
            "time": times.paired_ratio(name, "BP"),
            "peak": counts[name].peak / counts["BP"].peak,
            "activations": counts[name].activations / counts["BP"].activations,
        }
        for name in experiment.methods
    }
