"""Runs that go on, settings that serve another experiment, and costs that are measured again."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from tests.tools.test_reproduce import SMALL, new_run, small_split
from tools.reproduce import __main__ as command
from tools.reproduce import costs as costs_of_steps
from tools.reproduce.experiments import EXPERIMENTS
from tools.reproduce.render import commands
from tools.reproduce.search import search
from tools.reproduce.training import Run, Setting


@pytest.mark.parametrize(
    ("experiment", "setting", "message"),
    [
        ({"precision": "bfloat16"}, {}, "precision 'float32' instead of 'bfloat16'"),
        ({"epochs": 9}, {}, "epochs 3 instead of 9"),
        ({}, {"lr": 1e-2}, "lr 0.003 instead of 0.01"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(experiment, setting, message, tmp_path):
    first = new_run()
    first.train(1, tmp_path / "run.pt")
    other = Run(
        replace(SMALL, **experiment), "SFF", replace(first.setting, **setting), 0, small_split()
    )
    with pytest.raises(SystemExit, match=message):
        other.train(2, tmp_path / "run.pt")


def test_an_older_checkpoint_does_not_say_what_it_is_of(tmp_path):
    first = new_run()
    first.train(1, tmp_path / "run.pt")
    state = torch.load(tmp_path / "run.pt", weights_only=False)
    del state["config"], state["setting"]
    torch.save(state, tmp_path / "run.pt")
    second = new_run()
    second.train(2, tmp_path / "run.pt")
    assert len(second.curve) == 2


def test_a_run_that_diverged_does_not_go_on(tmp_path):
    run = new_run()
    run.train(1)
    with torch.no_grad():
        run.net.get_submodule("head_0").bias.fill_(float("nan"))
    run.train(10, tmp_path / "run.pt")
    again = new_run()
    again.train(10, tmp_path / "run.pt")
    assert len(again.curve) == len(run.curve) == 2
    assert again.result()["test"] == run.result()["test"]


def test_shortened_experiments_take_the_settings_of_a_shortened_one(tmp_path, monkeypatch):
    """As in `python -m tools.reproduce --epochs 1 --precision bfloat16 small larger`."""
    monkeypatch.setitem(EXPERIMENTS, "small", SMALL)
    monkeypatch.setitem(EXPERIMENTS, "larger", replace(SMALL, size=64, settings="small"))
    options = {"epochs": 1, "precision": "bfloat16", "trials": 1}
    folders = command.Folders(tmp_path, tmp_path, tmp_path)
    record = folders.record("small", "SFF", 0)
    record.parent.mkdir()
    setting = Setting(0.5, 0.25, 0.0)
    made = asdict(replace(EXPERIMENTS["small"], **options))
    record.write_text(json.dumps({"method": "SFF", "config": made, "setting": asdict(setting)}))
    larger = replace(EXPERIMENTS["larger"], **options)
    assert command.find_setting("larger", larger, "SFF", folders) == setting
    # A search does not depend on the epochs of the runs behind it.
    longer = replace(larger, epochs=7)
    assert command.find_setting("larger", longer, "SFF", folders) == setting
    precise = replace(larger, precision="float32")
    assert command.find_setting("larger", precise, "SFF", folders) == setting


@pytest.mark.parametrize("name", [name for name, each in EXPERIMENTS.items() if each.settings])
def test_an_experiment_asks_for_the_search_that_it_takes(name):
    """Otherwise its command ends with a message as soon as there are records."""
    source = EXPERIMENTS[EXPERIMENTS[name].settings]
    for field in ("trials", "trial_epochs", "precision"):
        assert getattr(EXPERIMENTS[name], field) == getattr(source, field)


def test_trials_of_another_precision_are_not_mixed(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "train", lambda *_, **__: None)
    search("toys", SMALL, "SFF", small_split(), tmp_path)
    with pytest.raises(SystemExit, match="had precision float32, not bfloat16"):
        search("toys", replace(SMALL, precision="bfloat16"), "SFF", small_split(), tmp_path)


def test_costs_of_some_methods_leave_those_of_others(tmp_path, monkeypatch):
    def measured(experiment, strengths):
        return {method: {"time": len(experiment.methods)} for method in experiment.methods}

    monkeypatch.setattr(command, "costs", measured)
    folders = command.Folders(tmp_path, tmp_path, tmp_path)
    command.write_costs("toys", replace(SMALL, methods=("BP", "SFF", "mlp")), folders)
    command.write_costs("toys", replace(SMALL, methods=("BP", "mlp")), folders)
    found = json.loads((tmp_path / "toys" / "costs.json").read_text())
    assert {name: cost["time"] for name, cost in found.items() if name != "versions"} == {
        "BP": 2,
        "SFF": 3,
        "mlp": 2,
    }


@pytest.mark.parametrize(("name", "classes"), [("depth-1", 10), ("recipes-pairs-resnet18", 100)])
def test_costs_are_of_as_many_classes_as_the_data_have(name, classes, monkeypatch):
    monkeypatch.setattr(costs_of_steps, "relative_costs", lambda trainings, *_, **__: trainings)
    found = costs_of_steps.costs(replace(EXPERIMENTS[name], methods=("BP",)), {})
    assert found["BP"].model.fc.out_features == classes


def test_a_caption_names_the_options_that_records_were_made_with(monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "toys", SMALL)
    config = json.loads(json.dumps(asdict(SMALL)))
    whole, shortened = [{"config": config}], [{"config": {**config, "trial_epochs": 7}}]
    older = {key: value for key, value in config.items() if key != "precision"}
    start = "python -m tools.reproduce toys"
    assert commands("toys", {"BP": whole, "SFF": [{"config": older}]}) == f"`{start}`"
    assert commands("toys", {"BP": shortened}) == f"`{start} --trial-epochs 7`"
    both = commands("toys", {"BP": whole, "mlp(256, 4)": shortened})
    assert both == (f"`{start} --methods BP`, `{start} --trial-epochs 7 --methods 'mlp(256, 4)'`")
