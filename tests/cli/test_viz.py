"""The command `sffx-viz`: what it asks of `sffx.plan`, what it writes, and how it fails."""

from __future__ import annotations

import pickle
import re
import sys
import textwrap
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import sffx
from sffx.blocks import BlockPlan
from sffx.cli import drawing
from sffx.cli.viz import main
from sffx.draw.graph import block_graph
from sffx.draw.page import page
from sffx.errors import CutError
from tests.draw.drawn import need_graphviz

REAL_PLAN = sffx.plan


@dataclass
class Planned:
    """The last call of `sffx.plan`, and the function that answers it."""

    call: Callable[..., BlockPlan]
    model: Any = None
    options: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(autouse=True)
def planned(small: BlockPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planned:
    """Run in an empty folder with a `sffx.plan` that remembers its arguments.

    It returns the small plan unless a test sets another `call`.
    """
    record = Planned(lambda model, **options: small)

    def plan(model: nn.Module, **options: Any) -> BlockPlan:
        record.model = model
        record.options = options
        return record.call(model, **options)

    monkeypatch.setattr(sffx, "plan", plan)
    monkeypatch.chdir(tmp_path)
    return record


def save(text: str, name: str = "model.py") -> None:
    Path(name).write_text("from torch import nn\n\n" + textwrap.dedent(text))


CHAIN = """
layers = []
for width in (3, 8, 8):
    layers += [nn.Conv2d(width, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
"""


def save_cut_net(plan: BlockPlan) -> None:
    """Write a model file whose model carries a plan, as a cut one does."""
    Path("plan.pkl").write_bytes(pickle.dumps(plan))
    save(
        """
        import pickle
        from pathlib import Path
        net = nn.Linear(1, 1)
        net.plan = pickle.loads(Path("plan.pkl").read_bytes())
        """
    )


def assert_message(capsys: pytest.CaptureFixture[str], pattern: str) -> None:
    error = capsys.readouterr().err
    assert error.startswith("sffx-viz: ")
    assert "Traceback" not in error
    assert re.search(pattern, error), error


def test_the_options_reach_the_plan(planned: Planned) -> None:
    save("net = nn.Linear(1, 1)")
    assert main(["plan", "model.py"]) == 0
    assert planned.options == {"policy": "residual"}
    options = ["--policy", "uniform", "--input", "1,3,32,32", "--classes", "7", "--norm", "none"]
    options += ["--task", "segmentation(3)", "--goodness", "mlp"]
    assert main(["plan", "model.py", *options]) == 0
    assert planned.options.pop("example_input").shape == (1, 3, 32, 32)
    assert planned.options == {
        "policy": "uniform",
        "num_classes": 7,
        "norm": "none",
        "goodness": "mlp",
        "task": sffx.tasks.Segmentation(ignore_index=3),
    }


def test_model_names_the_object_and_the_drawing(planned: Planned) -> None:
    save("class Holder:\n    two = nn.Linear(2, 1)\none = nn.Linear(1, 1)")
    for name, width in (("one", 1), ("Holder.two", 2)):
        drawing = Path(f"{name.rpartition('.')[2]}.dot")
        assert main(["model.py", "--model", name, "-o", str(drawing)]) == 0
        assert planned.model.in_features == width
        assert main([f"model.py:{name}"]) == 0
        assert drawing.with_suffix(".svg").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "model.py", "-o", "a.svg"], "unrecognized arguments: -o a.svg"),
        (["plan", "model.py", "--checkpoint", "run.pt"], "unrecognized arguments: --checkpoint"),
        (["compare", "model.py", "a", "b", "--detail", "nodes"], "unrecognized arguments: --det"),
        (["compare", "model.py", "a", "b", "--policy", "a"], "unrecognized arguments: --policy"),
        (["compare", "model.py"], "arguments are required: POLICY"),
        ([], "arguments are required: model.py"),
    ],
)
def test_options_of_another_subcommand_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["residual"], "'residual' is one policy, and compare sets several side by side"),
        (["residual", "layer", "--open"], "compare draws where -o names one. Hint: -o"),
        (["residual", "layer", "-o", "a.html"], "unknown"),
    ],
)
def test_comparisons_that_cannot_be_made_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save("net = nn.Linear(1, 1)")
    assert main(["compare", "model.py", *options]) == 2
    assert_message(capsys, message)
    assert [path.name for path in Path().iterdir()] == ["model.py"]


def test_a_comparison_is_a_table_and_a_drawing(
    planned: Planned, capsys: pytest.CaptureFixture[str]
) -> None:
    planned.call = REAL_PLAN
    save(CHAIN)
    arguments = ["compare", "model.py", "residual", "stages(2)", "--input", "1,3,8,8"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[:2] for line in lines] == [["residual", "3"], ["stages(2)", "2"]]
    assert [path.name for path in Path().iterdir()] == ["model.py"]
    assert main([*arguments, "-o", "policies.dot"]) == 0
    assert capsys.readouterr().out.endswith("\nwrote policies.dot: 2 policies side by side\n")
    assert "stages(2)" in Path("policies.dot").read_text()


def test_a_cut_net_has_nothing_to_compare(
    small: BlockPlan, capsys: pytest.CaptureFixture[str]
) -> None:
    save_cut_net(small)
    assert main(["compare", "model.py", "residual", "batchnorm"]) == 2
    assert_message(capsys, "cut already, by the policy residual")


def test_plan_prints_the_table_and_draws_nothing(
    small: BlockPlan, capsys: pytest.CaptureFixture[str]
) -> None:
    save("net = nn.Linear(1, 1)")
    assert main(["plan", "model.py"]) == 0
    assert capsys.readouterr().out == f"{small}\n"
    assert [path.name for path in Path().iterdir()] == ["model.py"]


