"""Handwritten digits: train two networks block by block (SFF) and by backpropagation (BP).

    python -m examples.digits --out sffx-demo

Both ways start from the same weights and see the same batches. The script compares accuracy, memory
and time, exports to ONNX, and draws the blocks. It takes two to three minutes, and needs
`pip install 'sffx[demo]'`. The images come with scikit-learn: 1,797 of 8 x 8 pixels.
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
from sffx.memory.count import count_memory
from sffx.plots.results import plot_accuracy
from sffx.tables import MIB
from tools.timing import compare_time

BATCH = 64
TEST_IMAGES = 360
BAR = "{desc} {percentage:3.0f} % {bar:30} {elapsed} < {remaining}{postfix}"

Pair = tuple[Tensor, Tensor]  # images (N, 3, size, size) and labels (N,)


# The networks


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with BN and a shortcut, (B, C, H, W) to (B, D, H/stride, W/stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResidualNetwork(nn.Sequential):
    """A stem, four residual blocks and a linear layer, (B, 3, H, W) to (B, 10)."""

    def __init__(self) -> None:
        stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        super().__init__(
            OrderedDict(
                stem=stem,
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
            # With torchvision's 0.01 the running statistics lag behind a training this short.
            module.momentum = 0.1
    return model


@dataclass(frozen=True)
class Task:
    """A network and how to train it.

    All of it was chosen on 237 of the training images, never on the test images.

    Attributes:
        name: of its files.
        make: makes the network.
        size: height and width of its images; both networks want more than 8 x 8 pixels.
        epochs: how often every training image is seen.
        kernel_size: of the goodness heads. 3 instead of 1 adds 1.6 % to MobileNet's ensemble, whose
            early blocks see little of an image.
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


# The images


