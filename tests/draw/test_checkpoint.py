"""Checkpoints: what is read of a file, what is refused, and how the blocks are coloured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import sffx
from sffx.blocks import BlockPlan
from sffx.cli.viz import main
from sffx.draw.checkpoint import read_checkpoint
from sffx.draw.graph import dot
from sffx.draw.page import page
from sffx.draw.progress import ACCURACY_COLOURS, RATE_COLOURS, Progress
from sffx.draw.render import draw
from sffx.errors import InputError
from tests.toys import Residual

ACCURACY = {"block_0": 0.5, "block_1": 0.75, "classifier": 0.9, "ensemble": 0.8, "last": 0.75}
GROUPS = [
    {"name": "block_0", "lr": 1e-4, "params": [0]},
    {"name": "block_1", "lr": 1e-2, "params": [1]},
]


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "optimizer",
    [
        {"optimizer": {"state": {}, "param_groups": GROUPS}},
        {"optimizer_states": [{"state": {}, "param_groups": GROUPS}]},
    ],
)
def test_accuracies_and_learning_rates_are_read(
    small: BlockPlan, tmp_path: Path, optimizer: dict[str, Any]
) -> None:
    progress = read_checkpoint(
        save(tmp_path / "run.pt", {"sffx_accuracy": ACCURACY, "net": {}, **optimizer}), small
    )
    assert progress == Progress(ACCURACY, {"block_0": 1e-4, "block_1": 1e-2})


def test_a_checkpoint_without_an_optimizer_has_no_rates(small: BlockPlan, tmp_path: Path) -> None:
    assert (
        read_checkpoint(save(tmp_path / "run.pt", {"sffx_accuracy": ACCURACY}), small).rates == {}
    )


class Executed:
    """Would write a file, were it loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"net": {}, "epoch": 3},
            r"holds no accuracies of blocks; it holds 'net', 'epoch'\. Hint: .*SFFModule and examples/train\.py",
        ),
        ({"sffx_accuracy": {"block_0": 50.0}}, "holds no accuracies"),
        (
            {"sffx_accuracy": {"block_0": 0.5, "classifier": 0.5}},
            "of other blocks than the 2 of the policy residual: it lacks block_1",
        ),
        ({"sffx_accuracy": {**ACCURACY, "block_2": 0.5}}, "it has block_2 as well"),
        (
            {"sffx_accuracy": ACCURACY, "sffx_cut": {"after": ["relu", "add"]}},
            r"they end after relu, add, not \w+, \w+\. Hint: --policy",
        ),
        (
            {"sffx_accuracy": ACCURACY, "sffx_cut": {"policy": "residual"}},
            r"of other blocks than those of the policy residual",
        ),
        (torch.zeros(2), "holds a Tensor, not a mapping"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    small: BlockPlan, tmp_path: Path, content: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_checkpoint(save(tmp_path / "run.pt", content), small)


def test_nothing_in_a_checkpoint_is_executed(small: BlockPlan, tmp_path: Path) -> None:
    path = save(
        tmp_path / "run.pt", {"sffx_accuracy": ACCURACY, "other": Executed(tmp_path / "executed")}
    )
    with pytest.raises(
        InputError,
        match=r"cannot be read as a checkpoint, or holds more than tensors.* nothing else is loaded.*Hint: ",
    ):
        read_checkpoint(path, small)
    assert not (tmp_path / "executed").exists()


def test_a_file_that_is_none_is_said(small: BlockPlan, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no checkpoint '.*run\.pt'"):
        read_checkpoint(tmp_path / "run.pt", small)
    (tmp_path / "run.pt").write_text("accuracy 0.5")
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "run.pt", small)


def test_colours_go_from_the_lowest_to_the_highest() -> None:
    progress = Progress(
        ACCURACY, {"block_0": 1e-4, "block_1": 1e-3, "classifier": 1e-2, "other": 0.0}
    )
    assert [progress.accuracy_colour(name) for name in ("block_0", "classifier")] == list(
        ACCURACY_COLOURS
    )
    assert [progress.rate_colour(name) for name in ("block_0", "classifier", "other")] == [
        *RATE_COLOURS,
        RATE_COLOURS[0],
    ]
    middle = [int(progress.rate_colour("block_1")[at : at + 2], 16) for at in (1, 3, 5)]
    ends = [[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in RATE_COLOURS]
    assert middle == pytest.approx(
        [(low + high) / 2 for low, high in zip(*ends, strict=True)], abs=0.5
    )


def test_where_all_are_equal_no_block_looks_the_worst() -> None:
    assert (
        Progress({"block_0": 0.5, "classifier": 0.5}).accuracy_colour("block_0")
        == ACCURACY_COLOURS[1]
    )


def test_boxes_have_the_colours_and_tell_the_figures(small: BlockPlan) -> None:
    text = dot(small, progress=Progress(ACCURACY, {"block_0": 1e-4, "block_1": 1e-2}))
    boxes = {
        name: line
        for line in text.splitlines()
        for name in ACCURACY
        if line.strip().startswith(f'"{name}" [')
    }
    assert [
        re.findall(r'fillcolor="(#\w+)"', boxes[name])[-1] for name in ("block_0", "classifier")
    ] == list(ACCURACY_COLOURS)
    assert "accuracy 50.0 %" in boxes["block_0"]
    assert (
        f'BGCOLOR="{RATE_COLOURS[0]}"><FONT COLOR="#1f2933" POINT-SIZE="10">learning rate 1.0e-04'
        in boxes["block_0"]
    )
    assert "no learning rate" in boxes["classifier"]
    assert "accuracy: classifier 90.0 %, ensemble 80.0 %" in text
    assert "50.0 %</FONT></TD><TD" in text.splitlines()[4]  # the scale of the legend


def test_a_deep_net_is_not_folded_where_its_blocks_are_told_apart(chain: Any) -> None:
    accuracy = {block.target: 0.5 for block in chain(20).all_blocks}
    assert " × " not in dot(chain(20), progress=Progress(accuracy))
    assert 'id="run_block_0" open' in page(chain(20), progress=Progress(accuracy)).replace(
        'class="box run" ', ""
    )


def test_the_page_has_the_colours_too(small: BlockPlan) -> None:
    text = page(small, progress=Progress(ACCURACY, {"block_0": 1e-4}))
    assert f'id="block_0" style="border-left: 12px solid {ACCURACY_COLOURS[0]}"' in text
    assert (
        f'<span class="badge" style="background: {RATE_COLOURS[1]}">learning rate 1.0e-04</span>'
        in text
    )


NET = """
from tests.toys import Residual
net = Residual()
"""


def test_the_command_draws_what_a_plain_loop_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(NET)
    net = sffx.transform(Residual(), example_input=torch.zeros(1, 3, 8, 8))
    optimizer = torch.optim.AdamW(sffx.parameter_groups(net, lr=1e-3, classifier_lr=1e-4))
    found = sffx.evaluate(net, [(torch.randn(8, 3, 8, 8), torch.arange(8) % 4)])
    torch.save({"sffx_accuracy": found.accuracy, "optimizer": optimizer.state_dict()}, "run.pt")
    assert main(["model.py", "--checkpoint", "run.pt", "-o", "net.dot", "--input", "1,3,8,8"]) == 0
    text = Path("net.dot").read_text()
    assert all(
        f"accuracy {100 * found.accuracy[name]:.1f} %" in text for name in ("block_0", "classifier")
    )
    assert text.count("learning rate 1.0e-03") == len(net.plan)
    assert (
        main(
            [
                "model.py",
                "--checkpoint",
                "run.pt",
                "-o",
                "net.dot",
                "--input",
                "1,3,8,8",
                "--policy",
                "stages(2)",
            ]
        )
        == 2
    )
    assert "of other blocks" in capsys.readouterr().err
    assert main(["model.py", "--checkpoint", "run.pt", "--compare", "residual,layer"]) == 2
    assert "--checkpoint goes with a drawing of one policy" in capsys.readouterr().err


def test_the_command_draws_the_model_as_it_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(
        "from tests.toys import Residual\ndef small(num_classes=4):\n    return Residual(classes=num_classes)\n"
    )
    net = sffx.transform(
        Residual(classes=5), "stages(2)", torch.zeros(1, 3, 8, 8), goodness="mlp(64, 3)"
    )
    found = sffx.evaluate(net, [(torch.randn(8, 3, 8, 8), torch.arange(8) % 5)])
    content = {
        "net": net.state_dict(),
        "sffx_accuracy": found.accuracy,
        "sffx_cut": net.plan.record(),
    }
    torch.save(content, "run.pt")
    assert main(["model.py", "--checkpoint", "run.pt", "-o", "net.dot"]) == 0
    assert Path("net.dot").read_text() == dot(net.plan, progress=Progress(found.accuracy))
    del content["sffx_cut"]
    torch.save(content, "run.pt")
    assert (
        main(
            [
                "model.py",
                "--checkpoint",
                "run.pt",
                "-o",
                "net.dot",
                "--policy",
                "stages(2)",
                "--input",
                "1,3,8,8",
            ]
        )
        == 0
    )
    assert Path("net.dot").read_text() == dot(net.plan, progress=Progress(found.accuracy))


def test_draw_takes_progress_in_every_detail(small: BlockPlan, tmp_path: Path) -> None:
    for detail in ("blocks", "modules", "nodes"):
        path = draw(small, tmp_path / f"{detail}.dot", detail=detail, progress=Progress(ACCURACY))
        assert ACCURACY_COLOURS[0] in path.read_text()
