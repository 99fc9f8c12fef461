"""The oracle is the runner on torch, block by block."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

import sffx
import sffx.export.stages as stages
from tests import toys
from tests.export.test_early_exit import middle_threshold


@pytest.fixture(scope="module")
def folder(net: fx.GraphModule, x: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sffx.export_early_exit(
        net, tmp_path_factory.mktemp("exit") / "net", middle_threshold(net, x) + 1e-6
    )


def test_files_give_what_torch_gives_and_stop_where_it_stops(
    net: fx.GraphModule, x: Tensor, folder: Path
) -> None:
    assert sorted(os.listdir(folder)) == [
        "block_0.onnx",
        "block_1.onnx",
        "block_2.onnx",
        "manifest.json",
    ]
    written = sffx.EarlyExit.load(folder)
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


def test_an_input_that_the_files_do_not_take_is_refused(folder: Path, x: Tensor) -> None:
    for wrong in (x[:, :, :-1], x.double()):
        with pytest.raises(
            sffx.InputError,
            match=r"the file cannot run on this input: .*Hint: it takes x \['batch'",
        ):
            sffx.EarlyExit.load(folder)(wrong)


def test_what_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sffx.InputError, match=r"no early exit in .*Hint: pass the folder"):
        sffx.EarlyExit.load(tmp_path)


def test_folder_with_other_things_and_a_file_are_left_alone(
    net: fx.GraphModule, tmp_path: Path
) -> None:
    (tmp_path / "letters").write_text("dear")
    with pytest.raises(sffx.InputError, match=r"holds something else"):
        sffx.export_early_exit(net, tmp_path)
    with pytest.raises(sffx.InputError, match=r"is a file"):
        sffx.export_early_exit(net, tmp_path / "letters")
    assert os.listdir(tmp_path) == ["letters"]


def test_a_manifest_of_something_else_and_what_lies_beside_an_export_are_left_alone(
    net: fx.GraphModule, tmp_path: Path
) -> None:
    page, export = tmp_path / "page", tmp_path / "net"
    page.mkdir()
    (page / "manifest.json").write_text('{"name": "a web page"}')
    sffx.export_early_exit(net, export)
    sffx.export_early_exit(net, export)
    (export / "notes.txt").write_text("mine")
    for folder, name in ((page, "manifest.json"), (export, "notes.txt")):
        before = sorted(os.listdir(folder))
        with pytest.raises(
            sffx.InputError, match=rf"holds something else than an early exit: {name}"
        ):
            sffx.export_early_exit(net, folder)
        assert sorted(os.listdir(folder)) == before


def test_failure_leaves_the_old_export(
    net: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "net"
    old.mkdir()
    (old / "manifest.json").write_text('{"stages": []}')

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stages, "_write", full)
    with pytest.raises(sffx.ExportError, match=r"cannot write .*No space left on device"):
        sffx.export_early_exit(net, old)
    assert (old / "manifest.json").read_text() == '{"stages": []}'
    assert os.listdir(tmp_path) == ["net"]
