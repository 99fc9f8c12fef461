"""Handwritten digits: train two networks block by block (SFF) and by backpropagation (BP) on the same batches, and compare.

    python -m examples.digits --out sffx-demo

Takes two to three minutes and needs `pip install 'sffx[demo]'`. The images come with scikit-learn: 1,797 of 8 x 8 pixels.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import torch.nn.functional as F
import torchvision
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, fx, nn
from tqdm import tqdm

import sffx
from sffx.draw.render import draw
from sffx.memory.count import MIB, count_memory
from sffx.plots.results import plot_accuracy
from tools.timing import compare_time

BATCH, TEST = 64, 360
Pair = tuple[Tensor, Tensor]  # images (N, 3, size, size) and labels (N,)


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = (
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.conv2, self.bn2 = (
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = (
            nn.Identity()
            if inputs == outputs
            else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResidualNetwork(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            OrderedDict(
                stem=nn.Sequential(
                    nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
                ),
                residual1=ResidualBlock(16, 16),
                residual2=ResidualBlock(16, 32, stride=2),
                residual3=ResidualBlock(32, 64, stride=2),
                residual4=ResidualBlock(64, 64),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                linear=nn.Linear(64, 10),
            )
        )


def mobilenet() -> nn.Module:
    model = torchvision.models.mobilenet_v3_small(num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = (
                0.1  # by torchvision's 0.01 the running statistics lag behind a training this short
            )
    return model


@dataclass(frozen=True)
class Task:
    """A network and how to train it; all of it was chosen on 237 of the training images, never on the test images.

    Attributes:
        name: of its files.
        make: makes it.
        size: height and width of its images; both networks want more than 8 x 8 pixels.
        epochs: how often every training image is seen.
        kernel_size: of the goodness heads. 3 instead of 1 adds 1.6 % to MobileNet's ensemble, whose early blocks see little of an image.
        rates: learning rates.
    """

    name: str
    make: Callable[[], nn.Module]
    size: int
    epochs: int
    kernel_size: int
    rates: dict[str, float]


TASKS = (
    Task(
        "residual_network",
        ResidualNetwork,
        size=16,
        epochs=10,
        kernel_size=1,
        rates={"SFF": 1e-2, "BP": 1e-2},
    ),
    Task(
        "mobilenet_v3_small",
        mobilenet,
        size=48,
        epochs=8,
        kernel_size=3,
        rates={"SFF": 1e-2, "BP": 3e-3},
    ),
)


class Learner:
    """A network, the way it learns and its optimizer, which follows a one-cycle schedule of the learning rate."""

    def __init__(
        self,
        net: nn.Module,
        loss: Callable[[Any, Tensor, Tensor], Tensor],
        groups: Any,
        lr: float,
        steps: int,
    ) -> None:
        self.net, self.loss = net.train(), loss
        self.optimizer = torch.optim.AdamW(groups, lr)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, lr, total_steps=steps)

    def step(self, x: Tensor, y: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(self.net, x, y)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def learners(task: Task, steps: int, seed: int) -> dict[str, Learner]:
    """Make the cut network and the plain one from the same initial weights."""
    torch.manual_seed(seed)
    model = task.make()
    net = sffx.transform(
        model, "residual", torch.zeros(1, 3, task.size, task.size), kernel_size=task.kernel_size
    )
    print(f"{net.plan}\n", flush=True)
    return {
        "SFF": Learner(
            net,
            sffx.local_loss,
            sffx.parameter_groups(net, task.rates["SFF"]),
            task.rates["SFF"],
            steps,
        ),
        "BP": Learner(
            model,
            lambda net, x, y: F.cross_entropy(net(x), y),
            model.parameters(),
            task.rates["BP"],
            steps,
        ),
    }


def digits(size: int, seed: int) -> tuple[Pair, Pair]:
    """Return the images to train on and those to test on, every digit with its share in both."""
    found = load_digits()
    images = F.interpolate(
        torch.tensor(found.images).float()[:, None] / 16, size=size, mode="bilinear"
    )
    x, y = ((images - 0.3) / 0.38).repeat(1, 3, 1, 1), torch.tensor(found.target)
    train, test = train_test_split(
        torch.arange(len(y)), test_size=TEST, stratify=y, random_state=seed
    )
    return (x[train], y[train]), (x[test], y[test])


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Turn each image by up to 11 degrees, scale it by up to 10 % and shift it by up to 10 % of its width."""
    angle, scale, right, down = (torch.rand(4, len(x), generator=generator) * 2 - 1) * torch.tensor(
        [[0.2], [0.1], [0.2], [0.2]]
    )
    cos, sin = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    moves = torch.stack([cos, -sin, right, sin, cos, down], dim=1).view(-1, 2, 3)
    return F.grid_sample(
        x,
        F.affine_grid(moves, list(x.shape), align_corners=False),
        padding_mode="border",
        align_corners=False,
    )


def train(learners: dict[str, Learner], data: Pair, epochs: int, seed: int) -> None:
    """Give every batch to all learners."""
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    order = [
        index
        for _ in range(epochs)
        for index in torch.randperm(len(x), generator=generator).split(BATCH)
        if len(index) == BATCH
    ]
    with tqdm(
        order,
        "training",
        mininterval=1,
        bar_format="{desc} {percentage:3.0f} % {bar:30} {elapsed} < {remaining}{postfix}",
    ) as bar:
        for index in bar:
            images = augment(x[index], generator)
            losses = {name: learner.step(images, y[index]) for name, learner in learners.items()}
            for learner in learners.values():
                learner.schedule.step()
            bar.set_postfix_str(
                f"loss: SFF {losses['SFF']:.2f} (all blocks), BP {losses['BP']:.2f}", refresh=False
            )


