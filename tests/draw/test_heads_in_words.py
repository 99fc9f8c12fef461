"""Pictures and pages say what the task and the objective of a plan make of heads and classifier."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

import sffx
from sffx.blocks import BlockPlan, Options
from sffx.draw.labels import footer_label, head_label
from sffx.draw.page import page
from sffx.objectives import CFFA, SCFF, CwC, ForwardForward, UnsupervisedForwardForward
from tests.draw.test_page import parse

TASKS = (
    (sffx.tasks.Classification(), "10 classes", "cross-entropy from its own logits"),
    (sffx.tasks.MultiLabel(), "10 labels", "binary cross-entropy from its own logits"),
    (sffx.tasks.Regression(), "10 numbers", "squared error from its own numbers"),
    (sffx.tasks.Segmentation(), "10 classes", "cross-entropy from its own logits"),
)
EXCEPT_FIRST = "the mean of the heads' scores over the blocks but the first is the prediction"
OBJECTIVES: tuple[tuple[Any, str, str], ...] = (
    (CwC(), "its mean over the blocks is the prediction", "learns by"),
    (ForwardForward(), EXCEPT_FIRST, "does not learn"),
    (ForwardForward(neutral=True), EXCEPT_FIRST, "learns by"),
    (UnsupervisedForwardForward(), EXCEPT_FIRST, "learns by"),
    (SCFF(), "the mean of the heads' scores over the blocks is the prediction", "learns by"),
    (CFFA(), EXCEPT_FIRST, "does not learn"),
)


def plain(markup: str) -> str:
    return re.sub(r"<[^>]*>", " ", markup).replace("&#39;", "'")


@pytest.mark.parametrize(("task", "count", "learns"), TASKS)
def test_the_head_and_the_classifier_are_those_of_the_task(
    small: BlockPlan, task: sffx.tasks.Task, count: str, learns: str
) -> None:
    plan = replace(small, task=task, num_classes=10)
    assert count in plain(head_label(plan.blocks[0], plan))
    assert f"classifier: learns by {learns}" in plain(footer_label(plan, ()))
    assert f"classifier: learns by {learns}" in plain(page(plan))


@pytest.mark.parametrize("task", [task for task, _, _ in TASKS])
@pytest.mark.parametrize("goodness", ["sff", "mlp", "auto"])
def test_a_head_on_the_page_says_what_it_says_in_a_picture(
    small: BlockPlan, task: sffx.tasks.Task, goodness: str
) -> None:
    plan = replace(small, task=task, options=Options(goodness))
    drawn = plain(head_label(plan.blocks[0], plan)[1:-1]).split()
    heads = [
        element.text
        for element in parse(page(plan))
        if element.tag == "span"
        and element.around
        and element.around.attributes == {"class": "head"}
    ]
    assert [head.replace(",", "").split() for head in heads] == [drawn] * len(plan)


@pytest.mark.parametrize(("objective", "prediction", "learns"), OBJECTIVES)
def test_the_legend_is_that_of_the_objective(
    small: BlockPlan, objective: Any, prediction: str, learns: str
) -> None:
    plan = replace(small, options=Options(objective=objective))
    for text in (plain(footer_label(plan, ())), plain(page(plan))):
        assert prediction in text
        assert f"classifier: {learns}" in text
