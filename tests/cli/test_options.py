"""The options of a command line that say how a model is cut."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

import sffx
from sffx.cli.cut import cut_options
from sffx.cli.options import TASK_NAMES, add_cut_options, with_command
from sffx.cli.wording import in_options
from sffx.errors import InputError
from sffx.tasks.records import TASKS


def given(*arguments: str) -> dict[str, Any]:
    """Return the arguments of `transform` that a command line gives."""
    parser = argparse.ArgumentParser()
    add_cut_options(parser)
    return cut_options(parser.parse_args(arguments))


def test_a_command_line_without_options_gives_nothing() -> None:
    assert given() == {}


def test_the_options_are_the_arguments_of_transform() -> None:
    names = ["--policy", "uniform", "--goodness", "mlp(64, 3)", "--norm", "none"]
    options = given(*names, "--kernel-size", "3", "--classes", "7", "--input", "1,3,32,32")
    assert options.pop("example_input").shape == (1, 3, 32, 32)
    assert options == {
        "policy": "uniform",
        "goodness": "mlp(64, 3)",
        "norm": "none",
        "kernel_size": 3,
        "num_classes": 7,
    }


@pytest.mark.parametrize("task", [each() for each in TASKS.values()])
def test_each_task_has_a_name(task: sffx.tasks.Task) -> None:
    name = TASK_NAMES[type(task).__name__]
    assert given("--task", name) == {"task": task}
    # And a message that names the task in Python names this option instead.
    assert in_options(f"Hint: pass task=sffx.tasks.{task!r}.") == f"Hint: --task {name}."


def test_a_task_may_leave_out_a_label() -> None:
    assert given("--task", "segmentation(255)")["task"].ignore_index == 255
    message = in_options("Hint: task=sffx.tasks.Segmentation(ignore_index=255)")
    assert message == "Hint: --task 'segmentation(255)'"


def test_the_user_s_own_words_stay() -> None:
    message = "net.py raised an error of its own:\nTypeError: num_classes=3"
    assert in_options(message) == message


def test_a_goodness_of_one_s_own_is_found() -> None:
    assert given("--goodness", "os.path:join")["goodness"].__name__ == "join"


def test_several_inputs_have_names_or_an_order() -> None:
    example = given("--input", "ids=1,16:int", "--input", "mask=1,16")["example_input"]
    assert {name: (tuple(x.shape), str(x.dtype)) for name, x in example.items()} == {
        "ids": ((1, 16), "torch.int64"),
        "mask": ((1, 16), "torch.float32"),
    }
    example = given("--input", "1,16:int", "--input", "1,2")["example_input"]
    assert [tuple(x.shape) for x in example] == [(1, 16), (1, 2)]


def test_inputs_with_and_without_names_are_refused() -> None:
    with pytest.raises(InputError, match=r"given 2 times, but only ids by name\. Hint: name all"):
        given("--input", "ids=1,16:int", "--input", "1,2")


def test_an_input_that_is_given_twice_is_refused() -> None:
    with pytest.raises(InputError, match=r"given for ids, ids\. Hint: name each input once"):
        given("--input", "ids=1,16:int", "--input", "ids=1,2")


@pytest.mark.parametrize("shape", ["1,x", "", "1,0,3", "1.5", "a b=1,2", "=1,2", "1,2:float"])
def test_a_shape_that_is_none_is_refused(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        given("--input", shape)
    assert f"{shape!r} is not a shape such as 1,3,224,224" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["model.py", "-o", "a.svg"], ["draw", "model.py", "-o", "a.svg"]),
        (["--policy", "layer", "model.py"], ["draw", "--policy", "layer", "model.py"]),
        (["plan", "model.py"], ["plan", "model.py"]),
        (["draw", "model.py"], ["draw", "model.py"]),
        (["--help"], ["--help"]),
        ([], ["draw"]),
    ],
)
def test_the_usual_subcommand_may_be_left_out(arguments: list[str], expected: list[str]) -> None:
    assert with_command(arguments, ("draw", "plan"), "draw") == expected


@pytest.mark.parametrize(
    "path", ["class_names.txt", "num_classes.py", "example_input/model.py", "runs/kernel_size"]
)
def test_a_file_called_as_an_argument_keeps_its_name(path: str) -> None:
    message = f"there is no file {path!r}"
    assert in_options(message) == message
    assert in_options(f"{message}. Hint: class_names.") == f"{message}. Hint: --class-names."
