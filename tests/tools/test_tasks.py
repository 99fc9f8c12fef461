"""The experiments with other tasks: data, methods, and runs that go on after an interruption."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from tools.tasks.__main__ import OUT, main, table
from tools.tasks.data import CHARACTERS, diabetes, docstrings
from tools.tasks.experiments import EXPERIMENTS
from tools.tasks.training import Run

pytest.importorskip("sklearn")


@pytest.mark.parametrize("method", ["BP", "SFF"])
def test_an_interrupted_run_ends_as_a_whole_one(method, tmp_path, monkeypatch):
    experiment = EXPERIMENTS["diabetes"]
    data = diabetes(Path(), 0)
    run = Run(experiment, experiment.methods[method], 3e-3, 0, 3, data)
    whole = run.train(tmp_path / "whole.pt")
    original = Run._epoch

    def stop_in_the_second_epoch(self, net, optimizer, epoch):
        if epoch == 1:
            raise KeyboardInterrupt
        original(self, net, optimizer, epoch)

    monkeypatch.setattr(Run, "_epoch", stop_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        run.train(tmp_path / "other.pt")
    monkeypatch.setattr(Run, "_epoch", original)
    assert copy.copy(run).train(tmp_path / "other.pt") == whole


def test_the_text_is_split_by_module_and_fits_the_vocabulary():
    data = docstrings(Path(), 0, length=64)
    assert len(data.train) > 1000
    trained = {tuple(row) for row in data.train.x.tolist()}
    tested = {tuple(row) for row in data.test.x.tolist()}
    assert len(trained & tested) < len(tested) / 100
    assert int(data.train.x.max()) < len(CHARACTERS)


def test_every_method_of_the_language_model_makes_a_step():
    experiment = EXPERIMENTS["language"]
    x = torch.randint(0, len(CHARACTERS), (2, 16))
    for name, method in experiment.methods.items():
        net = method.net(experiment.build(), experiment.task, experiment.policy, x).train()
        blocks = 1 if method.kind == "BP" else len(net.plan.all_blocks)
        assert blocks == (1 if name == "BP" else int(name[-1]))
        method.loss(net, experiment.task, x, x).backward()


def test_a_command_writes_the_page_of_what_there_is(tmp_path):
    assert main(["--render", "--out", str(tmp_path)]) == 0
    assert next(iter(table(tmp_path))) == "# Other tasks"
    with pytest.raises(SystemExit):
        main(["nothing"])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_table_says_how_many_seeds_it_has(name):
    """Records older than their versions as well."""
    lines = list(table(OUT))
    start = lines.index(f"## {name}")
    rows = lines[start + 1 :]
    own = rows[: next((i for i, line in enumerate(rows) if line.startswith("## ")), len(rows))]
    assert any(f"{len(EXPERIMENTS[name].seeds)} seeds" in line for line in own)
