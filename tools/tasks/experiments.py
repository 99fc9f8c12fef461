"""The experiments: a network, data, a task, and the methods that are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

import sffx
from sffx.tasks import LanguageModel, Regression, Segmentation, Task
from tools.reproduce.methods import joined
from tools.tasks.data import CHARACTERS, Data, camvid, diabetes, docstrings, halved
from tools.tasks.networks import GPT, UNet, lraspp, perceptron


@dataclass(frozen=True)
class Method:
    """How a network is trained.

    Every method trains a cut net, so that all are evaluated alike. BP is the loss of the classifier
    alone, with gradients across the cuts and without norms.

    Attributes:
        kind: "local", "BP" or "deep supervision", which is all losses with gradients across cuts.
        options: of `sffx.transform`.
    """

    kind: str = "local"
    options: dict[str, Any] = field(default_factory=dict)

    def net(self, model: nn.Module, task: Task, policy: Any, example: Tensor) -> nn.Module:
        """Return the net to train: for BP the model itself."""
        if self.kind == "BP":
            return model
        options = {"policy": policy, **self.options}
        net = sffx.transform(model, example_input=example, task=task, check=False, **options)
        return net if self.kind == "local" else joined(net)

    def loss(self, net: nn.Module, task: Task, x: Tensor, y: Tensor) -> Tensor:
        if self.kind == "BP":
            return task.loss(plain_scores(net, x), y)
        assert isinstance(net, fx.GraphModule)
        if self.kind == "deep supervision":
            return sffx.sff_loss(net(x), y, task=task)
        return sffx.local_loss(net, x, y)


def plain_scores(model: nn.Module, x: Tensor) -> Tensor:
    """Return what a plain model predicts."""
    output = model(x)
    return output["out"] if isinstance(output, dict) else output


BP = Method("BP")
SFF = Method()
MLP = Method(options={"goodness": "mlp"})
SUPERVISED = Method("deep supervision")


def language(blocks: int, goodness: str) -> Method:
    """Return a method that cuts the layers of the language model into so many blocks."""
    return Method(options={"policy": f"stages({blocks - 1})", "goodness": goodness})


@dataclass(frozen=True)
class Experiment:
    """One table.

    Attributes:
        task: of the network.
        data: reads the data, given the folder of all data and a seed.
        build: makes the network.
        policy: where it is cut.
        methods: by name.
        batch: batch size.
        epochs: of a run; a trial has a third of them.
        metric: by which runs are judged; the larger the better, but for "perplexity".
        rates: learning rates that are tried.
        flip: whether images are mirrored by chance.
        seeds: of the runs.
        image_size: height and width of images, () where there are none.
        precision: "float32", or "bfloat16", in which autocast runs products and convolutions.
        note: what a reader of the table must know.
    """

    task: Task
    data: Callable[[Path, int], Data]
    build: Callable[[], nn.Module]
    policy: str
    methods: dict[str, Method]
    batch: int
    epochs: int
    metric: str
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    flip: bool = False
    seeds: tuple[int, ...] = (0, 1)
    image_size: tuple[int, ...] = ()
    precision: str = "float32"
    note: str = ""

    def better(self, value: float, than: float) -> bool:
        """Return whether a value of the metric is better than another one."""
        return value < than if self.metric == "perplexity" else value > than

    @property
    def worst(self) -> float:
        """A value that every other one is better than."""
        return float("inf") if self.metric == "perplexity" else -float("inf")


_ROADS = Segmentation(ignore_index=11)
_DENSE = {"BP": BP, "deep supervision": SUPERVISED, "SFF": SFF, "mlp": MLP}

EXPERIMENTS = {
    "camvid-lraspp": Experiment(
        task=_ROADS,
        data=camvid,
        build=lambda: lraspp(11),
        policy="stages(3)",
        methods=_DENSE,
        batch=8,
        epochs=12,
        metric="mean_iou",
        flip=True,
        image_size=(180, 240),
        precision="bfloat16",
    ),
    "camvid-unet": Experiment(
        task=_ROADS,
        data=halved(camvid),
        build=lambda: UNet(11),
        policy="stages(3)",
        methods=_DENSE,
        batch=8,
        epochs=24,
        metric="mean_iou",
        flip=True,
        image_size=(90, 120),
        precision="bfloat16",
    ),
    "language": Experiment(
        task=LanguageModel(),
        data=docstrings,
        build=lambda: GPT(len(CHARACTERS)),
        policy="stages(1)",
        methods={
            "BP": BP,
            "SFF, K=2": language(2, "sff"),
            "shared, K=2": language(2, "shared"),
            "SFF, K=4": language(4, "sff"),
            "shared, K=4": language(4, "shared"),
        },
        batch=32,
        epochs=4,
        metric="perplexity",
        rates=(3e-4, 1e-3, 3e-3),
        precision="bfloat16",
    ),
    "diabetes": Experiment(
        task=Regression(),
        data=diabetes,
        build=lambda: perceptron(10),
        policy="layer",
        methods=_DENSE,
        batch=32,
        epochs=60,
        metric="r2",
        rates=(3e-4, 1e-3, 3e-3),
        seeds=(0, 1, 2, 3, 4),
        note="Learning rates were searched on the split of seed 0. Patients of its training and\n"
        "validation are among those that the other seeds test with, for all methods alike.",
    ),
}
