"""Wrong arguments of public functions end in an error of sffx that has a hint, never in a bare one.

Each argument of each function is replaced by each of many wrong values, the others being right. A
value that the function accepts is no fault here.
"""

from __future__ import annotations

import errno
import inspect
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import sffx
from sffx.draw.compare import comparison, draw_comparison
from sffx.draw.render import draw
from sffx.plots.results import plot_accuracy, plot_training
from sffx.plots.scores import plot_confusion, plot_goodness
from tests.toys import kept

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # nested tensors are a prototype
    NESTED = torch.nested.nested_tensor([torch.zeros(4)] * 4)
    JAGGED = torch.nested.nested_tensor([torch.zeros(4)] * 4, layout=torch.jagged)

ANYTHING = (
    None,
    3,
    -1,
    0.5,
    True,
    "nonsense",
    b"x",
    [],
    {},
    [1],
    {"a": 1},
    object(),
    torch.zeros(3),
    torch.tensor(1.0),
    torch.zeros(0, 4),
    torch.zeros(2, 3, 4, 5),
    float("nan"),
    float("inf"),
    nn.Linear(2, 2),
    nn.Linear,
    (1, 2),
    {1, 2},
    range(3),
    np.zeros((4, 4)),
    np.float32(0.5),
    torch.zeros(4, dtype=torch.long),
    torch.zeros(4, 4, device="meta"),
    torch.zeros(4, 4, dtype=torch.complex64),
    torch.zeros(4, 4).to_sparse(),
    DataLoader([(torch.zeros(4), 1)]),
    # Loaders of what has no values or no sizes.
    [(torch.zeros(4, 4, device="meta"), torch.zeros(4, dtype=torch.long))],
    [(torch.zeros(4, 4), torch.zeros(4, dtype=torch.long, device="meta"))],
    [(NESTED, torch.zeros(4, dtype=torch.long))],
    [(torch.zeros(4, 4), NESTED)],
    10**30,
    -(10**30),
    sffx.tasks.Regression(),
    torch.float32,
    # Their texts are long.
    nn.Sequential(*(nn.Linear(2, 2) for _ in range(40))),
    list(range(1000)),
)
LONGEST_MESSAGE = 1000
# Functions of the user. What they raise themselves is theirs.
CALLABLES = {"goodness", "norm", "loss_fn", "on_block"}
PATHS = {"path", "folder", "source", "target"}
# A folder that this user may not enter.
CLOSED = "closed"


