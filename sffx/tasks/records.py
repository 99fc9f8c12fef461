"""A task as an entry of a record, as a checkpoint and an exported file hold it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from sffx.errors import InputError, shown
from sffx.tasks.classification import Classification
from sffx.tasks.dense_regression import DenseRegression
from sffx.tasks.labels import MultiLabel
from sffx.tasks.multilabel_segmentation import MultiLabelSegmentation
from sffx.tasks.regression import Regression
from sffx.tasks.segmentation import Segmentation
from sffx.tasks.task import Task
from sffx.tasks.token_regression import TokenRegression
from sffx.tasks.tokens import LanguageModel, TokenClassification

TASKS: dict[str, type[Task]] = {
    Classification.name: Classification,
    MultiLabel.name: MultiLabel,
    Regression.name: Regression,
    DenseRegression.name: DenseRegression,
    Segmentation.name: Segmentation,
    MultiLabelSegmentation.name: MultiLabelSegmentation,
    TokenClassification.name: TokenClassification,
    TokenRegression.name: TokenRegression,
    LanguageModel.name: LanguageModel,
}


def task_record(task: Task) -> dict[str, Any]:
    """Return a task as its name and its options: {"name": "segmentation", "ignore_index": 11}."""
    options = asdict(task)
    # What `transform` has read off the model is no option.
    asked = {each.name: options[each.name] for each in fields(task) if each.compare}
    return {"name": task.name, **asked}


def task_of_record(record: Any) -> Task:
    """Return the task that `task_record` wrote.

    Raises:
        InputError: it is of no known task.
    """
    options = dict(record) if isinstance(record, Mapping) else {}
    name = options.pop("name", None)
    try:
        return TASKS[name](**options)
    except (KeyError, TypeError) as cause:
        names = ", ".join(TASKS)
        raise InputError(f"{record!r} is the record of no task. Hint: {names}") from cause


def task_named(text: str) -> Task:
    """Return the task that a text such as "segmentation" or "segmentation(255)" means.

    The number is the label that is left out.

    Raises:
        InputError: it is of no known task, or its task leaves out no label.
    """
    name, parenthesis, rest = text.strip().partition("(")
    try:
        if not parenthesis:
            return TASKS[name]()
        label = int(rest.removesuffix(")").removeprefix("ignore_index="))
        return task_of_record({"name": name, "ignore_index": label})
    except (KeyError, ValueError) as cause:
        names = ", ".join(TASKS)
        raise InputError(
            f"there is no task {text!r}. Hint: choose one of {names}; 'segmentation(255)' leaves "
            "out label 255"
        ) from cause


def require_task(task: Any) -> None:
    """Raise an InputError if something is neither a task nor None."""
    if task is None or isinstance(task, Task):
        return
    hint = "pass one of sffx.tasks, such as sffx.tasks.Regression()"
    if isinstance(task, type) and issubclass(task, Task):
        hint = f"pass an instance, {task.__name__}()"
    raise InputError(f"task is {shown(task)}. Hint: {hint}")
