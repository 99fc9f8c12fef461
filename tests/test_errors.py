"""The errors have one root, and the pieces that their messages share."""

from __future__ import annotations

import traceback

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx import errors
from sffx.checks import positive_integer
from sffx.errors import (
    InputError,
    MissingExtra,
    SffxError,
    backbone_hint,
    failure_in_words,
    first_line,
    has_parts,
    in_brief,
    location,
    shown,
)

KINDS = ("InputError", "TraceError", "CutError", "VerifyError", "ExportError", "MissingExtra")


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_public_and_has_the_one_root(name: str) -> None:
    assert issubclass(getattr(sffx, name), SffxError)


@pytest.mark.parametrize(
    ("kind", "builtin"), [("InputError", ValueError), ("MissingExtra", ImportError)]
)
def test_code_that_expects_a_builtin_error_catches_ours(
    kind: str, builtin: type[Exception]
) -> None:
    assert issubclass(getattr(sffx, kind), builtin)


def test_a_missing_package_names_the_extra_that_brings_it() -> None:
    assert str(MissingExtra("onnx", "export", "exporting")) == (
        "exporting needs the package 'onnx', which is not installed. "
        "Hint: pip install 'sffx[export]'"
    )


@pytest.mark.parametrize(
    ("names", "text"),
    [([], ""), (["a"], "a"), (["a", "b"], "a, b"), (["a", "b", "c", "d"], "a, b and 2 more")],
)
def test_a_long_list_is_cut_short(names: list[str], text: str) -> None:
    assert in_brief(names, 2) == text


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.zeros(3, 3)  # the line that fails


def failure_of(model: nn.Module, x: Tensor) -> BaseException:
    with pytest.raises(RuntimeError) as raised:
        model(x)
    return raised.value


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        (AssertionError(), "AssertionError"),
        (RuntimeError("\n  no room.\nMore of it"), "no room"),
        (RuntimeError("Constraints violated (batch)!\n  - two sizes are one"), "two sizes are one"),
        (RuntimeError("It failed:\n  no room."), "It failed: no room"),
    ],
)
def test_the_first_line_of_a_message_is_what_tells(failure: Exception, line: str) -> None:
    assert first_line(failure) == line


def test_an_error_without_a_message_is_told_by_its_kind() -> None:
    assert failure_in_words(AssertionError()) == "AssertionError (in torch)"
    assert failure_in_words(KeyError("x")) == "KeyError: 'x' (in torch)"


def test_an_error_of_sffx_itself_has_no_place_in_the_model() -> None:
    # It says where the model failed, if that is known.
    with pytest.raises(InputError) as raised:
        positive_integer("size", 0, "1")
    assert failure_in_words(raised.value) == "InputError: size is 0. Hint: 1"


def test_the_location_is_the_innermost_line_of_the_models_own_code() -> None:
    place = location(failure_of(Failing(), torch.zeros(2, 2)))
    assert place.startswith(f"{__file__}:")
    assert place.endswith(", in forward")
    line = int(place.split(":")[-1].split(",")[0])
    with open(__file__) as file:
        assert "# the line that fails" in file.readlines()[line - 1]


def test_sffx_itself_is_not_the_place_of_an_error_wherever_it_is_installed(monkeypatch) -> None:
    failure = failure_of(Failing(), torch.zeros(2, 2))
    packages = "/usr/lib/python3/site-packages/"
    monkeypatch.setattr(errors, "PACKAGE", f"{packages}sffx/")
    monkeypatch.setattr(errors, "_OF_PYTHON", "/usr/lib/python3/")
    frames = [
        traceback.FrameSummary(f"{packages}timm/vit.py", 3, "forward"),
        traceback.FrameSummary(f"{packages}sffx/compiler/calls.py", 5, "call"),
        traceback.FrameSummary("/usr/lib/python3/functools.py", 7, "wrapper"),
    ]
    monkeypatch.setattr(traceback, "extract_tb", lambda _: frames)
    assert location(failure) == f"{packages}timm/vit.py:3, in forward"


def test_where_torch_alone_runs_the_place_is_the_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(
        InputError, match=r"\(in Linear\(in_features=3, out_features=2, bias=True\)"
    ):
        sffx.plan(model, "layer", torch.zeros(2, 4))


def test_an_error_without_a_line_of_the_models_code_is_in_torch() -> None:
    assert location(RuntimeError("never raised")) == "in torch"


@pytest.mark.parametrize(
    ("children", "part"),
    [
        ({"neck": nn.Linear(1, 1), "backbone": nn.Linear(1, 1)}, "self.backbone, a Linear"),
        ({"image_encoder": nn.Conv2d(1, 1, 1)}, "self.image_encoder, a Conv2d"),
        ({"act": nn.ReLU(), "first": nn.Linear(1, 1)}, "self.first, a Linear"),
    ],
)
def test_the_hint_names_the_part_that_sees_the_input(
    children: dict[str, nn.Module], part: str
) -> None:
    model = nn.Module()
    for name, child in children.items():
        model.add_module(name, child)
    assert f"transform the backbone (here {part}) with a pool" in backbone_hint(model)


def test_the_hint_names_no_part_where_none_stands_out() -> None:
    diffusion = nn.Module()
    for name in ("time", "down", "up"):
        diffusion.add_module(name, nn.Linear(1, 1))
    assert "transform the backbone with a pool" in backbone_hint(diffusion)


def test_the_hint_names_no_part_where_none_has_weights() -> None:
    assert "transform the backbone with a pool" in backbone_hint(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize(
    ("children", "expected"),
    [
        ([nn.Linear(1, 1), nn.Linear(1, 1)], False),
        ([nn.ModuleList([nn.ReLU(), nn.Linear(1, 1)])], False),
        ([nn.ReLU(), nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))], True),
    ],
)
def test_a_model_of_single_layers_has_no_backbone(
    children: list[nn.Module], expected: bool
) -> None:
    assert has_parts(nn.Sequential(*children)) == expected


def test_a_long_value_is_shown_in_one_short_line() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(40)))
    text = shown(model)
    assert text.startswith("Sequential( (0): Linear(")
    assert text.endswith("…")
    assert len(text) == 101
    assert "\n" not in text
    assert shown("a") == "'a'"
