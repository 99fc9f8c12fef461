"""Search learning rates and weight decay with optuna: the same settings of one grid for every method, pruned, resumable."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState
from torch import Tensor

from tools.reproduce.data import Split
from tools.reproduce.experiments import Experiment
from tools.reproduce.training import Run, Setting

GRID = {
    "lr": (3e-4, 1e-3, 3e-3, 1e-2),
    "classifier_lr": (3e-4, 1e-3, 3e-3),
    "weight_decay": (1e-4, 1e-2),
}


def candidates(trials: int) -> list[dict[str, float]]:
    """Return the settings that are tried: each learning rate of the features at the middle of the others, then others at random."""
    first = [
        {"lr": lr, "classifier_lr": 1e-3, "weight_decay": 1e-2} for lr in (1e-3, 3e-3, 1e-2, 3e-4)
    ]
    rest = [dict(zip(GRID, values, strict=True)) for values in product(*GRID.values())]
    rest = [setting for setting in rest if setting not in first]
    random.Random(0).shuffle(rest)
    return [*first, *rest][:trials]


def search(
    name: str,
    experiment: Experiment,
    method: str,
    split: Split,
    folder: Path,
    weights: Mapping[str, Tensor] | None = None,
) -> Setting:
    """Return the setting with the best validation accuracy of `experiment.trials`, on one seed's split.

    The settings are the same for every method (`candidates`). The trials lie in `folder`; those that were made before are not made
    again, and one that was interrupted is. Where a method is judged by its ensemble, the classifier's learning rate makes no difference
    to it, and the first of equal settings is taken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / "search.journal"))),
        study_name=f"{name}, {method}",
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(
            n_startup_trials=3, n_warmup_steps=experiment.trial_epochs // 2
        ),
        load_if_exists=True,
    )

    def objective(trial: Trial) -> float:
        setting = Setting(
            **{key: trial.suggest_categorical(key, values) for key, values in GRID.items()}
        )
        run = Run(experiment, method, setting, 0, split, weights)

        def each(epoch: int, accuracy: float) -> None:
            if not math.isfinite(run.curve[-1]["train_loss"]):
                raise optuna.TrialPruned
            trial.report(run.best["accuracy"], epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

        run.train(experiment.trial_epochs, each=each)
        print(
            f"  {name}, {method}, trial {trial.number}: {setting}, {run.best['accuracy']:.2%}",
            flush=True,
        )
        return run.best["accuracy"]

    had = study.user_attrs.get("epochs")
    if had is None:
        study.set_user_attr("epochs", experiment.trial_epochs)
    elif had != experiment.trial_epochs:
        raise SystemExit(
            f"the trials in {folder} had {had} epochs, not {experiment.trial_epochs}. Hint: another --runs"
        )
    wanted_settings = candidates(experiment.trials)
    done = [
        trial.params
        for trial in study.trials
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    ]
    for wanted in wanted_settings:
        if wanted not in done:
            study.enqueue_trial(wanted)
            study.optimize(objective, n_trials=1)
    whole = [
        trial
        for trial in study.trials
        if trial.state == TrialState.COMPLETE and trial.params in wanted_settings
    ]
    if not whole:
        raise RuntimeError(
            f"no setting of {name}, {method}, trained to the end of its trial. Hint: see the losses above, and change GRID"
        )
    return Setting(**max(whole, key=lambda trial: trial.value).params)
