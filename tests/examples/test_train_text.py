"""The example with transformers.Trainer: it learns, and writes a model that transformers reads."""

from __future__ import annotations

import importlib.util
import random
import re
from pathlib import Path

import pytest

from tests.examples.scripts import run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None
    or importlib.util.find_spec("accelerate") is None,
    reason="the Trainer needs the packages transformers and accelerate, in the extra 'dev'",
)

FILLERS = ["the", "a", "this", "that", "film", "book", "plot", "actor", "scene", "was", "is"]
OPINIONS = {"good": ["great", "lovely", "superb"], "bad": ["dull", "awful", "poor"]}


def write_texts(path: Path, count: int, seed: int) -> None:
    """Write texts that one word of an opinion tells apart."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        label = draw.choice(list(OPINIONS))
        words = [*draw.choices(FILLERS, k=draw.randint(3, 9)), draw.choice(OPINIONS[label])]
        draw.shuffle(words)
        lines.append(f"{label}\t{' '.join(words)}\n")
    path.write_text("".join(lines), encoding="utf-8")


def test_the_trainer_of_transformers_trains_a_text_classifier(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    write_texts(tmp_path / "train.tsv", 400, seed=0)
    write_texts(tmp_path / "test.tsv", 100, seed=1)
    options = ["--epochs", 2, "--width", 16, "--layers", 2, "--length", 12, "--lr", 0.01]
    output = run("train_text.py", "--data", tmp_path, "--out", "out", *options, folder=tmp_path)
    rows = [line.split() for line in output.splitlines() if line.startswith("ensemble")]
    assert float(rows[-1][1].rstrip("%")) > 90
    assert "'eval_accuracy'" in output
    model = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_labels == 2


def test_lines_and_labels_that_the_script_cannot_take_are_refused(tmp_path: Path) -> None:
    write_texts(tmp_path / "train.tsv", 20, seed=0)
    for line, message in (
        ("good", "line 2 of .*test.tsv has 0 tabs. Hint: a line is a label, a tab and a text"),
        ("other\ta book", "test.tsv has labels that train.tsv lacks: {'other'}"),
    ):
        (tmp_path / "test.tsv").write_text(f"\n{line}\n", encoding="utf-8")
        error = run("train_text.py", "--data", tmp_path, folder=tmp_path, fails=True)
        assert re.search(message, error)
