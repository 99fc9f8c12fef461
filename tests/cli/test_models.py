"""Which model a command line means: the objects in a file, in a module, and what is refused."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from sffx.cli.models import find_callable, find_model
from sffx.errors import InputError


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in an empty folder, and see that the search path and the arguments are put back."""
    monkeypatch.chdir(tmp_path)
    path = sys.path[:]
    arguments = sys.argv[:]
    yield
    assert (sys.path, sys.argv) == (path, arguments)


def save(text: str, name: str = "model.py") -> None:
    Path(name).write_text("from torch import nn\n\n" + textwrap.dedent(text))


NET = """
class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layer = nn.Linear(width, width)
"""
NET_OF_WIDTH_3 = NET.replace("=4", "=3")

# In each of these files, the only candidate is a Net of width 3.
FOUND = {
    "an instance": NET + "net = Net(3)",
    "an instance rather than a function": NET
    + "def make() -> nn.Module:\n    return Net(5)\nnet = Net(3)",
    "an instance rather than a loss": NET + "criterion = nn.CrossEntropyLoss()\nnet = Net(3)",
    "an instance with two names": NET + "net = Net(3)\nmodel = net",
    "an annotated function": NET + "def make() -> nn.Module:\n    return Net(3)",
    "a function with defaults": NET + "def make(width=3) -> Net:\n    return Net(width)",
    "a function that annotates in a string": NET + "def make() -> 'Net':\n    return Net(3)",
    "a class": NET_OF_WIDTH_3,
    "a class besides one that needs arguments": NET_OF_WIDTH_3
    + "class Part(nn.Module):\n    def __init__(self, width): ...",
    "a class besides an imported one": "from torch.nn import Linear, Identity\n" + NET_OF_WIDTH_3,
    "a class besides functions that make no model": NET_OF_WIDTH_3
    + "def load_data():\n    raise SystemExit\ndef size() -> int: ...",
    "a class besides functions that say nothing": NET_OF_WIDTH_3
    + "def main():\n    Net(9)\ndef make():\n    return Net(9)",
    "a class besides the classes of its parts": NET_OF_WIDTH_3.replace(
        "nn.Linear(width, width)", "Layer(width)"
    )
    + "        self.more = [Part() for _ in range(2)]\n"
    + "class Layer(nn.Module):\n    def __init__(self, in_features=1):\n"
    + "        super().__init__()\n        self.in_features = in_features\n"
    + "        self.part = Part()\n"
    + "class Part(nn.Module): ...",
    "a function besides one that it calls": NET
    + "def make() -> nn.Module:\n    return part()\ndef part() -> nn.Module:\n    return Net(3)",
    "a dataclass beside it": NET
    + "from dataclasses import dataclass\n@dataclass\nclass Options:\n    lr: float = 1.0\n"
    + "net = Net(3)",
}


@pytest.mark.parametrize("text", FOUND.values(), ids=FOUND.keys())
def test_the_only_candidate_is_the_model(text: str) -> None:
    save(text)
    model = find_model("model.py")
    assert type(model).__name__ == "Net"
    assert model.layer.in_features == 3


NOT_FOUND = {
    "two instances": (
        NET + "one = Net()\ntwo = Net()",
        r"several models.*: one \(instance of Net\), two \(instance of Net\)\. Hint: --model one",
    ),
    "an instance and its part": (
        NET + "net = Net()\npart = net.layer",
        r"net \(instance of Net\), part \(instance of Linear\)",
    ),
    "two functions": (
        NET + "def one() -> Net: ...\ndef two() -> Net: ...",
        r"one \(function\), two \(function\)\. Hint: --model one",
    ),
    "two classes": (
        NET + "class Other(Net): ...",
        r"Net \(class\), Other \(class\).*--model Net",
    ),
    "a class that needs arguments": (
        NET.replace("=4", ""),
        r"no model that can be had without arguments; it holds Net \(class, needs width\)",
    ),
    "a function that says nothing": (
        "def make():\n    raise SystemExit",
        r"it holds make \(function\).*--model NAME",
    ),
    "only imports": (
        "from torch.nn import Linear",
        r"no model that can be had without arguments\. Hint",
    ),
    "a function that returns nothing": (
        "def make() -> nn.Module: ...",
        r"make in model.py returned a NoneType, not a model",
    ),
}


@pytest.mark.parametrize(("text", "message"), NOT_FOUND.values(), ids=NOT_FOUND.keys())
def test_files_without_an_only_candidate_are_refused(text: str, message: str) -> None:
    save(text)
    with pytest.raises(InputError, match=message):
        find_model("model.py")


def test_a_name_chooses_one_of_several() -> None:
    save(NET + "one = Net(1)\nclass Holder:\n    two = Net(2)\ndef three():\n    return Net(3)")
    for name, width in (("one", 1), ("Holder.two", 2), ("three", 3), ("Net", 4)):
        assert find_model("model.py", name).layer.in_features == width
        assert find_model(f"model.py:{name}").layer.in_features == width


