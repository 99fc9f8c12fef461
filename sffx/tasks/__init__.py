"""What a model predicts and what a target is: the tasks.

`sffx.transform` infers the task from the model's output where that is clear. Otherwise pass it:
`sffx.transform(model, task=sffx.tasks.Regression())`.
"""

from __future__ import annotations

from sffx.tasks.classification import CLASSIFICATION, Classification
from sffx.tasks.dense_regression import DenseRegression
from sffx.tasks.labels import MultiLabel
from sffx.tasks.multilabel_segmentation import MultiLabelSegmentation
from sffx.tasks.records import task_of_record, task_record
from sffx.tasks.regression import Regression
from sffx.tasks.segmentation import Segmentation
from sffx.tasks.task import Sums, Task
from sffx.tasks.token_regression import TokenRegression
from sffx.tasks.tokens import LanguageModel, TokenClassification

__all__ = [
    "CLASSIFICATION",
    "Classification",
    "DenseRegression",
    "LanguageModel",
    "MultiLabel",
    "MultiLabelSegmentation",
    "Regression",
    "Segmentation",
    "Sums",
    "Task",
    "TokenClassification",
    "TokenRegression",
    "task_of_record",
    "task_record",
]