def digits(size: int, seed: int) -> tuple[Pair, Pair]:
    """Return the images to train on and those to test on, every digit with its share in both."""
    source = load_digits()
    grey = torch.tensor(source.images).float()[:, None] / 16
    enlarged = F.interpolate(grey, size=size, mode="bilinear")
    x = ((enlarged - 0.3) / 0.38).repeat(1, 3, 1, 1)
    y = torch.tensor(source.target)
    train, test = train_test_split(
        torch.arange(len(y)), test_size=TEST_IMAGES, stratify=y, random_state=seed
    )
    return (x[train], y[train]), (x[test], y[test])


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Turn each image by up to 11 degrees, scale it and shift it by up to 10 % each."""
    limits = torch.tensor([[0.2], [0.1], [0.2], [0.2]])
    angle, scale, right, down = (torch.rand(4, len(x), generator=generator) * 2 - 1) * limits
    cos = (1 + scale) * angle.cos()
    sin = (1 + scale) * angle.sin()
    moves = torch.stack([cos, -sin, right, sin, cos, down], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(moves, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


# The training


class Learner:
    """A network, its loss and its optimizer, which follows a one-cycle schedule."""

    def __init__(
        self,
        net: nn.Module,
        loss: Callable[[Any, Tensor, Tensor], Tensor],
        parameters: Any,
        lr: float,
        steps: int,
    ) -> None:
        self.net = net.train()
        self.loss = loss
        self.optimizer = torch.optim.AdamW(parameters, lr)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, lr, total_steps=steps)

    def step(self, x: Tensor, y: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(self.net, x, y)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def make_learners(task: Task, steps: int, seed: int) -> dict[str, Learner]:
    """Make the cut network and the plain one from the same initial weights."""
    torch.manual_seed(seed)
    model = task.make()
    image = torch.zeros(1, 3, task.size, task.size)
    net = sffx.transform(model, "residual", image, kernel_size=task.kernel_size)
    print(f"{net.plan}\n", flush=True)
    groups = sffx.parameter_groups(net, task.rates["SFF"])
    return {
        "SFF": Learner(net, sffx.local_loss, groups, task.rates["SFF"], steps),
        "BP": Learner(model, cross_entropy, model.parameters(), task.rates["BP"], steps),
    }


def train(learners: dict[str, Learner], data: Pair, epochs: int, seed: int) -> None:
    """Give every batch to all learners."""
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        batches += [index for index in order.split(BATCH) if len(index) == BATCH]
    with tqdm(batches, "training", mininterval=1, bar_format=BAR) as bar:
        for index in bar:
            images = augment(x[index], generator)
            losses = {}
            for name, learner in learners.items():
                losses[name] = learner.step(images, y[index])
                learner.schedule.step()
            shown = f"loss: SFF {losses['SFF']:.2f} (all blocks), BP {losses['BP']:.2f}"
            bar.set_postfix_str(shown, refresh=False)


# The comparison


@torch.no_grad()
def accuracy(model: nn.Module, data: Pair) -> float:
    x, y = data
    return share_correct(model.eval()(x), y)


def accuracy_onnx(path: Path, data: Pair) -> float:
    x, y = data
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return share_correct(torch.tensor(scores), y)


def share_correct(scores: Tensor, y: Tensor) -> float:
    return int((scores.argmax(dim=1) == y).sum()) / len(y)


def measure_costs(learners: dict[str, Learner], data: Pair) -> dict[str, dict[str, float]]:
    """Measure a training step of both ways. This changes the weights.

    Returns:
        By measure, the values of "SFF" and "BP" and their ratio.
    """
    x, y = data[0][:BATCH], data[1][:BATCH]
    steps = {}
    counts = {}
    for name, learner in learners.items():
        learner.net.train()
        steps[name] = partial(learner.step, x, y)
        counts[name] = count_memory(steps[name], model=learner.net, optimizer=learner.optimizer)
    times = compare_time(steps, rounds=10, warmup=1)
    return {
        "peak memory of a step, MiB": with_ratio(
            {name: count.peak / MIB for name, count in counts.items()}
        ),
        "activations of a step, MiB": with_ratio(
            {name: count.activations / MIB for name, count in counts.items()}
        ),
        "time of a step, ms": {
            "SFF": times.median("SFF") * 1e3,
            "BP": times.median("BP") * 1e3,
            # Of steps that ran side by side: other work on the machine slows both alike.
            "SFF / BP": times.paired_ratio("SFF", "BP"),
        },
    }


def with_ratio(values: dict[str, float]) -> dict[str, float]:
    return {**values, "SFF / BP": values["SFF"] / values["BP"]}


def report(name: str, results: dict[str, Any]) -> None:
    accuracies = results["accuracy"]
    title = f"accuracy of {name}"
    print(f"\n{title:34}{'SFF':>10}{'BP':>10}")
    for readout, value in accuracies["SFF"].items():
        # Backpropagation trains the classifier alone.
        bp = f"{accuracies['BP']:10.2%}" if readout == "classifier" else ""
        print(f"{readout:34}{value:10.2%}{bp}")
    print(f"{'ensemble, by ONNX Runtime':34}{accuracies['ONNX']:10.2%}")
    print(f"\n{'':34}{'SFF':>10}{'BP':>10}{'SFF / BP':>10}")
    for measure, cost in results["costs"].items():
        values = f"{cost['SFF']:10.1f}{cost['BP']:10.1f}{cost['SFF / BP']:10.2f}"
        print(f"{measure:34}{values}", flush=True)


def draw_blocks(net: fx.GraphModule, path: Path) -> list[Path]:
    """Draw the blocks; without a program that renders, leave the DOT text."""
    try:
        return [draw(net, path.with_suffix(suffix)) for suffix in (".svg", ".png")]
    except sffx.MissingExtra as missing:
        print(missing)
        return [draw(net, path.with_suffix(".dot"))]


def run(task: Task, out: Path, epochs: int, seed: int) -> dict[str, Any]:
    """Train, evaluate, export, draw and measure one network."""
    print(f"\n=== {task.name}: {task.size} x {task.size} pixels, {epochs} epochs ===\n", flush=True)
    data, test = digits(task.size, seed)
    learners = make_learners(task, steps=epochs * (len(data[0]) // BATCH), seed=seed)
    train(learners, data, epochs, seed)

    net: Any = learners["SFF"].net
    sff = sffx.evaluate(net, [test]).accuracy
    bp = accuracy(learners["BP"].net, test)
    onnx_file = sffx.export_onnx(net, out / f"{task.name}.onnx")
    onnx = accuracy_onnx(onnx_file, test)
    if onnx != sff["ensemble"]:
        raise SystemExit(f"ONNX Runtime and torch differ in accuracy: {onnx} and {sff['ensemble']}")

    plot = plot_accuracy(
        {"SFF": list(sff.items()), "BP": [("classifier", bp)]}, out / f"{task.name}-accuracy.png"
    )
    pictures = draw_blocks(net, out / f"{task.name}-blocks")
    results = {
        "epochs": epochs,
        "accuracy": {"SFF": sff, "BP": bp, "ONNX": onnx},
        "costs": measure_costs(learners, data),
        "files": [file.name for file in (onnx_file, *pictures, plot)],
    }
    report(task.name, results)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("sffx-demo"), help="folder for the files that are written"
    )
    parser.add_argument("--epochs", type=int, help="instead of each network's own number")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # Tensors this small gain little from threads. Where another process holds a core, each
    # operation waits for the slowest thread, which takes ten times as long and more. With one
    # thread, the figures are also the same however many cores there are.
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    print(
        f"Handwritten digits, {TEST_IMAGES} of 1,797 held back for the test. Two networks are each "
        "trained block by\nblock (SFF) and by backpropagation (BP), from the same weights, on the "
        f"same batches of {BATCH}, with AdamW."
    )
    results = {}
    for task in TASKS:
        results[task.name] = run(task, args.out, args.epochs or task.epochs, args.seed)
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    print(f"\nDone in {time.perf_counter() - start:.0f} s. Left in {args.out}:")
    files = ["results.json"]
    for result in results.values():
        files += result["files"]
    for file in files:
        print(f"  {file:34}{(args.out / file).stat().st_size / 1e3:7,.0f} kB")


if __name__ == "__main__":
    main()