@pytest.mark.parametrize(
    ("call", "width"),
    [
        ("Net(5)", 5),
        ("Net(width=6)", 6),
        ("Net()", 4),
        ("Zoo.small(WIDTH + 1)", 8),
        ("Net(max([2, 3], key=lambda n: -n))", 2),
    ],
)
def test_a_call_with_arguments_makes_the_model(call: str, width: int) -> None:
    text = NET + "WIDTH = 7\nclass Zoo:\n    small = staticmethod(lambda width: Net(width))"
    save(text)
    save(text, "calls_of_this_test.py")
    assert find_model("model.py", call).layer.in_features == width
    assert find_model(f"model.py:{call}").layer.in_features == width
    assert find_model(f"calls_of_this_test:{call}").layer.in_features == width


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("Net(", r"'Net\(' is no call of Python. Hint: 'Net\(16, classes=10\)', in quotes"),
        ("Net(3).layer", r"'Net\(3\).layer' is no call of Net"),
        ("Nat(3)", "model.py has no 'Nat'. Hint: it has Net"),
        ("Net(depth=3)", "model.py raised an error of its own:\n(.*\n)*TypeError: .*'depth'"),
        ("Net(wide)", "model.py raised an error of its own:\n(.*\n)*NameError: .*'wide'"),
        ("dict(width=3)", "model.py has no 'dict'"),
        ("count(3)", r"count\(3\) in model.py is a int, not a model"),
    ],
)
def test_a_call_that_makes_no_model_is_refused(call: str, message: str) -> None:
    save(NET + "def count(n): return n")
    with pytest.raises(InputError, match=message):
        find_model("model.py", call)


@pytest.mark.parametrize("call", ["Linear()", "Linear(4, 8, wide=3)"])
def test_an_error_of_a_call_shows_no_line_of_the_module(call: str) -> None:
    with pytest.raises(InputError, match="TypeError") as caught:
        find_model(f"torch.nn:{call}")
    assert "mypy" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nets", "model.py has no 'nets'. Hint: it has net"),
        ("number", "number in model.py is a int, not a model"),
        (
            "build",
            r"build in model.py needs depth, width. Hint: give them, 'build\(depth=..., width=",
        ),
    ],
)
def test_a_name_that_means_no_model_is_refused(name: str, message: str) -> None:
    save("net = nn.Linear(1, 1)\nnumber = 3\ndef build(depth, *rest, width): ...")
    with pytest.raises(InputError, match=message):
        find_model("model.py", name)


@pytest.mark.parametrize(
    "maker",
    [
        "def make(num_classes=2) -> nn.Module:\n    return nn.Linear(1, num_classes)",
        "def make(**options) -> nn.Module:\n    return nn.Linear(1, options['num_classes'])",
    ],
)
def test_the_number_of_classes_reaches_the_callable(maker: str) -> None:
    save(maker)
    assert find_model("model.py", num_classes=7).out_features == 7


def test_a_callable_without_classes_is_called_without_them() -> None:
    save("def make() -> nn.Module:\n    return nn.Linear(1, 2)")
    assert find_model("model.py", num_classes=7).out_features == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "one = 1\ntwo = one / 0",
            r'File "model\.py", line 4, in <module>\n    two = one / 0\n'
            r"(.*\n)?ZeroDivisionError: division by zero",
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
def test_a_file_that_raises_shows_its_own_error(text: str, message: str) -> None:
    save(text)
    with pytest.raises(InputError) as caught:
        find_model("model.py")
    assert re.search(message, str(caught.value))
    assert "Traceback" not in str(caught.value)


def test_a_file_is_loaded_as_a_script_would_be_and_leaves_no_trace() -> None:
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
    assert find_model("model.py").in_features == 3


def test_a_callable_of_a_module_is_called_without_arguments() -> None:
    save(
        NET + "class Zoo:\n    @staticmethod\n    def small(width=3):\n        return Net(width)",
        "makers_of_this_test.py",
    )
    assert find_model("makers_of_this_test:Zoo.small").layer.in_features == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing.py", "there is no file 'nothing.py'"),
        ("nothing.py:net", "there is no file 'nothing.py'"),
        ("resnet18", "'resnet18' is neither a Python file nor module:callable"),
        ("no_such_package.models:net", "there is no module 'no_such_package'. Hint: install it"),
        ("torch.no_such_module:net", "there is no module 'torch.no_such_module'"),
        ("torch.nn:Linaer", "torch.nn has no 'Linaer'. Hint: it has .*Linear"),
        ("torch.nn:Linear", "Linear in torch.nn needs in_features, out_features"),
        ("os:getcwd", "getcwd in os returned a str, not a model"),
    ],
)
def test_a_source_that_means_no_model_is_refused(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_model(source)


def test_a_name_goes_with_a_file_only() -> None:
    for source in ("torch.nn:Linear", "timm:resnet18"):
        with pytest.raises(InputError, match=f"--model net goes with a file, but '{source}' names"):
            find_model(source, "net")


def test_a_callable_is_found_and_not_called() -> None:
    save("def head(block, num_classes):\n    raise SystemExit\nnumber = 3")
    assert find_callable("model.py:head").__name__ == "head"
    assert find_callable("torch.nn:Identity") is nn.Identity
    with pytest.raises(InputError, match=r"model.py:number is a int, which cannot be called"):
        find_callable("model.py:number")
    with pytest.raises(InputError, match=r"model.py has no 'hat'. Hint: it has head"):
        find_callable("model.py:hat")
