"""The oracle is the runner on torch, block by block."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import sffx
import sffx.export.stages as stages
from tests import toys
from tests.export.test_early_exit import middle_threshold
from tests.stream_models import TwoStreams

FILES = ["block_0.onnx", "block_1.onnx", "block_2.onnx", "manifest.json"]


@pytest.fixture(scope="module")
def exported(net: fx.GraphModule, x: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is exported once; tests that write into it take `folder`."""
    return sffx.export_early_exit(
        net, tmp_path_factory.mktemp("exit") / "net", middle_threshold(net, x) + 1e-6
    )


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "net"))


def contents(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir()}


def test_files_give_what_torch_gives_and_stop_where_it_stops(
    net: fx.GraphModule, x: Tensor, exported: Path
) -> None:
    assert sorted(os.listdir(exported)) == FILES
    written = sffx.EarlyExit.load(exported)
    runner = sffx.EarlyExit(net, written.threshold)
    torch.testing.assert_close(written.cumulative(x), runner.cumulative(x), rtol=1e-4, atol=1e-5)
    result, expected = written(x), runner(x)
    assert len(set(expected.blocks.tolist())) > 1
    assert result.blocks.tolist() == expected.blocks.tolist()
    assert result.macs == pytest.approx(expected.macs, rel=0.2)
    torch.testing.assert_close(result.scores, expected.scores, rtol=1e-4, atol=1e-5)


def test_mask_goes_with_the_tokens_and_padding_changes_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([6, 3, 1, 5] * 10)
    x = {
        "input_ids": torch.randint(0, 20, (40, 6)),
        "attention_mask": (torch.arange(6) < lengths[:, None]).long(),
    }
    net = sffx.transform(toys.Tokens(), example_input=x).eval()
    folder = sffx.export_early_exit(net, tmp_path / "net", middle_threshold(net, x) + 1e-6)
    written = sffx.EarlyExit.load(folder)
    assert written.inputs == net.plan.inputs
    expected = sffx.EarlyExit(net, written.threshold)(x)
    assert len(set(expected.blocks.tolist())) > 1
    padding = {
        "input_ids": torch.where(x["attention_mask"].bool(), x["input_ids"], 7),
        "attention_mask": x["attention_mask"],
    }
    for batch in (x, padding):
        result = written(batch)
        assert result.blocks.tolist() == expected.blocks.tolist()
        torch.testing.assert_close(result.scores, expected.scores, rtol=1e-4, atol=1e-5)


def test_an_input_that_the_files_do_not_take_is_refused(exported: Path, x: Tensor) -> None:
    for wrong in (x[:, :, :-1], x.double()):
        with pytest.raises(
            sffx.InputError,
            match=r"the file cannot run on this input: .*Hint: it takes x \['batch'",
        ):
            sffx.EarlyExit.load(exported)(wrong)


def test_folder_with_other_things_and_a_file_are_left_alone(
    net: fx.GraphModule, tmp_path: Path
) -> None:
    (tmp_path / "letters").write_text("dear")
    with pytest.raises(sffx.InputError, match=r"holds something else"):
        sffx.export_early_exit(net, tmp_path)
    with pytest.raises(sffx.InputError, match=r"is a file"):
        sffx.export_early_exit(net, tmp_path / "letters")
    assert os.listdir(tmp_path) == ["letters"]


def test_a_manifest_of_something_else_is_left_alone(net: fx.GraphModule, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_text('{"name": "a web page"}')
    with pytest.raises(sffx.InputError, match=r"something else than an early exit: manifest\.json"):
        sffx.export_early_exit(net, tmp_path)
    assert contents(tmp_path) == {"manifest.json": b'{"name": "a web page"}'}


def test_what_lies_beside_an_export_is_left_alone(net: fx.GraphModule, folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    with pytest.raises(sffx.InputError, match=r"something else than an early exit: notes\.txt"):
        sffx.export_early_exit(net, folder)
    assert contents(folder) == before


def test_a_new_export_replaces_an_old_one(folder: Path) -> None:
    layers = [nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)]
    small = sffx.transform(nn.Sequential(*layers), "layer", torch.zeros(1, 6)).eval()
    sffx.export_early_exit(small, folder)
    assert sorted(os.listdir(folder)) == ["block_0.onnx", "manifest.json"]
    x = torch.randn(3, 6)
    torch.testing.assert_close(sffx.EarlyExit.load(folder)(x).scores, small(x).detach())


def test_answers_beyond_the_tolerance_leave_the_old_export(
    net: fx.GraphModule, exported: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy_of_old(runner: sffx.EarlyExit, new: Path, opset: int | None) -> None:
        shutil.copytree(exported, new, dirs_exist_ok=True)

    monkeypatch.setattr(stages, "_write", copy_of_old)
    before = contents(folder)
    with pytest.raises(sffx.ExportError, match=r"after block_0 at batch size 1; the tolerance is"):
        sffx.export_early_exit(net, folder, tolerance=-1.0)
    assert contents(folder) == before


def test_failure_leaves_the_old_export(
    net: fx.GraphModule, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stages, "_write", full)
    before = contents(folder)
    with pytest.raises(sffx.ExportError, match=r"cannot write .*No space left on device"):
        sffx.export_early_exit(net, folder)
    assert contents(folder) == before
    assert os.listdir(folder.parent) == ["net"]


def test_several_values_that_cross_a_cut_go_from_file_to_file(tmp_path: Path) -> None:
    # Each value is called as a node inside the block as well: "relu_1", "mean".
    x = (torch.randn(4, 3, 4, 6, 6), torch.randn(4, 2, 4, 6, 6))
    net = sffx.transform(TwoStreams(), [("mean", "flow_2_2")], x).eval()
    written = sffx.EarlyExit.load(sffx.export_early_exit(net, tmp_path / "net"))
    expected = sffx.EarlyExit(net).cumulative(x)
    torch.testing.assert_close(written.cumulative(x), expected, rtol=1e-4, atol=1e-5)
