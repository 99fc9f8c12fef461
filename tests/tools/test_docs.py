"""Each public name is documented, and one command writes the reference."""

from __future__ import annotations

import dataclasses
import inspect
import re
import warnings
from pathlib import Path

import pytest
from pdoc.__main__ import cli as pdoc

import sffx
from tools.dev import DOCUMENTED

FUNCTIONS = [name for name in sffx.__all__ if inspect.isfunction(getattr(sffx, name))]
CLASSES = [name for name in sffx.__all__ if inspect.isclass(getattr(sffx, name))]
RECORDS = [name for name in sffx.__all__ if dataclasses.is_dataclass(getattr(sffx, name))]

# Functions that take the arguments of another one, and say so.
SAME_ARGUMENTS = {"plan": "transform", "block_losses": "local_loss"}


def document(name: str) -> str:
    return inspect.getdoc(getattr(sffx, name)) or ""


def describes(text: str, name: str) -> bool:
    """Whether a section of a docstring has an entry for a name."""
    return re.search(rf"^    \**{name}:", text, re.MULTILINE) is not None


@pytest.mark.parametrize("name", sffx.__all__)
def test_each_public_name_has_a_docstring(name: str) -> None:
    first_sentence = document(name).split("\n\n")[0]
    assert first_sentence.endswith((".", ":"))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_function_documents_its_arguments_and_errors(name: str) -> None:
    text = document(name)
    if name in SAME_ARGUMENTS:
        assert f"`{SAME_ARGUMENTS[name]}`" in text
        return
    parameters = inspect.signature(getattr(sffx, name)).parameters
    undocumented = [each for each in parameters if not describes(text, each)]
    assert not undocumented
    assert "\nRaises:\n" in text


@pytest.mark.parametrize("name", RECORDS)
def test_each_record_documents_its_attributes(name: str) -> None:
    fields = dataclasses.fields(getattr(sffx, name))
    public = [field.name for field in fields if not field.name.startswith("_")]
    assert not [each for each in public if not describes(document(name), each)]


@pytest.mark.parametrize("name", CLASSES)
def test_each_method_has_a_docstring(name: str) -> None:
    undocumented = []
    for member, value in vars(getattr(sffx, name)).items():
        is_documentable = inspect.isroutine(value) or isinstance(value, property)
        if is_documentable and not member.startswith("_") and not value.__doc__:
            undocumented.append(member)
    assert not undocumented


def test_the_command_writes_the_reference(tmp_path: Path) -> None:
    generator = ["--docformat", "google", "--output-directory", str(tmp_path)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pdoc([*generator, *DOCUMENTED])
    for module in DOCUMENTED:
        assert (tmp_path / f"{module.replace('.', '/')}.html").is_file()
    page = (tmp_path / "sffx.html").read_text(encoding="utf-8")
    members = [name for name in sffx.__all__ if not inspect.ismodule(getattr(sffx, name))]
    assert not [name for name in members if f'id="{name}"' not in page]
    assert (tmp_path / "sffx" / "policies.html").is_file()
