"""The picture of a training: what evaluations and logs hold, and what matplotlib draws."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sffx.errors import InputError
from sffx.plots.history import Epoch, epochs
from sffx.plots.results import plot_training
from sffx.runtime.evaluate import Evaluation
from tests.plots.test_results import figures, points  # noqa: F401 - a fixture

EVALUATIONS = [
    Evaluation(
        {"block_0": 0.3, "block_1": 0.4, "ensemble": 0.35},
        {"block_0": 2.0, "block_1": 1.5, "ensemble": 1.75},
        10,
    ),
    Evaluation(
        {"block_0": 0.5, "block_1": 0.6, "ensemble": 0.55},
        {"block_0": 1.0, "block_1": 0.5, "ensemble": 0.75},
        10,
    ),
]
RATES = [{"block_0": 1e-2, "block_1": 1e-2}, {"block_0": 1e-3, "block_1": 1e-2}]

# As Lightning's CSVLogger writes it: rows of training and of validation, with columns in
# alphabetical order.
LOG = """\
epoch,lr/block_0,step,train_loss,val_acc,val_acc/block_0,val_acc/last,val_loss,val_loss/block_0
0,,9,3.5,,,,,
0,0.01,15,,0.5,0.25,0.25,1.5,2.0
1,,19,2.5,,,,,
1,0.001,31,,0.75,0.5,0.5,1.0,1.25
"""


def test_evaluations_with_rates_are_epochs() -> None:
    first, second = epochs(EVALUATIONS, RATES)
    assert first == Epoch(0, EVALUATIONS[0].accuracy, EVALUATIONS[0].loss, RATES[0])
    assert (second.number, second.lr) == (1, RATES[1])


def test_mappings_are_epochs() -> None:
    assert epochs([{"accuracy": {"block_0": 0.5}, "lr": {"block_0": 0.1}}]) == [
        Epoch(0, {"block_0": 0.5}, {}, {"block_0": 0.1})
    ]


def test_a_log_of_lightning_is_read_epoch_by_epoch(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(LOG)
    first, second = epochs(tmp_path / "metrics.csv")
    assert first.accuracy == {"ensemble": 0.5, "block_0": 0.25, "last": 0.25}
    assert first.loss == {"ensemble": 1.5, "block_0": 2.0}
    assert (second.number, second.accuracy["ensemble"], second.lr) == (1, 0.75, {"block_0": 0.001})


def test_a_resumed_training_is_one(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text(LOG)
    (tmp_path / "two.csv").write_text(LOG.replace("\n1,", "\n2,").replace("\n0,", "\n1,"))
    found = epochs([tmp_path / "one.csv", str(tmp_path / "two.csv")])
    assert [(epoch.number, epoch.accuracy["block_0"]) for epoch in found] == [
        (0, 0.25),
        (1, 0.25),
        (2, 0.5),
    ]


def test_a_log_of_backpropagation_has_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,lr/model,val_acc,val_loss\n0,0.1,0.5,1.0\n")
    assert epochs(tmp_path / "metrics.csv") == [
        Epoch(0, {"model": 0.5}, {"model": 1.0}, {"model": 0.1})
    ]


@pytest.mark.parametrize(
    ("history", "rates", "message"),
    [
        ([], None, r"no epoch with an accuracy or a loss\. Hint"),
        (EVALUATIONS, RATES[:1], "1 rates for 2 epochs"),
        ([0.5], None, "epoch 0 of the history is a float, but it has neither accuracy nor loss"),
        (
            [{"accuracy": 0.5}],
            None,
            "epoch 0 of the history is a dict, but its accuracy is a float",
        ),
        ("nowhere.csv", None, "there is no log 'nowhere.csv'"),
        ([EVALUATIONS[0], "run.csv"], None, "history holds 1 paths and 1 other entries"),
        (EVALUATIONS, [0.1, 0.1], r"rates is \[0\.1, 0\.1\], no list of mappings"),
        (EVALUATIONS, RATES[0], "rates is {.*}, no list of mappings"),
        *(
            ([{"accuracy": {"block_0": 0.5, "ensemble": value}}], None, message)
            for value, message in (
                (50.1, "accuracy of 'ensemble' in epoch 0 is 50.1, not between 0 and 1. Hint: per"),
                (-0.1, "is -0.1, not between"),
                ("0.5", "the accuracy of 'ensemble' in epoch 0 is '0.5'. Hint: pass a number"),
                (None, "is None. Hint: pass a number, or nan"),
                (np.zeros(2), "is array.*Hint: pass a number, or nan"),
                (torch.zeros(2), "is tensor.*Hint: pass a number, or nan"),
            )
        ),
        ([{"loss": {0: 0.5}}], None, "the loss of 0 in epoch 0 has no text as its name"),
        (EVALUATIONS[0], None, r"history is a \w+, not a list of epochs\. Hint: \[sffx\.evaluate"),
        ({"accuracy": {"block_0": 0.5}}, None, r"history is a dict, not a list of epochs"),
    ],
)
def test_what_is_no_history_is_refused(history: Any, rates: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        epochs(history, rates)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch,val_acc\n0,high\n", "its column 'val_acc' holds 'high'"),
        ("val_acc\n0.5\n", "its column 'epoch' holds None"),
        ("", "no epoch"),
        ("epoch,val_acc\n0,93.1\n", "'model' in epoch 0 is 93.1, not between 0 and 1"),
    ],
)
def test_a_file_that_is_no_log_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        epochs(tmp_path / "metrics.csv")


def test_each_figure_has_a_panel_and_each_block_a_line(figures: list[Any], tmp_path: Path) -> None:
    plot_training(EVALUATIONS, tmp_path / "training.png", rates=RATES)
    accuracy, loss, rate = figures[0].axes
    assert points(accuracy) == [[0.3, 0.5], [0.4, 0.6], [0.35, 0.55]]
    assert points(loss) == [[2.0, 1.0], [1.5, 0.5], [1.75, 0.75]]
    assert points(rate) == [[1e-2, 1e-3], [1e-2, 1e-2], []]
    assert (accuracy.get_yscale(), loss.get_yscale(), rate.get_yscale()) == (
        "linear",
        "linear",
        "log",
    )
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [
        "block 0",
        "block 1",
        "ensemble",
    ]
    assert [float(x) for x in accuracy.lines[0].get_xdata()] == [1, 2]


def test_what_is_not_known_has_no_panel_and_the_last_block_one_line(
    figures: list[Any], tmp_path: Path
) -> None:
    plot_training([{"accuracy": {"block_0": 0.5, "last": 0.5}}], tmp_path / "training.svg")
    (accuracy,) = figures[0].axes
    assert points(accuracy) == [[0.5]]


def test_of_many_blocks_the_legend_names_three(figures: list[Any], tmp_path: Path) -> None:
    plot_training(
        [{"accuracy": {f"block_{index}": 0.5 for index in range(21)}}], tmp_path / "training.pdf"
    )
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [
        "block 0",
        "block 10",
        "block 20",
    ]
    assert len(figures[0].axes[0].lines) == 21


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"cannot be read as a log: .* Hint"):
        epochs(tmp_path / "metrics.csv")


def test_numbers_have_a_loss_and_no_accuracy(figures: list[Any], tmp_path: Path) -> None:
    history = [Evaluation({}, {"block_0": 2.0, "ensemble": 1.5}, 8)]
    plot_training(history, tmp_path / "training.svg")
    (loss,) = figures[0].axes
    assert points(loss) == [[2.0], [1.5]]
    assert loss.get_ylabel() == "loss"
    (tmp_path / "metrics.csv").write_text("epoch,val_loss,val_loss/block_0\n0,1.5,2.0\n")
    assert epochs(tmp_path / "metrics.csv")[0].loss == history[0].loss


def test_values_between_gaps_are_points(figures: list[Any], tmp_path: Path) -> None:
    values = [0.5 if epoch % 2 else math.nan for epoch in range(60)]
    history = [{"accuracy": {"block_0": value, "block_1": 0.5}} for value in values]
    plot_training(history, tmp_path / "training.svg")
    gaps, plain = figures[0].axes[0].lines
    assert (gaps.get_marker(), plain.get_marker()) == (".", "")


def test_names_of_your_own_look_different(figures: list[Any], tmp_path: Path) -> None:
    names = ["train", "val", "last", "ensemble", "classifier", "weighted", "a $x$ b", "c $_d"]
    plot_training([{"accuracy": dict.fromkeys(names, 0.5)}], tmp_path / "training.svg")
    lines = figures[0].axes[0].lines
    looks = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len(looks) == len(lines) == len(names)
    (legend,) = figures[0].legends
    assert [text.get_text().replace("\\", "") for text in legend.get_texts()] == [
        name.replace("_", " ") for name in names
    ]
