"""The model that a command line means.

It is written as an object in a Python file (`model.py`, `model.py:make_net`), as
`package.module:callable`, as `timm:NAME`, or as `hf:CONFIG_CLASS`.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import os
import sys
import traceback
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

from sffx.cli.sources import SOURCES
from sffx.compiler.trace.code_names import names_in
from sffx.errors import InputError


def find_model(
    source: str, name: str | None = None, num_classes: int | None = None, *, filled: bool = False
) -> nn.Module:
    """Return the model that `source` means.

    Args:
        source: path of a Python file, with a name in it or not (`model.py:make_net`),
            `package.module:name`, `timm:NAME` or `hf:CONFIG_CLASS`.
        name: of the object in the file. Without it, the file must hold one candidate only.
        num_classes: for a callable that takes `num_classes`; its own default if None.
        filled: whether a model of timm or transformers gets values for its parameters, not only
            shapes.

    Raises:
        InputError: there is no such file or object, the file holds no model or several, or its
            own code raised an error.
    """
    package, _, model_name = source.partition(":")
    if package in SOURCES:
        _refuse_name(source, name)
        with _own_errors(package):
            return SOURCES[package](model_name, num_classes, filled=filled)
    path, name_in_file = _file_and_name(source, name)
    if path is None:
        _refuse_name(source, name)
        return _model_of_module(source, num_classes)
    # A callable may import or read its arguments as late as when it is called.
    with as_script(path):
        module = _load(path)
        if name_in_file is None:
            name_in_file = _only_candidate(module, path)
        thing = _member_or_call(module, name_in_file, str(path))
        return _build(thing, name_in_file, str(path), num_classes)


def find_callable(source: str) -> Callable[..., Any]:
    """Return the callable that `file.py:NAME` or `package.module:NAME` means.

    Raises:
        InputError: there is no such file or object, or it cannot be called.
    """
    path, name = _file_and_name(source, None)
    if path is not None:
        with as_script(path):
            thing = _member(_load(path), name or "", str(path))
    else:
        thing = _object_of_module(source)
    if not callable(thing):
        raise InputError(
            f"{source} is a {type(thing).__name__}, which cannot be called. "
            "Hint: name a function or a class"
        )
    return thing


def candidates(module: ModuleType) -> dict[str, str]:
    """Return the public names of a loaded file that mean a model, each with its kind.

    These are the models that the file has made. Without any, they are the functions that are
    annotated to return a model. Without these, they are the classes of models. Functions and
    classes count only if they can be called without arguments. Those that another one uses, such as
    the class of a block that the class of the net is made of, are parts and do not count.
    """
    public = {name: thing for name, thing in vars(module).items() if not name.startswith("_")}
    functions = {}
    classes = {}
    for name, thing in public.items():
        # Imported functions and classes are not candidates.
        is_own = getattr(thing, "__module__", None) == module.__name__
        if not is_own or _required(thing):
            continue
        if _is_maker(thing):
            functions[name] = "function"
        elif _is_model_class(thing):
            classes[name] = "class"
    return _instances(public) or _wholes(functions, public) or _wholes(classes, public)


def _wholes(kinds: dict[str, str], public: dict[str, Any]) -> dict[str, str]:
    """Return the functions or classes that no other one among them uses; all if none is left."""
    used: set[str] = set()
    for name in kinds:
        # A function that calls itself is no part of another one.
        used.update(_names_used(public[name]) - {name})
    wholes = {name: kind for name, kind in kinds.items() if name not in used}
    return wholes or kinds


def _names_used(thing: Any) -> set[str]:
    """Return the names that the code of a function, or of the methods of a class, refers to."""
    names: set[str] = set()
    functions = [thing]
    if isinstance(thing, type):
        # A static or a class method holds its function.
        functions = [getattr(each, "__func__", each) for each in vars(thing).values()]
    for function in functions:
        code = getattr(function, "__code__", None)
        if code is not None:
            names.update(names_in(code))
    return names


def _instances(public: dict[str, Any]) -> dict[str, str]:
    """Return the names of the models that a file has made."""
    instances: dict[str, str] = {}
    seen: set[int] = set()
    for name, thing in public.items():
        # A loss function is an nn.Module, too, but has no parameters.
        is_module = isinstance(thing, nn.Module)
        is_model = is_module and next(thing.parameters(), None) is not None
        if is_model and id(thing) not in seen:
            instances[name] = f"instance of {type(thing).__name__}"
            seen.add(id(thing))
    return instances


def _is_model_class(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, nn.Module)


def _is_maker(thing: Any) -> bool:
    """Return whether a function is annotated to return a model."""
    if not isinstance(thing, FunctionType):
        return False
    try:
        return _is_model_class(typing.get_type_hints(thing).get("return"))
    except Exception:
        # Some annotations cannot be evaluated. Then the function is not a candidate.
        return False


def _required(thing: Any) -> list[str]:
    """Return the names of the arguments without which an object cannot be called."""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):  # no callable, or one that was not written in Python
        return []
    return [each.name for each in parameters if _is_required(each)]


def _is_required(parameter: inspect.Parameter) -> bool:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return False
    return parameter.default is parameter.empty


def _only_candidate(module: ModuleType, path: Path) -> str:
    """Return the name of the only model in a file.

    Raises:
        InputError: there is none, or there are several.
    """
    kinds = candidates(module)
    names = list(kinds)
    if len(names) == 1:
        return names[0]
    if names:
        listed = [f"{name} ({kind})" for name, kind in kinds.items()]
        raise InputError(
            f"{path} holds several models, and which one is meant is not clear: "
            f"{', '.join(listed)}. Hint: --model {names[0]}"
        )
    others = [f"{name} ({kind})" for name, kind in _others(module).items()]
    rest = f"; it holds {', '.join(others)}" if others else ""
    raise InputError(
        f"{path} holds no model that can be had without arguments{rest}. "
        "Hint: name = Net(...) in the file, or --model NAME"
    )


def _others(module: ModuleType) -> dict[str, str]:
    """Return the names in a file that could make a model if they were named, with their kinds."""
    others = {}
    for name, thing in vars(module).items():
        is_own = getattr(thing, "__module__", None) == module.__name__
        if name.startswith("_") or not is_own:
            continue
        is_function = isinstance(thing, FunctionType)
        if not is_function and not _is_model_class(thing):
            continue
        kind = "function" if is_function else "class"
        required = _required(thing)
        others[name] = f"{kind}, needs {', '.join(required)}" if required else kind
    return others


def _file_and_name(source: str, name: str | None) -> tuple[Path | None, str | None]:
    """Return the file that a source means, None if it means none, and the name in it.

    Raises:
        InputError: there is no such file.
    """
    place, name_in_file = place_and_name(source)
    path = Path(source)
    # "model.py:make_net". But a file may itself be called "net.py:old.py".
    if path.suffix != ".py" and place.endswith(".py") and name is None:
        path = Path(place)
        name = name_in_file
    # Not `Path.is_file`, which raises an error for a call that is too long for a file name.
    if os.path.isfile(path):
        return path, name
    if path.suffix == ".py":
        raise InputError(f"there is no file {str(path)!r}. Hint: name it from the current folder")
    return None, name


def _refuse_name(source: str, name: str | None) -> None:
    if name is not None and ":" in source:
        raise InputError(
            f"--model {name} goes with a file, but {source!r} names the object itself. "
            "Hint: leave out one of the two names"
        )


def _model_of_module(source: str, num_classes: int | None) -> nn.Module:
    """Return the model that `package.module:callable` means."""
    module_name, _, name = source.partition(":")
    holder = _imported(source)
    with as_script(None):
        thing = _member_or_call(holder, name, module_name)
        return _build(thing, name, module_name, num_classes)


def _object_of_module(source: str) -> Any:
    """Return the object that `package.module:name` means."""
    module_name, _, name = source.partition(":")
    return _member(_imported(source), name, module_name)


def _imported(source: str) -> ModuleType:
    """Return the module in `package.module:name`."""
    module_name, colon, _ = source.partition(":")
    if not colon or not module_name:
        raise InputError(
            f"{source!r} is neither a Python file nor module:callable. "
            "Hint: model.py, torchvision.models:resnet18, timm:resnet18"
        )
    with as_script(None), _own_errors(module_name):
        try:
            return importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            # A module that exists may import one that does not, which is an error of its own.
            is_asked_for = f"{module_name}.".startswith(f"{error.name}.")
            if not is_asked_for:
                raise
            raise InputError(
                f"there is no module {error.name!r}. Hint: install it, or run the command where it "
                "lies; a Python file is named with its suffix, model.py:make_net"
            ) from error


def place_and_name(source: str) -> tuple[str, str]:
    """Return the file, module or package in a source, and what it names there, "" if nothing.

    For example ("timm", "resnet18"), ("model.py", "Net({'depth': 2})") and ("model.py", ""). A call
    may have colons in its arguments.
    """
    if source.endswith(".py"):
        return source, ""
    file, separator, name = source.partition(".py:")
    if separator:
        return f"{file}.py", name
    place, _, name = source.partition(":")
    return place, name


def called(name: str) -> str:
    """Return what a call such as "Net(16, classes=10)" calls, "Net"; any other text as it is."""
    return name.partition("(")[0]


def _member_or_call(holder: Any, name: str, place: str) -> Any:
    """Return the object of a dotted name, or what a call such as "Net(16, classes=10)" makes.

    Raises:
        InputError: there is no such object, the text is no call, or its code raised an error.
    """
    thing = _member(holder, called(name), place)
    if "(" not in name:
        return thing
    try:
        call = ast.parse(name, mode="eval")
    except (SyntaxError, ValueError) as error:
        raise InputError(
            f"{name!r} is no call of Python. Hint: 'Net(16, classes=10)', in quotes"
        ) from error
    if not isinstance(call.body, ast.Call) or ast.unparse(call.body.func) != called(name).strip():
        raise InputError(f"{name!r} is no call of {called(name)}. Hint: 'Net(16, classes=10)'")
    with _own_errors(place):
        # The arguments may be any expression of the file, whose code is run anyway. In brackets, or
        # a traceback would show the first line of the file as that of the call.
        return eval(compile(call, "<the call>", "eval"), vars(holder))


def _member(holder: Any, name: str, place: str) -> Any:
    """Return the object of a dotted name.

    Raises:
        InputError: there is none; the error lists what comes near.
    """
    for part in name.split("."):
        if not hasattr(holder, part):
            raise InputError(f"{place} has no {name!r}. Hint: it has {_near(holder, part)}")
        holder = getattr(holder, part)
    return holder


def _near(holder: Any, name: str) -> str:
    """Return the public callables of an object whose names come near, or else the first ones."""
    callables = []
    for each, thing in vars(holder).items():
        if callable(thing) and not each.startswith("_"):
            callables.append(each)
    near = difflib.get_close_matches(name, callables) or callables[:20]
    return ", ".join(near) or "nothing that could be one"


def _build(thing: Any, name: str, place: str, num_classes: int | None) -> nn.Module:
    """Return a model as it is, or what a callable makes.

    Raises:
        InputError: the object is neither, or the callable needs arguments or fails.
    """
    if isinstance(thing, nn.Module):
        return thing
    if not callable(thing):
        raise InputError(
            f"{name} in {place} is a {type(thing).__name__}, not a model, "
            "and cannot be called to make one. Hint: name a model, or a function that returns one"
        )
    required = _required(thing)
    if required:
        arguments_given = ", ".join(f"{each}=..." for each in required)
        raise InputError(
            f"{name} in {place} needs {', '.join(required)}. "
            f"Hint: give them, '{name}({arguments_given})'"
        )
    takes_classes = num_classes is not None and _takes_num_classes(thing)
    arguments = {"num_classes": num_classes} if takes_classes else {}
    with _own_errors(place):
        made = thing(**arguments)
    if not isinstance(made, nn.Module):
        raise InputError(
            f"{name} in {place} returned a {type(made).__name__}, not a model. "
            "Hint: return a torch.nn.Module"
        )
    return made


def _takes_num_classes(maker: Callable[..., Any]) -> bool:
    """Return whether a callable takes `num_classes`, by name or among its `**kwargs`."""
    parameters = inspect.signature(maker).parameters
    kinds = {each.kind for each in parameters.values()}
    return "num_classes" in parameters or inspect.Parameter.VAR_KEYWORD in kinds


def _load(path: Path) -> ModuleType:
    """Run a file and return it as a module."""
    # The module is not called __main__, so that a script does not run, and has a name of its own,
    # so that a file called torch.py does not hide torch.
    module = ModuleType(f"sffx_viz_{path.stem}")
    module.__file__ = str(path)
    # Dataclasses and type hints look their module up here.
    sys.modules[module.__name__] = module
    with _own_errors(str(path)):
        # importlib would leave a __pycache__ beside the caller's file.
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    return module


@contextmanager
def as_script(path: Path | None) -> Iterator[None]:
    """Give code the surroundings of a script: its folder to import from, and no arguments.

    Args:
        path: of the script; None for code that is imported, or unpickled, in the current folder.
    """
    search_path = sys.path[:]
    arguments = sys.argv[:]
    if path is not None:
        sys.path[:] = [str(path.resolve().parent), *search_path]
        sys.argv[:] = [str(path)]
    else:
        sys.path[:] = [*search_path, str(Path.cwd())]
        sys.argv[:] = arguments[:1]
    try:
        yield
    finally:
        sys.path[:] = search_path
        sys.argv[:] = arguments


@contextmanager
def _own_errors(place: str) -> Iterator[None]:
    """Turn an error in the user's code into a message that shows the line of that code."""
    try:
        yield
    except InputError:
        raise
    # A script may end itself, by sys.exit.
    except (Exception, SystemExit) as error:
        frames = []
        for frame in traceback.extract_tb(error.__traceback__):
            if not _is_machinery(frame.filename):
                frames.append(frame)
        # The lines of the file itself; if the error is in a package, its innermost line.
        own = [frame for frame in frames if frame.filename == place] or frames[-1:]
        lines = [*traceback.format_list(own), *traceback.format_exception_only(error)]
        raise InputError(
            f"{place} raised an error of its own:\n{''.join(lines).rstrip()}"
        ) from error


def _is_machinery(filename: str) -> bool:
    return filename in (__file__, importlib.__file__) or filename.startswith("<frozen ")