@pytest.fixture(autouse=True)
def no_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the system answer as it answers other users: the superuser may enter every folder."""
    ask = os.stat

    def stat(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if not isinstance(path, int) and CLOSED in Path(os.fsdecode(path)).parts[:-1]:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return ask(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat)


@kept
def cut_net() -> sffx.net.CutModel:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return sffx.transform(model, "layer", torch.zeros(2, 4)).train()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files of many kinds."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "folder").mkdir()
    (folder / "folder.dot").mkdir()
    (folder / "empty").write_bytes(b"")
    (folder / "text").write_text("hello")
    torch.save({"a": 1}, folder / "foreign.pt")
    torch.save(3, folder / "number.pt")
    (folder / "loop.dot").symlink_to(folder / "loop.dot")
    net = cut_net()
    optimizer = torch.optim.AdamW(sffx.parameter_groups(net, 1e-3))
    sffx.save_checkpoint(folder / "good.pt", net, optimizer)
    return folder


def wrong_paths(folder: Path) -> list[Any]:
    names = ("folder", "folder.dot", "missing/x.pt", "empty", "text", "foreign.pt", "number.pt")
    closed = (f"{CLOSED}/good.pt", f"{CLOSED}/in/good.dot")
    files = [folder / name for name in (*names, *closed, "loop.dot", "a" * 300)]
    return [None, 3, "", b"x\0", "a\0b", object(), [], "/proc/nope/x", *files]


# For each function: arguments that are right. Each becomes wrong in turn.
def functions(folder: Path) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    net = cut_net()
    optimizer = torch.optim.AdamW(sffx.parameter_groups(net, 1e-3))
    x, y = torch.randn(4, 4), torch.tensor([0, 1, 2, 0])
    early = sffx.EarlyExit(net)
    loader = [(x, y)]
    step = {"net": net, "x": x, "y": y, "loss_fn": None, "blocks": None, "on_block": None}
    cut = {
        "model": model,
        "policy": "layer",
        "example_input": torch.zeros(2, 4),
        "num_classes": 3,
        "goodness": "sff",
        "kernel_size": 1,
        "norm": "layer",
        "recompute": True,
        "task": None,
        "objective": "sff",
    }
    onnx = {
        "net": None,
        "path": folder / "net.onnx",
        "readout": "nonsense",
        "class_names": 3,
        "mean": 3,
        "std": 3,
        "output_name": 3,
        "dynamic_size": 3,
        "opset": "x",
        "tolerance": "x",
    }
    not_of_programs = ("output_name", "opset")
    program = {name: value for name, value in onnx.items() if name not in not_of_programs}
    return {
        "plan": (sffx.plan, cut),
        "transform": (sffx.transform, {**cut, "check": False}),
        "check": (
            sffx.check,
            {"model": model, "net": net, "example_input": None, "raises": True},
        ),
        "extract": (sffx.extract, {"net": net}),
        "compile": (sffx.compile, {"net": None}),
        "compiled_blocks": (sffx.compiled_blocks, {"net": net}),
        "named_head": (
            sffx.named_head,
            {
                "goodness": "mlp",
                "block": next(iter(net.plan)),
                "num_outputs": 3,
                "channels": None,
                "task": net.plan.task,
            },
        ),
        "footprint": (
            sffx.footprint,
            {"net": net, "batch_size": 4, "offloaded": False, "backpropagation": False},
        ),
        "largest_batch": (sffx.largest_batch, {"net": net, "budget": 100, "offloaded": False}),
        "sff_loss": (
            sffx.sff_loss,
            {"goodness": torch.zeros(2, 4, 3), "y": y, "loss_fn": None, "task": net.plan.task},
        ),
        "local_loss": (sffx.local_loss, step),
        "local_step": (sffx.local_step, {**step, "optimizer": optimizer}),
        "block_losses": (sffx.block_losses, step),
        "block_scores": (sffx.block_scores, {"net": net, "x": x}),
        "evaluate": (sffx.evaluate, {"net": net, "loader": loader, "group": None}),
        "weigh": (sffx.weigh, {"net": net, "loader": loader}),
        "parameter_groups": (
            sffx.parameter_groups,
            {"net": net, "lr": 1e-3, "classifier_lr": 1e-3},
        ),
        "BlockPlateau": (sffx.BlockPlateau, {"optimizer": optimizer}),
        "BlockSchedule": (sffx.BlockSchedule, {"net": net, "epochs": [(0, 1), (0, 2)]}),
        "BlockSchedule.all_at_once": (sffx.BlockSchedule.all_at_once, {"net": net, "epochs": 2}),
        "BlockSchedule.greedy": (sffx.BlockSchedule.greedy, {"net": net, "epochs": 2}),
        "BlockSchedule.from_losses": (
            sffx.BlockSchedule.from_losses,
            {
                "net": net,
                "losses": [sffx.evaluate(net, loader).loss],
                "patience": 3,
                "threshold": 0.1,
            },
        ),
        "cache_outputs": (
            sffx.cache_outputs,
            {
                "net": net,
                "loader": loader,
                "after": "block_0",
                "path": folder / "cache",
                "max_bytes": 10**6,
                "fixed_views": False,
            },
        ),
        "CwC": (
            sffx.objectives.CwC,
            {"loss_form": "cwg", "threshold": 1.0, "share": 0.5, "superclasses": [2]},
        ),
        "KeywordLoss": (sffx.KeywordLoss, {"net": net, "loss_fn": None}),
        "LocalLoss": (sffx.LocalLoss, {"net": net, "loss_fn": None, "blocks": None}),
        "EarlyExit": (sffx.EarlyExit, {"net": net, "threshold": 0.5}),
        "EarlyExit()": (early, {"x": x}),
        "EarlyExit.cumulative": (early.cumulative, {"x": x}),
        "EarlyExit.curve": (early.curve, {"loader": loader, "thresholds": None}),
        "EarlyExit.calibrate": (early.calibrate, {"loader": loader, "accuracy": None}),
        "EarlyExit.load": (sffx.EarlyExit.load, {"folder": folder, "threshold": 0.5}),
        "load_checkpoint": (sffx.load_checkpoint, {"path": folder / "good.pt", "trust": False}),
        "save_checkpoint": (
            sffx.save_checkpoint,
            {"path": folder / "new.pt", "net": net, "optimizer": optimizer, "accuracy": None},
        ),
        "offload": (sffx.offload, {"net": model, "optimizer": optimizer, "device": "cpu"}),
        "onload": (sffx.onload, {"net": net}),
        "shard": (sffx.shard, {"net": net, "timeout": None}),
        "draw": (
            draw,
            {
                "plan_or_net": net,
                "path": folder / "a.dot",
                "detail": "blocks",
                "progress": None,
                "unfold": False,
            },
        ),
        "comparison": (comparison, {"plans": [net.plan, net.plan]}),
        "draw_comparison": (
            draw_comparison,
            {"plans": [net.plan, net.plan], "path": folder / "a.dot"},
        ),
        "plot_accuracy": (
            plot_accuracy,
            {"evaluations": {"a": {"block_0": 0.5}}, "path": folder / "a.svg"},
        ),
        "plot_training": (
            plot_training,
            {
                "history": [{"accuracy": {"block_0": 0.5}}],
                "path": folder / "a.svg",
                "rates": [{"block_0": 0.1}],
            },
        ),
        "plot_confusion": (
            plot_confusion,
            {"net": net, "loader": loader, "path": folder / "a.svg", "classes": None},
        ),
        "plot_goodness": (
            plot_goodness,
            {"net": net, "loader": loader, "path": folder / "a.svg"},
        ),
        "stages": (sffx.policies.stages, {"n": 2}),
        "module": (sffx.policies.module, {"depth": 2}),
        "memory": (sffx.policies.memory, {"budget": 10**9, "batch_size": 2}),
        # Several are wrong at once, so that nothing is exported, which takes seconds.
        "export_onnx": (sffx.export_onnx, onnx),
        "export_program": (
            sffx.export_program,
            program,
        ),
        "export_early_exit": (
            sffx.export_early_exit,
            {
                "net": net,
                "folder": folder,
                "threshold": "x",
                "class_names": 3,
                "mean": 3,
                "std": 3,
                "opset": "x",
                "tolerance": "x",
            },
        ),
    }


NAMES = tuple(functions_name for functions_name in functions(Path()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_no_wrong_argument_ends_in_a_bare_error(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A name such as "nonsense" is a path of a file to write.
    monkeypatch.chdir(folder / "folder")
    function, right = functions(folder)[name]
    faults = []
    for argument in right:
        for value in _wrong_values(argument, folder):
            fault = _fault(function, {**right, argument: value})
            if fault:
                faults.append(f"{argument}={value!r}: {fault}")
    assert faults == []


def _wrong_values(argument: str, folder: Path) -> list[Any]:
    if argument in PATHS:
        return wrong_paths(folder)
    if argument in ("x", "y", "example_input"):
        return [*ANYTHING, NESTED, JAGGED]
    if argument in CALLABLES:
        return [value for value in ANYTHING if not callable(value)]
    return list(ANYTHING)


def _fault(function: Callable[..., Any], arguments: dict[str, Any]) -> str:
    """Return what is wrong with how a call ends, "" if nothing is."""
    try:
        function(**arguments)
    except sffx.SffxError as error:
        message = str(error)
        if len(message) > LONGEST_MESSAGE or "\n" in message:
            return f"{len(message)} characters: {message[:LONGEST_MESSAGE]}"
        # A missing package is told with the command that installs it.
        return "" if "Hint: " in message else f"no hint: {message}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_every_public_function_is_tried() -> None:
    tried = {name.partition(".")[0].partition("(")[0] for name in NAMES}
    public = set()
    for name in sffx.__all__:
        thing = getattr(sffx, name)
        if inspect.isfunction(thing):
            public.add(name)
    # The arguments of the first are files, and its own tests try wrong ones. The
    # others have no net to replace, or need several processes.
    assert public - tried <= {"quantize_onnx", "replicate", "finish", "block_seeds"}


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_is_tried(name: str) -> None:
    function, right = functions(Path())[name]
    parameters = inspect.signature(function).parameters.values()
    rest = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {each.name for each in parameters if each.kind not in rest}
    assert named <= set(right)


# Every flag, with a call in which nothing else is wrong.
def flags(folder: Path) -> list[tuple[str, Callable[..., Any], dict[str, Any]]]:
    found = []
    for function, right in functions(folder).values():
        for argument, value in right.items():
            if isinstance(value, bool) or argument == "dynamic_size":
                found.append((argument, partial(function, **right), {argument: "no"}))
    return found


def test_what_is_neither_true_nor_false_is_no_flag(folder: Path) -> None:
    tried = flags(folder)
    assert len(tried) >= 9
    for argument, call, wrong in tried:
        with pytest.raises(sffx.InputError, match=f"{argument} is 'no'|net is a NoneType"):
            call(**wrong)


@pytest.mark.parametrize("argument", ["goodness", "norm", "loss_fn", "on_block"])
@pytest.mark.parametrize("function", [lambda: None, lambda *, b: None, nn.Linear(2, 2)])
def test_a_callable_that_takes_other_arguments_is_refused(
    argument: str, function: Any, folder: Path
) -> None:
    """Before anything runs, not by a TypeError from inside."""
    called = "transform" if argument in ("goodness", "norm") else "local_loss"
    call, right = functions(folder)[called]
    if argument == "norm" and isinstance(function, nn.Module):
        message = "norm is a module"
    elif argument == "goodness" and isinstance(function, nn.Module):
        message = "goodness is a module"
    else:
        message = f"{argument} cannot be called with"
    with pytest.raises(sffx.InputError, match=message):
        call(**{**right, argument: function})


@pytest.mark.parametrize("value", [0, 2, -1, 0.5, None, "3", True])
def test_a_plan_refuses_the_kernel_sizes_that_transform_refuses(value: Any, folder: Path) -> None:
    for name in ("plan", "transform"):
        call, right = functions(folder)[name]
        with pytest.raises(sffx.InputError, match="kernel_size"):
            call(**{**right, "kernel_size": value})


@pytest.mark.parametrize("size", [2**60, 2**70, np.int64(2**62)])
def test_a_batch_that_no_machine_can_count_is_refused(size: int, folder: Path) -> None:
    net = cut_net()
    with pytest.raises(sffx.InputError, match="more bytes than can be counted"):
        sffx.footprint(net, size)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(sffx.InputError, match="more bytes than can be counted"):
        sffx.plan(model, sffx.policies.memory("1 TiB", size), torch.zeros(2, 4))


def test_integers_of_numpy_count(folder: Path) -> None:
    net = cut_net()
    assert sffx.footprint(net, np.int64(4)) == sffx.footprint(net, 4)


# What would be an error much later, or none at all.
LATE = (
    ("LocalLoss", "net", nn.Linear(2, 2)),
    ("LocalLoss", "net", torch.compile(cut_net())),
    ("LocalLoss", "loss_fn", {"block_7": None}),
    ("LocalLoss", "blocks", ["block_7"]),
    ("KeywordLoss", "net", torch.compile(cut_net())),
    ("KeywordLoss", "loss_fn", "cross_entropy"),
    ("parameter_groups", "lr", True),
    ("parameter_groups", "lr", float("inf")),
    ("parameter_groups", "classifier_lr", float("nan")),
    ("EarlyExit.calibrate", "accuracy", 95),
    ("EarlyExit.calibrate", "accuracy", -0.1),
    ("EarlyExit.curve", "thresholds", ""),
    ("save_checkpoint", "optimizer", torch.optim.SGD([nn.Parameter(torch.ones(1))])),
)


@pytest.mark.parametrize(("name", "argument", "value"), LATE)
def test_a_wrong_argument_is_refused_at_once(
    name: str, argument: str, value: Any, folder: Path
) -> None:
    function, right = functions(folder)[name]
    with pytest.raises(sffx.InputError, match="Hint: "):
        function(**{**right, argument: value})