def test_plan_predicts_memory_for_a_batch_and_for_a_budget(
    planned: Planned, capsys: pytest.CaptureFixture[str]
) -> None:
    planned.call = REAL_PLAN
    save(CHAIN)
    shown = ["plan", "model.py", "--input", "1,3,8,8", "--batch", "7", "--budget", "1 MiB"]
    assert main(shown) == 0
    out = capsys.readouterr().out
    assert re.search(r"\nMiB, batch 7 .*\npeak by backpropagation: \d+\.\d+ ", out, re.DOTALL)
    assert re.search(r"\nlargest batch within 1.00 MiB: \d+ by block-local steps, \d+ by", out)
    assert main([*shown[:-1], "much"]) == 2
    assert_message(capsys, "the budget 'much' cannot be read. Hint: ")


def test_the_drawing_is_called_after_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    need_graphviz()
    save("net = nn.Linear(1, 1)")
    assert main(["model.py"]) == 0
    assert Path("model.svg").read_text().startswith("<?xml")
    assert (
        capsys.readouterr().out == "wrote model.svg: 2 feature blocks and the classifier of Chain\n"
    )


@pytest.mark.parametrize("package", ["graphviz", "pygraphviz"])
def test_without_graphviz_a_page_is_written_and_that_is_said(
    small: BlockPlan,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    package: str,
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, package, None)
    save("net = nn.Linear(1, 1)")
    assert main(["model.py"]) == 0
    assert Path("model.html").read_text(encoding="utf-8") == page(small)
    assert_message(capsys, f"'{package}', which is not installed.*Writing a page instead")
    assert main(["model.py", "-o", "net.png"]) == 2
    assert_message(capsys, f"'{package}', which is not installed")
    assert not Path("net.png").exists()


@pytest.mark.parametrize(
    ("source", "title"),
    [
        ("zoo_of_this_test:make_small", "make_small (Chain): 2 feature blocks"),
        ("zoo_of_this_test:Zoo.tiny", "tiny (Chain): 2 feature blocks"),
        ("zoo_of_this_test:Chain", "Chain: 2 feature blocks"),
        ("zoo_of_this_test.py", "Chain: 2 feature blocks"),
        ("zoo_of_this_test:make_small({'depth': 2}, 'a:b')", "make_small (Chain): 2 feature"),
        ("zoo_of_this_test.py:make_small({'depth': 2})", "make_small (Chain): 2 feature"),
    ],
)
def test_a_drawing_is_titled_after_the_architecture(
    source: str, title: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path.cwd())
    save(
        """
        class Chain(nn.Module): ...
        def make_small(*options): return Chain()
        class Zoo: tiny = make_small
        """,
        "zoo_of_this_test.py",
    )
    options = ["--model", "Chain"] if source.endswith(".py") else []
    assert main([source, *options, "-o", "net.dot"]) == 0
    sys.modules.pop("zoo_of_this_test", None)
    assert f">{title} " in Path("net.dot").read_text()


def test_an_error_of_sffx_is_a_message(
    planned: Planned, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(model: nn.Module, **options: Any) -> BlockPlan:
        raise CutError("the model has no place for a cut")

    planned.call = refuse
    save("net = nn.Linear(1, 1)")
    assert main(["model.py"]) == 2
    assert capsys.readouterr().err == "sffx-viz: the model has no place for a cut\n"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("net.jpeg", "unknown"),
        ("nowhere/net.svg", "does not exist"),
        ("folder.dot", "cannot write"),
    ],
)
def test_an_output_that_cannot_be_written_is_a_message(
    output: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("folder.dot").mkdir()
    save("net = nn.Linear(1, 1)")
    assert main(["model.py", "-o", output]) == 2
    assert_message(capsys, message)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("model.py", "model"),
        ("model.py:Net", "Net"),
        ("model.py:Net({'depth': 2}, name='a:b')", "Net"),
        ("collections:OrderedDict({'a': 1})", "OrderedDict"),
        ("timm:resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("hf:BertConfig", "BertConfig"),
    ],
)
def test_a_drawing_is_called_after_what_the_source_names(
    source: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(drawing, "find_model", lambda *_: nn.Linear(1, 1))
    monkeypatch.setattr(drawing, "draw_plan", lambda plan, path, **_: path)
    assert main([source]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {name}.svg: 2 feature blocks")


def test_an_output_is_checked_before_the_plan_is_made(planned: Planned) -> None:
    save("net = nn.Linear(1, 1)")
    assert main(["model.py", "-o", "net.jpeg"]) == 2
    assert planned.model is None


def test_a_cut_net_is_drawn_as_it_is(planned: Planned, small: BlockPlan) -> None:
    save_cut_net(small)
    assert main(["model.py", "-o", "net.gv"]) == 0
    assert planned.model is None
    assert Path("net.gv").read_text(encoding="utf-8") == block_graph(small).source


def test_open_without_a_browser_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(webbrowser, "open", lambda uri: False)
    save("net = nn.Linear(1, 1)")
    assert main(["model.py", "-o", "net.dot", "--open"]) == 0
    assert_message(capsys, "there is no browser to show net.dot with")


def test_open_shows_the_drawing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shown: list[str] = []
    monkeypatch.setattr(webbrowser, "open", shown.append)
    save("net = nn.Linear(1, 1)")
    assert main(["model.py", "-o", "net.dot", "--open"]) == 0
    assert shown == [(tmp_path / "net.dot").resolve().as_uri()]
