"""Wrong arguments of public functions end in an error of sffx that has a hint, never in a bare one.

Each argument of each function is replaced by each of many wrong values, the others being right. A
value that the function accepts is no fault here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sffx
from sffx.draw.render import draw

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
)
# Functions of the user. What they raise themselves is theirs.
CALLABLES = {"goodness", "norm", "loss_fn"}
PATHS = {"path", "folder", "source", "target"}


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
    files = [folder / name for name in (*names, "loop.dot", "a" * 300)]
    return [None, 3, "", b"x\0", "a\0b", object(), [], "/proc/nope/x", *files]


# For each function: arguments that are right. Each becomes wrong in turn.
def functions(folder: Path) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    net = cut_net()
    optimizer = torch.optim.AdamW(sffx.parameter_groups(net, 1e-3))
    x, y = torch.randn(4, 4), torch.tensor([0, 1, 2, 0])
    early = sffx.EarlyExit(net)
    loader = [(x, y)]
    step = {"net": net, "x": x, "y": y, "loss_fn": None, "blocks": None}
    cut = {
        "model": model,
        "policy": "layer",
        "example_input": torch.zeros(2, 4),
        "num_classes": 3,
        "goodness": "sff",
        "kernel_size": 1,
        "norm": "layer",
        "recompute": True,
    }
    onnx = {
        "net": None,
        "path": folder / "net.onnx",
        "readout": "nonsense",
        "class_names": 3,
        "mean": 3,
        "std": 3,
        "output_name": 3,
        "tolerance": "x",
    }
    return {
        "plan": (sffx.plan, cut),
        "transform": (sffx.transform, {**cut, "check": False}),
        "check": (sffx.check, {"model": model, "net": net}),
        "extract": (sffx.extract, {"net": net}),
        "footprint": (sffx.footprint, {"net": net, "batch_size": 4}),
        "largest_batch": (sffx.largest_batch, {"net": net, "budget": 100}),
        "sff_loss": (sffx.sff_loss, {"goodness": torch.zeros(2, 4, 3), "y": y, "loss_fn": None}),
        "local_loss": (sffx.local_loss, step),
        "local_step": (sffx.local_step, {**step, "optimizer": optimizer}),
        "block_losses": (sffx.block_losses, step),
        "block_scores": (sffx.block_scores, {"net": net, "x": x}),
        "evaluate": (sffx.evaluate, {"net": net, "loader": loader}),
        "weigh": (sffx.weigh, {"net": net, "loader": loader}),
        "parameter_groups": (
            sffx.parameter_groups,
            {"net": net, "lr": 1e-3, "classifier_lr": 1e-3},
        ),
        "BlockPlateau": (sffx.BlockPlateau, {"optimizer": optimizer}),
        "KeywordLoss": (sffx.KeywordLoss, {"net": net}),
        "LocalLoss": (sffx.LocalLoss, {"net": net}),
        "EarlyExit": (sffx.EarlyExit, {"net": net, "threshold": 0.5}),
        "EarlyExit()": (early, {"x": x}),
        "EarlyExit.cumulative": (early.cumulative, {"x": x}),
        "EarlyExit.curve": (early.curve, {"loader": loader, "thresholds": None}),
        "EarlyExit.calibrate": (early.calibrate, {"loader": loader, "accuracy": None}),
        "EarlyExit.load": (sffx.EarlyExit.load, {"folder": folder, "threshold": 0.5}),
        "load_checkpoint": (sffx.load_checkpoint, {"path": folder / "good.pt"}),
        "save_checkpoint": (
            sffx.save_checkpoint,
            {"path": folder / "new.pt", "net": net, "optimizer": optimizer, "accuracy": None},
        ),
        "offload": (sffx.offload, {"net": model, "optimizer": optimizer, "device": "cpu"}),
        "onload": (sffx.onload, {"net": net}),
        "shard": (sffx.shard, {"net": net}),
        "draw": (
            draw,
            {"plan_or_net": net, "path": folder / "a.dot", "detail": "blocks", "progress": None},
        ),
        "stages": (sffx.policies.stages, {"n": 2}),
        "module": (sffx.policies.module, {"depth": 2}),
        "memory": (sffx.policies.memory, {"budget": 10**9, "batch_size": 2}),
        # Several are wrong at once, so that nothing is exported, which takes seconds.
        "export_onnx": (sffx.export_onnx, onnx),
        "export_program": (
            sffx.export_program,
            {name: value for name, value in onnx.items() if name != "output_name"},
        ),
        "export_early_exit": (
            sffx.export_early_exit,
            {"net": net, "folder": folder, "threshold": "x", "tolerance": "x"},
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
    if argument in CALLABLES:
        return [value for value in ANYTHING if not callable(value)]
    return list(ANYTHING)


def _fault(function: Callable[..., Any], arguments: dict[str, Any]) -> str:
    """Return what is wrong with how a call ends, "" if nothing is."""
    try:
        function(**arguments)
    except sffx.SffxError as error:
        # A missing package is told with the command that installs it.
        return "" if "Hint: " in str(error) else f"no hint: {error}"
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
