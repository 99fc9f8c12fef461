"""Search learning rates and weight decay with optuna.

Every method tries the same settings of one grid. Bad trials are pruned, and a search that was
interrupted goes on.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState
from torch import Tensor

from tools.reproduce.data import Split
from tools.reproduce.experiments import Experiment
from tools.reproduce.methods import METHODS
from tools.reproduce.training import Run, Setting

GRID = {
    "lr": (3e-4, 1e-3, 3e-3, 1e-2),
    "classifier_lr": (3e-4, 1e-3, 3e-3),
    "weight_decay": (1e-4, 1e-2),
}


def candidates(trials: int, strengths: Sequence[float] = ()) -> list[dict[str, float]]:
    """Return the settings that are tried.

    Each learning rate of the features comes first, in the middle of the other values. Then come
    others at random. A method with strengths tries each setting with each of them, and so fewer
    settings.
    """
    first = []
    for lr in (1e-3, 3e-3, 1e-2, 3e-4):
        first.append({"lr": lr, "classifier_lr": 1e-3, "weight_decay": 1e-2})
    rest = []
    for values in product(*GRID.values()):
        setting = dict(zip(GRID, values, strict=True))
        if setting not in first:
            rest.append(setting)
    random.Random(0).shuffle(rest)
    settings = [*first, *rest]
    if strengths:
        settings = [{**setting, "strength": each} for setting in settings for each in strengths]
    return settings[:trials]


def search(
    name: str,
    experiment: Experiment,
    method: str,
    split: Split,
    folder: Path,
    weights: Mapping[str, Tensor] | None = None,
) -> Setting:
    """Return the setting with the best validation accuracy among the experiment's trials.

    The settings are the same for every method without a recipe (`candidates`). Trials that were
    made before are not made again, and one that was interrupted is. Where a method is judged by its
    ensemble, the classifier's learning rate makes no difference to it. Then the first of equal
    settings is taken.

    Args:
        name: of the experiment.
        experiment: says how many trials there are, and how long they are.
        method: that is trained.
        split: of one seed.
        folder: keeps the trials.
        weights: from which each trial starts; None starts from scratch.

    Raises:
        SystemExit: the trials in the folder had another length or precision.
        RuntimeError: no trial trained to its end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    study = _study(f"{name}, {method}", experiment.trial_epochs, folder)
    require_same_trials(study, experiment, folder)
    strengths = METHODS[method].strengths
    grids = {**GRID, "strength": strengths} if strengths else GRID

    def objective(trial: Trial) -> float:
        values = {key: trial.suggest_categorical(key, grid) for key, grid in grids.items()}
        setting = Setting(**values)
        run = Run(experiment, method, setting, 0, split, weights)

        def prune_if_hopeless(epoch: int, accuracy: float) -> None:
            if not math.isfinite(run.curve[-1]["train_loss"]):
                raise optuna.TrialPruned
            trial.report(run.best["accuracy"], epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

        run.train(experiment.trial_epochs, each=prune_if_hopeless)
        best = run.best["accuracy"]
        print(f"  {name}, {method}, trial {trial.number}: {setting}, {best:.2%}", flush=True)
        return best

    wanted = candidates(experiment.trials, strengths)
    done = [trial.params for trial in _trials(study, TrialState.COMPLETE, TrialState.PRUNED)]
    for setting in wanted:
        if setting not in done:
            study.enqueue_trial(setting)
            study.optimize(objective, n_trials=1)
    whole = [trial for trial in _trials(study, TrialState.COMPLETE) if trial.params in wanted]
    if not whole:
        raise RuntimeError(
            f"no setting of {name}, {method}, trained to the end of its trial. "
            "Hint: see the losses above, and change GRID"
        )
    return Setting(**max(whole, key=lambda trial: trial.values).params)


def _study(name: str, epochs: int, folder: Path) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = JournalFileBackend(str(folder / "search.journal"))
    pruner = optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=epochs // 2)
    return optuna.create_study(
        storage=JournalStorage(journal),
        study_name=name,
        direction="maximize",
        pruner=pruner,
        load_if_exists=True,
    )


def require_same_trials(study: optuna.Study, experiment: Experiment, folder: Path) -> None:
    """Check that the trials of a study are as long and as precise as the ones to come.

    Raises:
        SystemExit: they are not.
    """
    for key, value in (("epochs", experiment.trial_epochs), ("precision", experiment.precision)):
        # Older studies do not say how precise they are.
        before = study.user_attrs.get(key, value)
        if before != value:
            raise SystemExit(
                f"the trials in {folder} had {key} {before}, not {value}. Hint: another --runs"
            )
        if key not in study.user_attrs:
            study.set_user_attr(key, value)


def _trials(study: optuna.Study, *states: TrialState) -> list[optuna.trial.FrozenTrial]:
    return [trial for trial in study.trials if trial.state in states]
