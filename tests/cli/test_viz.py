"""The command: which model it finds in a file, what it asks of `sffx.plan`, what it writes, and how it fails."""

from __future__ import annotations

import pickle
import re
import sys
import textwrap
import webbrowser
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import sffx
from sffx.blocks import BlockPlan
from sffx.cli.viz import main
from sffx.draw.graph import dot
from sffx.errors import CutError


@dataclass
class Planned:
    """What `sffx.plan` was called with, the last time."""

    model: Any = None
    options: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(autouse=True)
def planned(small: BlockPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planned:
    """Runs in an empty folder with a `sffx.plan` that remembers its arguments and always returns the small plan."""
    call = Planned()

    def plan(model: nn.Module, **options: Any) -> BlockPlan:
        call.model, call.options = model, options
        return small

    monkeypatch.setattr(sffx, "plan", plan, raising=False)
    monkeypatch.chdir(tmp_path)
    return call


def save(text: str, name: str = "model.py") -> None:
    Path(name).write_text("from torch import nn\n\n" + textwrap.dedent(text))


NET = """
class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layer = nn.Linear(width, width)
"""


# What is found: the file, and an expression of the model in terms of the loaded module and of what was planned.
FOUND = {
    "an instance": NET + "net = Net(3)",
    "an instance rather than a function": NET
    + "def make() -> nn.Module:\n    return Net(5)\nnet = Net(3)",
    "an instance rather than a loss": NET + "criterion = nn.CrossEntropyLoss()\nnet = Net(3)",
    "an instance rather than its part": NET
    + "layer = nn.Linear(2, 2)\nnet = Net(3)\nnet.layer = layer\nlayer = net.layer = nn.Linear(3, 3)",
    "an instance with two names": NET + "net = Net(3)\nmodel = net",
    "an annotated function": NET + "def make() -> nn.Module:\n    return Net(3)",
    "a function with defaults": NET + "def make(width=3) -> Net:\n    return Net(width)",
    "a function whose code names the class": NET + "def make():\n    return Net(3)",
    "a function that annotates in a string": NET + "def make() -> 'Net':\n    return Net(3)",
    "a class": NET.replace("=4", "=3"),
    "a class besides one that needs arguments": NET.replace("=4", "=3")
    + "class Part(nn.Module):\n    def __init__(self, width): ...",
    "a class besides an imported one": "from torch.nn import Linear, Identity\n"
    + NET.replace("=4", "=3"),
    "a class besides functions that make no model": NET.replace("=4", "=3")
    + "def load_data():\n    raise SystemExit\ndef size() -> int: ...",
    "a class besides a script's functions": NET.replace("=4", "=3")
    + "def main():\n    Net(9)\ndef train_all():\n    return Net(9)",
    "a dataclass beside it": "from dataclasses import dataclass\n@dataclass\nclass Options:\n    lr: float = 1.0\n"
    + NET
    + "net = Net(3)",
}


@pytest.mark.parametrize("text", FOUND.values(), ids=FOUND.keys())
def test_the_model_is_found(planned: Planned, text: str) -> None:
    save(text)
    assert main(["model.py"]) == 0
    assert type(planned.model).__name__ == "Net"
    assert planned.model.layer.in_features == 3


NOT_FOUND = {
    "two instances": (
        NET + "one = Net()\ntwo = Net()",
        "several models.*one \\(instance of Net\\), two \\(instance of Net\\), Net \\(class\\)",
    ),
    "two functions": (
        NET + "def one() -> Net: ...\ndef two() -> Net: ...",
        "one \\(function\\), two \\(function\\), Net \\(class\\)",
    ),
    "two classes": (
        NET + "class Other(Net): ...",
        "Net \\(class\\), Other \\(class\\).*--model Net",
    ),
    "a class that needs arguments": (
        NET.replace("=4", ""),
        "no model that can be had without arguments; it holds Net \\(class, needs width\\)",
    ),
    "a function that says nothing": (
        "def make():\n    raise SystemExit",
        "it holds make \\(function\\).*--model NAME",
    ),
    "only imports": (
        "from torch.nn import Linear",
        "no model that can be had without arguments\\. Hint",
    ),
    "a function that returns nothing": (
        "def make() -> nn.Module: ...",
        "make in model.py returned a NoneType, not a model",
    ),
}


@pytest.mark.parametrize(("text", "message"), NOT_FOUND.values(), ids=NOT_FOUND.keys())
def test_what_cannot_be_told_is_listed(
    text: str, message: str, capsys: pytest.CaptureFixture[str], planned: Planned
) -> None:
    save(text)
    assert main(["model.py"]) == 2
    assert_message(capsys, message)
    assert planned.model is None


def assert_message(capsys: pytest.CaptureFixture[str], pattern: str) -> None:
    error = capsys.readouterr().err
    assert error.startswith("sffx-viz: ")
    assert "Traceback" not in error
    assert re.search(pattern, error), error


def test_model_names_one_of_several(planned: Planned) -> None:
    save(NET + "one = Net(1)\nclass Holder:\n    two = Net(2)\ndef three():\n    return Net(3)")
    for name, width in (("one", 1), ("Holder.two", 2), ("three", 3), ("Net", 4)):
        assert main(["model.py", "--model", name]) == main([f"model.py:{name}"]) == 0
        assert planned.model.layer.in_features == width
        assert Path(f"{name.rpartition('.')[2]}.svg").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nets", "model.py has no 'nets'. Hint: it has net"),
        ("number", "number in model.py is a int, not a model"),
        ("build", "build in model.py needs depth, width"),
    ],
)
def test_model_that_is_none_is_said(
    name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save("net = nn.Linear(1, 1)\nnumber = 3\ndef build(depth, *rest, width): ...")
    assert main(["model.py", "--model", name]) == 2
    assert_message(capsys, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "one = 1\ntwo = one / 0",
            r'File "model\.py", line 4, in <module>\n    two = one / 0\n(.*\n)?ZeroDivisionError: division by zero',
        ),
        ("net = (", r'File "model\.py", line 3\n(.*\n)+SyntaxError'),
        ("import sys\nsys.exit('no data')", r"line 4, in <module>\n(.*\n)+SystemExit: no data"),
        (
            "def make() -> nn.Module:\n    return nn.Linear('a', 1)",
            r'File "model\.py", line 4, in make\n(.*\n)+TypeError',
        ),
        (
            "import no_such_package",
            r"line 3, in <module>\n(.*\n)+ModuleNotFoundError: No module named 'no_such_package'",
        ),
    ],
)
def test_a_file_that_raises_shows_its_own_error(
    text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(text)
    assert main(["model.py"]) == 2
    assert_message(capsys, message)


def test_a_file_is_loaded_as_a_script_would_be_and_leaves_no_trace(planned: Planned) -> None:
    Path("widths_of_this_test.py").write_text("WIDTH = 3\n")
    save(
        """
        import sys
        from widths_of_this_test import WIDTH
        assert sys.argv == ["model.py"]
        assert __name__ != "__main__"
        net = nn.Linear(WIDTH, 1)
        """
    )
    before = sys.path[:], sys.argv[:]
    assert main(["model.py", "--plan"]) == 0
    assert planned.model.in_features == 3
    assert (sys.path, sys.argv) == before


def test_a_callable_of_a_module_is_called_without_arguments(planned: Planned) -> None:
    save(
        NET + "class Zoo:\n    @staticmethod\n    def small(width=3):\n        return Net(width)",
        "zoo_of_this_test.py",
    )
    before = sys.path[:]
    assert main(["zoo_of_this_test:Zoo.small"]) == 0
    assert planned.model.layer.in_features == 3
    assert Path("small.svg").exists()
    assert sys.path == before


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing.py", "there is no file 'nothing.py'"),
        ("resnet18", "'resnet18' is neither a Python file nor module:callable"),
        ("no_such_package.models:net", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("torch.nn:Linaer", "torch.nn has no 'Linaer'. Hint: it has .*Linear"),
        ("torch.nn:Linear", "Linear in torch.nn needs in_features, out_features"),
        ("os:getcwd", "getcwd in os returned a str, not a model"),
    ],
)
def test_a_source_that_is_none_is_said(
    source: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([source]) == 2
    assert_message(capsys, message)


def test_the_options_reach_the_plan(planned: Planned) -> None:
    save("net = nn.Linear(1, 1)")
    assert main(["model.py", "--plan"]) == 0
    assert planned.options == {"policy": "residual", "example_input": None, "num_classes": None}
    assert (
        main(
            ["model.py", "--plan", "--policy", "uniform", "--input", "1,3,32,32", "--classes", "7"]
        )
        == 0
    )
    assert planned.options["example_input"].shape == (1, 3, 32, 32)
    assert (planned.options["policy"], planned.options["num_classes"]) == ("uniform", 7)


@pytest.mark.parametrize("shape", ["1,x", "", "1,0,3", "1.5", "a b=1,2", "=1,2", "1,2:float"])
def test_a_shape_that_is_none_is_said(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["model.py", "--input", shape])
    assert f"{shape!r} is not a shape such as 1,3,224,224" in capsys.readouterr().err


def test_several_inputs_reach_the_plan_by_name_or_in_order(planned: Planned) -> None:
    save("net = nn.Linear(1, 1)")
    assert main(["model.py", "--plan", "--input", "ids=1,16:int", "--input", "mask=1,16"]) == 0
    example = planned.options["example_input"]
    assert {name: (tuple(x.shape), str(x.dtype)) for name, x in example.items()} == {
        "ids": ((1, 16), "torch.int64"),
        "mask": ((1, 16), "torch.float32"),
    }
    assert main(["model.py", "--plan", "--input", "1,16:int", "--input", "1,2"]) == 0
    assert [tuple(x.shape) for x in planned.options["example_input"]] == [(1, 16), (1, 2)]


def test_inputs_with_and_without_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    save("net = nn.Linear(1, 1)")
    assert main(["model.py", "--plan", "--input", "ids=1,16:int", "--input", "1,2"]) == 2
    assert_message(capsys, "given 2 times, but only ids by name. Hint: name all")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--plan", "-o", "a.svg", "--unfold"],
            "--plan prints a table and draws nothing, so --output, --unfold would be passed over",
        ),
        (
            ["--compare", "residual,layer", "--policy", "layer", "--plan"],
            "--compare draws.*so --plan, --policy would be passed over",
        ),
        (["--compare", "residual,layer", "--open"], "--compare draws where -o names one. Hint: -o"),
        (["--compare", "residual,layer", "-o", "a.html"], "unknown"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save("net = nn.Linear(1, 1)")
    assert main(["model.py", *options]) == 2
    assert_message(capsys, message)
    assert [path.name for path in Path().iterdir()] == ["model.py"]


def test_plan_prints_the_table_and_draws_nothing(
    small: BlockPlan, capsys: pytest.CaptureFixture[str]
) -> None:
    save("net = nn.Linear(1, 1)")
    assert main(["model.py", "--plan"]) == 0
    assert capsys.readouterr().out == f"{small}\n"
    assert [path.name for path in Path().iterdir()] == ["model.py"]


def test_the_drawing_is_called_after_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pygraphviz")
    save("net = nn.Linear(1, 1)")
    assert main(["model.py"]) == 0
    assert Path("model.svg").read_text().startswith("<?xml")
    assert (
        capsys.readouterr().out == "wrote model.svg: 2 feature blocks and the classifier of Chain\n"
    )


def test_without_a_renderer_the_text_is_written_and_that_is_said(
    small: BlockPlan, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "pygraphviz", None)
    save("net = nn.Linear(1, 1)")
    assert main(["model.py"]) == 0
    assert Path("model.dot").read_text(encoding="utf-8") == dot(small)
    assert_message(capsys, "'pygraphviz', which is not installed.*Writing the graph as text")
    assert main(["model.py", "-o", "net.png"]) == 2
    assert_message(capsys, "'pygraphviz', which is not installed")
    assert not Path("net.png").exists()


def test_an_error_of_sffx_is_a_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: nn.Module, **_: Any) -> BlockPlan:
        raise CutError("the model has no place for a cut")

    monkeypatch.setattr(sffx, "plan", refuse, raising=False)
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


def test_a_cut_net_is_drawn_as_it_is(planned: Planned, small: BlockPlan) -> None:
    save(
        "import pickle\nfrom pathlib import Path\nnet = nn.Linear(1, 1)\nnet.plan = pickle.loads(Path('plan.pkl').read_bytes())"
    )
    Path("plan.pkl").write_bytes(pickle.dumps(small))
    assert main(["model.py", "-o", "net.gv"]) == 0
    assert planned.model is None
    assert Path("net.gv").read_text(encoding="utf-8") == dot(small)


def test_open_shows_the_drawing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shown: list[str] = []
    monkeypatch.setattr(webbrowser, "open", shown.append)
    save("net = nn.Linear(1, 1)")
    assert main(["model.py", "-o", "net.dot", "--open"]) == 0
    assert shown == [(tmp_path / "net.dot").resolve().as_uri()]
