"""Search learning rates and weight decay with optuna: the same random part of one grid for every method, pruned, resumable."""

from __future__ import annotations

from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState

from tools.reproduce.data import Split
from tools.reproduce.experiments import Experiment
from tools.reproduce.training import Run, Setting

GRID = {
    "lr": (3e-4, 1e-3, 3e-3, 1e-2),
    "classifier_lr": (3e-4, 1e-3, 3e-3),
    "weight_decay": (1e-4, 1e-2),
}


def search(name: str, experiment: Experiment, method: str, split: Split, folder: Path) -> Setting:
    """Return the setting with the best validation accuracy of `experiment.trials`, on one seed's split.

    The trials lie in `folder`; those that were made before are not made again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / "search.journal"))),
        study_name=f"{name}, {method}",
        direction="maximize",
        sampler=optuna.samplers.GridSampler(GRID, seed=0),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=experiment.trial_epochs // 2),
        load_if_exists=True,
    )

    def objective(trial: Trial) -> float:
        setting = Setting(**{key: trial.suggest_categorical(key, values) for key, values in GRID.items()})
        run = Run(experiment, method, setting, 0, split)

        def each(epoch: int, accuracy: float) -> None:
            trial.report(run.best["accuracy"], epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

        run.train(experiment.trial_epochs, each=each)
        print(f"  {name}, {method}, trial {trial.number}: {setting}, {run.best['accuracy']:.2%}", flush=True)
        return run.best["accuracy"]

    finished = sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL) for trial in study.trials)
    if finished < experiment.trials:
        study.optimize(objective, n_trials=experiment.trials - finished, catch=(FloatingPointError,))
    return Setting(**study.best_params)
