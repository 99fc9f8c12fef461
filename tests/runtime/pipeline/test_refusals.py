"""What a pipeline refuses, and what the error says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import sffx
from sffx.runtime.pipeline.balance import balanced
from tests.runtime.pipeline import models
from tests.runtime.pipeline.processes import run
from tests.runtime.pipeline.test_ownership import Scaled


def cut_tied() -> Any:
    """Return a cut model in which somebody has tied two blocks afterwards."""
    net = models.cut_images()
    first = net.get_submodule("block_1.layers.0.conv")
    net.get_submodule("block_2.layers.1.conv").weight = first.weight
    return net


def cut_language_model() -> Any:
    layers = [nn.Embedding(9, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 9)]
    ids = torch.zeros(2, 4, dtype=torch.int64)
    task = sffx.tasks.LanguageModel()
    return sffx.transform(nn.Sequential(*layers), "layer", ids, task=task, goodness="shared")


def cut_in_one_memory() -> Any:
    """Return a cut model in which parameters of two blocks are different ones in one memory."""
    net = models.cut_images()
    first = net.get_submodule("block_1.layers.0.conv")
    net.get_submodule("block_2.layers.1.conv").weight.data = first.weight.data
    return net


def cut_with_kept_module() -> Any:
    """Return a cut model with a block that keeps a module of another one, and is not its parent."""
    net = models.cut_images()
    kept = net.get_submodule("block_2.layers.1.conv")
    net.get_submodule("block_1.layers.0.conv").kept = (kept,)
    return net


def without_gradients(pipe: sffx.Pipeline) -> Any:
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
    with torch.no_grad():
        return pipe.train(models.images() if pipe.first else None, optimizer)


def frozen(rank: int) -> Any:
    net = models.cut_images().requires_grad_(False)
    pipe = sffx.Pipeline(net)
    return pipe.train(models.images() if pipe.first else None, None)


def offloaded() -> Any:
    net = models.cut_images()
    optimizer = torch.optim.SGD(sffx.parameter_groups(net, lr=0.01))
    sffx.offload(net, optimizer, "cpu")
    return net


def differently_cut(rank: int) -> Any:
    torch.manual_seed(0)
    model = models.Images().double()
    example = torch.zeros(2, 3, 6, 6, dtype=torch.float64)
    return sffx.transform(model, f"stages({rank + 2})", example)


def differently_drawn(rank: int) -> Any:
    net = models.cut_images()
    with torch.no_grad():
        net.get_parameter("classifier.head.weight").add_(rank)
    return net


def forgetful(pipe: sffx.Pipeline) -> Any:
    return pipe.train([(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))], None)


def cut_from_meta() -> Any:
    """Return a cut model on the meta device with a layer that does not draw its buffers."""
    with torch.device("meta"):
        model = nn.Sequential(Scaled("weight"), nn.ReLU(), nn.Linear(4, 3))
    return sffx.transform(model, ["_1"], torch.zeros(2, 4))


def lbfgs(pipe: sffx.Pipeline) -> Any:
    optimizer = torch.optim.LBFGS(pipe.parameters())
    return pipe.train(models.images() if pipe.first else None, optimizer)


def foreign_optimizer(pipe: sffx.Pipeline) -> Any:
    optimizer = torch.optim.SGD(sffx.parameter_groups(models.cut_images(), lr=0.1))
    return pipe.train(models.images() if pipe.first else None, optimizer)


def refusals(rank: int) -> dict[str, str]:
    """Return the error of each bad use."""
    net = models.cut_images()
    uses = {
        "many replicas": lambda: sffx.Pipeline(net, replicas=3),
        "zero replicas": lambda: sffx.Pipeline(net, replicas=0),
        "unknown cut": lambda: sffx.Pipeline(net, cuts=["block_9"]),
        "first block": lambda: sffx.Pipeline(net, cuts=["block_0"]),
        "many cuts": lambda: sffx.Pipeline(net, cuts=["block_1", "block_2"]),
        "depth": lambda: sffx.Pipeline(net, depth=0),
        "timeout": lambda: sffx.Pipeline(net, timeout=-1),
        "plain": lambda: sffx.Pipeline(models.Images()),
        "wrapped": lambda: sffx.Pipeline(sffx.LocalLoss(net)),
        "offloaded": lambda: sffx.Pipeline(offloaded()),
        "compiled": lambda: sffx.Pipeline(torch.compile(models.cut_images())),
        "compiled blocks": lambda: sffx.Pipeline(sffx.compile(models.cut_images())),
        "tied": lambda: sffx.Pipeline(cut_tied(), cuts=["block_2"]),
        "shared head": lambda: sffx.Pipeline(cut_language_model()),
        "one memory": lambda: sffx.Pipeline(cut_in_one_memory(), cuts=["block_2"]),
        "kept module": lambda: sffx.Pipeline(cut_with_kept_module(), cuts=["block_2"]),
        "without gradients": lambda: without_gradients(sffx.Pipeline(models.cut_images())),
        "frozen": lambda: frozen(rank),
        "other cut": lambda: sffx.Pipeline(differently_cut(rank)),
        "other weights": lambda: sffx.Pipeline(differently_drawn(rank)),
        "lbfgs": lambda: lbfgs(sffx.Pipeline(models.cut_images())),
        "foreign": lambda: foreign_optimizer(sffx.Pipeline(models.cut_images())),
        "forgetful": lambda: forgetful(sffx.Pipeline(cut_from_meta(), replicas=2)),
        "dst": lambda: sffx.Pipeline(models.cut_images()).gather(dst=7),
    }
    errors = {}
    for name, use in uses.items():
        try:
            use()
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
    return errors


MESSAGES = {
    "many replicas": "2 processes do not divide into 3 replicas",
    "zero replicas": "replicas is 0",
    "unknown cut": "cuts names 'block_9'",
    "first block": "a stage can begin with block_1",
    "many cuts": "for 2 stages",
    "depth": "depth is 0",
    "timeout": "timeout is -1",
    "plain": "not a cut model",
    "wrapped": "pass net.net",
    "offloaded": "sffx.onload",
    "compiled": "compiled",
    "compiled blocks": "blocks of net are compiled, and sffx.Pipeline needs them",
    "tied": "block_1.layers.0.conv.weight is used by block_1",
    "shared head": "goodness 'shared'",
    "one memory": "block_1.layers.0.conv.weight is used by block_1",
    "kept module": "block_2.layers.1.conv",
    "without gradients": "train was called without gradients",
    "frozen": "no parameter of the blocks to train requires a gradient",
    "other cut": "cut otherwise",
    "other weights": "classifier.head.weight",
    "lbfgs": "LBFGS",
    "foreign": "none of them",
    "forgetful": "other tensors have no values",
    "dst": "dst is 7",
}


def test_each_bad_use_is_refused_by_name(tmp_path):
    for errors in run(refusals, 2, tmp_path):
        assert isinstance(errors, dict), errors
        assert set(errors) == set(MESSAGES)
        for name, message in MESSAGES.items():
            assert errors[name].startswith(("InputError", "ProcessError")), errors[name]
            assert message in errors[name], (name, errors[name])


def test_without_processes_the_error_says_how_to_start_them():
    with pytest.raises(sffx.InputError, match="torchrun"):
        sffx.Pipeline(models.cut_images())


def too_many(rank: int) -> Any:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    return sffx.Pipeline(sffx.transform(layers, "layer", torch.zeros(2, 4)))


def test_more_processes_than_blocks_are_refused(tmp_path):
    for error in run(too_many, 3, tmp_path):
        assert "3 processes share 2 blocks" in str(error)


def brute_force(seconds: list[float], stages: int) -> float:
    """Return the seconds of the slowest stage of the best division, by trying all."""
    if stages == 1:
        return sum(seconds)
    best = float("inf")
    for end in range(1, len(seconds) - stages + 2):
        best = min(best, max(sum(seconds[:end]), brute_force(seconds[end:], stages - 1)))
    return best


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_the_division_is_the_best_one(stages, seed):
    seconds = torch.rand(7, generator=torch.Generator().manual_seed(seed)).tolist()
    begins = balanced(seconds, stages, tied={})
    ends = [*begins[1:], len(seconds)]
    slowest = max(sum(seconds[b:e]) for b, e in zip(begins, ends, strict=True))
    assert len(begins) == stages
    assert slowest == pytest.approx(brute_force(seconds, stages))


def test_forbidden_blocks_begin_no_stage():
    assert balanced([1.0, 1.0, 1.0, 1.0], 2, tied={2: "w"}) in ([0, 1], [0, 3])
    with pytest.raises(sffx.InputError, match="at 1 places"):
        balanced([1.0, 1.0, 1.0], 3, tied={2: "w"})
