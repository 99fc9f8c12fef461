"""The oracle is the model itself, on the program that was loaded back."""

from __future__ import annotations

import copy
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import sffx
from tests import toys
from tests.export.test_onnx import IMAGE, FixedBatch, Single, cut

BLOCKS, HEADS = ([f"{name}_{i}" for i in range(3)] for name in ("block", "head"))


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    path = tmp_path / "net.pt2"
    path.write_bytes(b"the file of yesterday")
    return path


def assert_untouched(old_file: Path) -> None:
    assert old_file.read_bytes() == b"the file of yesterday"
    assert os.listdir(old_file.parent) == [old_file.name]


@pytest.mark.parametrize("readout", ["ensemble", "last", "classifier"])
def test_loaded_program_gives_the_scores_at_any_batch_size(
    net: fx.GraphModule, x: Tensor, tmp_path: Path, readout: str
) -> None:
    path = sffx.export_program(net, tmp_path / "net.pt2", readout)
    twin = copy.deepcopy(net).eval()
    twin.readout.mode = readout
    loaded: Any = torch.export.load(path).module()
    for batch in (1, 2, 7):
        torch.testing.assert_close(
            loaded(x[:batch]), twin(x[:batch]).detach(), rtol=1e-4, atol=1e-5
        )
    kept = {name.partition(".")[0] for name in loaded.state_dict()}
    assert (
        kept
        == {
            "ensemble": {*BLOCKS, *HEADS},
            "last": {*BLOCKS, HEADS[-1]},
            "classifier": {*BLOCKS, "classifier"},
        }[readout]
    )


def test_file_tells_names_and_normalisation(net: fx.GraphModule, tmp_path: Path) -> None:
    path = sffx.export_program(
        net, tmp_path / "net.pt2", class_names=list("abcd"), mean=[0.5] * 3, std=[2] * 3
    )
    files = {"sffx.json": ""}
    torch.export.load(path, extra_files=files)
    told = json.loads(files["sffx.json"])
    assert told == {
        "readout": "ensemble",
        "class_names": list("abcd"),
        "mean": [0.5] * 3,
        "std": [2.0] * 3,
    }


@pytest.mark.parametrize(
    ("goodness", "classes"),
    [("sff", 4), ("sff", 300), ("cosine(8)", 4)],
    ids=[
        "direct form of the goodness",
        "by second moments",
        "cosine of regions of a single position",
    ],
)
def test_height_and_width_stay_open_where_the_model_allows_it(
    tmp_path: Path, goodness: str, classes: int
) -> None:
    net = sffx.transform(
        toys.Residual(classes=classes), "residual", torch.zeros(1, 3, 8, 8), goodness=goodness
    ).eval()
    path = sffx.export_program(net, tmp_path / "net.pt2", dynamic_size=True)
    loaded: Any = torch.export.load(path).module()
    for size in ((8, 8), (11, 30), (40, 9)):
        x = torch.randn(3, 3, *size)
        torch.testing.assert_close(loaded(x), net(x).detach(), rtol=1e-4, atol=1e-5)


def test_model_that_fixes_the_size_is_refused_with_its_size(old_file: Path) -> None:
    net = sffx.transform(toys.Chain(), "layer", torch.zeros(1, 3, 8, 8))
    with pytest.raises(
        sffx.ExportError,
        match=r"does not allow other heights and widths than 8 x 8: .*Hint: leave dynamic_size out",
    ):
        sffx.export_program(net, old_file, "classifier", dynamic_size=True)
    assert_untouched(old_file)


def test_size_at_which_features_shrink_to_one_position_is_not_open(old_file: Path) -> None:
    layers = [
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=4, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
    ]
    net = sffx.transform(
        nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "layer",
        torch.zeros(1, 3, 8, 8),
    )
    with pytest.raises(
        sffx.ExportError,
        match=r"the program fails at batch size 1: "
        r".*Hint: leave dynamic_size out, or cut the model with",
    ):
        sffx.export_program(net, old_file, dynamic_size=True)
    assert_untouched(old_file)


def test_what_cannot_be_exported_is_named_and_the_old_file_stays(old_file: Path) -> None:
    with pytest.raises(
        sffx.ExportError, match=r"cannot be exported.*Hint: the model must run at any batch size"
    ):
        sffx.export_program(cut(Single(FixedBatch()), IMAGE), old_file)
    assert_untouched(old_file)


def test_difference_beyond_the_tolerance_is_refused(net: fx.GraphModule, old_file: Path) -> None:
    with pytest.raises(
        sffx.ExportError,
        match=r"the exported program and torch differ by .* at batch size 1; "
        r"the tolerance is -1\. Hint: ",
    ):
        sffx.export_program(net, old_file, tolerance=-1.0)
    assert_untouched(old_file)


def test_full_disk_leaves_the_old_file(
    net: fx.GraphModule, old_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        sffx.ExportError,
        match=r"cannot write '.*net\.pt2': No space left on device\. Hint: is the disk full\?",
    ):
        sffx.export_program(net, old_file)
    assert_untouched(old_file)


def test_an_autocast_of_the_caller_is_not_in_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)]
    net = sffx.transform(nn.Sequential(*layers), "layer", torch.zeros(1, 6)).eval()
    x = torch.randn(3, 6)
    with torch.autocast("cpu"):
        path = sffx.export_program(net, tmp_path / "net.pt2", tolerance=1)
    torch.testing.assert_close(torch.export.load(path).module()(x), net(x))


def test_bad_arguments_are_refused(net: fx.GraphModule, tmp_path: Path) -> None:
    with pytest.raises(sffx.InputError, match=r"no readout 'mean'"):
        sffx.export_program(net, tmp_path / "net.pt2", "mean")
    with pytest.raises(
        sffx.InputError, match=r"cannot write to '.*': it is a directory\. Hint: name a file in it"
    ):
        sffx.export_program(net, tmp_path)
    with pytest.raises(sffx.InputError, match=r"Chain, not a cut model"):
        sffx.export_program(toys.Chain(), tmp_path / "net.pt2")  # type: ignore[arg-type]


class Logarithms(nn.Sequential):
    """Takes positive numbers alone: on (B, 6)."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.log())


@pytest.mark.parametrize(
    "export",
    [sffx.export_program, sffx.export_onnx, sffx.export_early_exit],
    ids=lambda f: f.__name__,
)
def test_a_model_of_positive_numbers_is_tried_on_them(export: Any, tmp_path: Path) -> None:
    """Each export compares what it wrote with the model, and refuses scores that are nan."""
    net = sffx.transform(Logarithms(), "layer", torch.ones(2, 6))
    export(net, tmp_path / "net.pt2")
    assert list(tmp_path.iterdir())