def accuracy(model: nn.Module, data: Pair) -> float:
    with torch.no_grad():
        return int((model.eval()(data[0]).argmax(dim=1) == data[1]).sum()) / len(data[1])


def accuracy_onnx(path: Path, data: Pair) -> float:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {session.get_inputs()[0].name: data[0].numpy()})
    return int((torch.tensor(scores).argmax(dim=1) == data[1]).sum()) / len(data[1])


def costs(learners: dict[str, Learner], data: Pair) -> dict[str, dict[str, float]]:
    """Measure a training step of both, now that the states of the optimizers exist. This changes the weights."""
    x, y = data[0][:BATCH], data[1][:BATCH]
    for learner in learners.values():
        learner.net.train()
    steps = {name: partial(learner.step, x, y) for name, learner in learners.items()}
    counts = {
        name: count_memory(steps[name], model=learner.net, optimizer=learner.optimizer)
        for name, learner in learners.items()
    }
    times = compare_time(steps, rounds=10, warmup=1)
    peaks = {name: count.peak / MIB for name, count in counts.items()}
    activations = {name: count.activations / MIB for name, count in counts.items()}
    return {
        "peak memory of a step, MiB": {**peaks, "SFF / BP": peaks["SFF"] / peaks["BP"]},
        "activations of a step, MiB": {
            **activations,
            "SFF / BP": activations["SFF"] / activations["BP"],
        },
        # Of steps that ran side by side, which whatever else the machine does slows alike.
        "time of a step, ms": {
            **{name: times.median(name) * 1e3 for name in steps},
            "SFF / BP": times.paired_ratio("SFF", "BP"),
        },
    }


def report(name: str, found: dict[str, Any]) -> None:
    bp = {"classifier": f"{found['accuracy']['BP']:10.2%}"}
    print(f"\n{f'accuracy of {name}':34}{'SFF':>10}{'BP':>10}")
    for readout, value in found["accuracy"]["SFF"].items():
        print(f"{readout:34}{value:10.2%}{bp.get(readout, '')}")
    print(f"{'ensemble, by ONNX Runtime':34}{found['accuracy']['ONNX']:10.2%}")
    print(f"\n{'':34}{'SFF':>10}{'BP':>10}{'SFF / BP':>10}")
    for measure, cost in found["costs"].items():
        print(
            f"{measure:34}{cost['SFF']:10.1f}{cost['BP']:10.1f}{cost['SFF / BP']:10.2f}", flush=True
        )


def picture(net: fx.GraphModule, path: Path) -> list[Path]:
    """Draw the blocks; where nothing is installed that renders, leave the DOT text."""
    try:
        return [draw(net, path.with_suffix(suffix)) for suffix in (".svg", ".png")]
    except sffx.MissingExtra as missing:
        print(missing)
        return [draw(net, path.with_suffix(".dot"))]


def run(task: Task, out: Path, epochs: int, seed: int) -> dict[str, Any]:
    """Train, evaluate, export, draw and measure one network."""
    print(f"\n=== {task.name}: {task.size} x {task.size} pixels, {epochs} epochs ===\n", flush=True)
    data, test = digits(task.size, seed)
    pair = learners(task, steps=epochs * (len(data[0]) // BATCH), seed=seed)
    train(pair, data, epochs, seed)
    net: Any = pair["SFF"].net
    accuracies: dict[str, Any] = {
        "SFF": sffx.evaluate(net, [test]).accuracy,
        "BP": accuracy(pair["BP"].net, test),
    }
    onnx_file = sffx.export_onnx(net, out / f"{task.name}.onnx")
    accuracies["ONNX"] = accuracy_onnx(onnx_file, test)
    if accuracies["ONNX"] != accuracies["SFF"]["ensemble"]:
        raise SystemExit(f"ONNX Runtime and torch differ in accuracy: {accuracies}")
    series = {"SFF": list(accuracies["SFF"].items()), "BP": [("classifier", accuracies["BP"])]}
    plot = plot_accuracy(series, out / f"{task.name}-accuracy.png")
    files = [onnx_file, *picture(net, out / f"{task.name}-blocks"), plot]
    found = {
        "epochs": epochs,
        "accuracy": accuracies,
        "costs": costs(pair, data),
        "files": [file.name for file in files],
    }
    report(task.name, found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("sffx-demo"), help="folder for what is left behind"
    )
    parser.add_argument("--epochs", type=int, help="instead of each network's own number")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # Tensors this small gain little from threads, and where another process holds a core, each operation waits for the slowest thread:
    # ten times the time and more. With one thread, the figures are also the same however many cores there are.
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    print(
        f"Handwritten digits, {TEST} of 1,797 held back for the test: two networks, each trained block by block (SFF) and"
    )
    print(
        f"by backpropagation (BP) from the same weights, on the same batches of {BATCH}, with AdamW."
    )
    results = {
        task.name: run(task, args.out, args.epochs or task.epochs, args.seed) for task in TASKS
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    print(f"\nDone in {time.perf_counter() - start:.0f} s. Left in {args.out}:")
    for file in ["results.json", *(file for found in results.values() for file in found["files"])]:
        print(f"  {file:34}{(args.out / file).stat().st_size / 1e3:7,.0f} kB")


if __name__ == "__main__":
    main()
