"""The model that a command line means: an object in a Python file, `package.module:name`, `timm:NAME` or `hf:CONFIG_CLASS`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import traceback
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

from sffx.cli.sources import SOURCES
from sffx.errors import InputError

# Functions that do a script's work. They are called only when asked for by name: drawing must not start a training run.
RUNNERS = ("main", "train", "test", "eval", "fit", "run")


@dataclass(frozen=True)
class Candidate:
    """Something in a file that is a model, or that makes one when called without arguments.

    Attributes:
        name: in the file.
        kind: "instance of Net", "function" or "class".
        thing: the object.
    """

    name: str
    kind: str
    thing: Any


def find_model(
    source: str, name: str | None = None, num_classes: int | None = None, *, filled: bool = False
) -> nn.Module:
    """The model that `source` means.

    Args:
        source: path of a Python file, with a name in it or not (`model.py:make_net`), `package.module:name`, `timm:NAME` or
            `hf:CONFIG_CLASS`.
        name: of the object in the file; without it an instance is preferred to a function, and a function to a class.
        num_classes: for what makes the model, if it takes a `num_classes`; its own default if None.
        filled: whether a model of timm or transformers gets values for its parameters, and not only shapes.

    Returns:
        the model.

    Raises:
        InputError: there is no such file or object, no model or several in it, or its own code raised an error.
    """
    file, named, thing = source.rpartition(".py:")
    if named and name is None:
        source, name = f"{file}.py", thing
    path = Path(source)
    if path.suffix == ".py" or path.is_file():
        if not path.is_file():
            raise InputError(f"there is no file {source!r}")
        with as_script(path):
            module = _load(path)
            found = (
                _choose(module, path)
                if name is None
                else Candidate(name, "", _member(module, name, path))
            )
            return _build(found.thing, found.name, str(path), num_classes)
    if ":" not in source:
        raise InputError(
            f"{source!r} is neither a Python file nor module:callable. Hint: model.py, torchvision.models:resnet18, timm:resnet18"
        )
    if name is not None:
        raise InputError(f"--model {name} goes with a file, but {source!r} names the object itself")
    place, thing = source.split(":", 1)
    if place not in SOURCES:
        return _imported(place, thing, num_classes)
    with _own_errors(place):
        return SOURCES[place](thing, num_classes, filled=filled)


def candidates(module: ModuleType) -> list[list[Candidate]]:
    """What a loaded file offers, the likeliest first: instances, functions, classes. Names with a leading underscore are private."""
    public = {name: thing for name, thing in vars(module).items() if not name.startswith("_")}
    own = {
        name: thing
        for name, thing in public.items()
        if getattr(thing, "__module__", None) == module.__name__
    }
    functions = [
        Candidate(name, "function", thing)
        for name, thing in own.items()
        if _is_maker(thing, module)
    ]
    classes = [
        Candidate(name, "class", thing)
        for name, thing in own.items()
        if _is_model_class(thing) and not _required(thing)
    ]
    return [_instances(public), functions, classes]


def _instances(public: dict[str, Any]) -> list[Candidate]:
    named: dict[int, tuple[str, nn.Module]] = {}
    for name, thing in public.items():
        if isinstance(thing, nn.Module):
            named.setdefault(id(thing), (name, thing))
    models = list(named.values())
    # A loss function is an nn.Module as well, and a backbone may have a name of its own besides the model that holds it.
    models = [pair for pair in models if any(True for _ in pair[1].parameters())] or models
    parts = {id(part) for _, model in models for part in model.modules() if part is not model}
    return [
        Candidate(name, f"instance of {type(model).__name__}", model)
        for name, model in models
        if id(model) not in parts
    ]


def _is_model_class(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, nn.Module)


def _required(thing: Callable[..., Any]) -> list[str]:
    """Names of the arguments without which it cannot be called."""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.kind not in optional
    ]


def _is_maker(thing: Any, module: ModuleType) -> bool:
    """Whether a function says, by its annotation or by the names in its code, that it makes a model."""
    if (
        not isinstance(thing, FunctionType)
        or _required(thing)
        or thing.__name__.startswith(RUNNERS)
    ):
        return False
    made = _returns(thing)
    if made is not None:
        return _is_model_class(made)
    return any(
        _is_model_class(part)
        or (isinstance(part, FunctionType) and _is_model_class(_returns(part)))
        for part in _named(thing, module)
    )


def _named(function: FunctionType, module: ModuleType) -> list[Any]:
    """The objects that a function's code names: globals, and what it may reach through modules, as in `torchvision.models.resnet18`."""
    names = inspect.unwrap(function).__code__.co_names
    level = [vars(module)[name] for name in names if name in vars(module)]
    found = list(level)
    for _ in range(3):
        level = [
            getattr(part, name)
            for part in level
            if isinstance(part, ModuleType)
            for name in names
            if hasattr(part, name)
        ]
        found += level
    return found


def _returns(function: Callable[..., Any]) -> Any:
    """What a function's annotation says that it returns, `type(None)` for None; None if it does not say."""
    try:
        return typing.get_type_hints(function).get("return")
    except Exception:
        # An annotation that cannot be evaluated says nothing, whatever went wrong.
        return None


def _choose(module: ModuleType, path: Path) -> Candidate:
    tiers = candidates(module)
    first = next((tier for tier in tiers if tier), [])
    if len(first) == 1:
        return first[0]
    if first:
        found = [f"{candidate.name} ({candidate.kind})" for tier in tiers for candidate in tier]
        hint = f"Hint: --model {first[0].name}"
        raise InputError(
            f"{path} holds several models, and which one is meant is not clear: {', '.join(found)}. {hint}"
        )
    others = list(_others(module))
    rest = f"; it holds {', '.join(others)}" if others else ""
    raise InputError(
        f"{path} holds no model that can be had without arguments{rest}. Hint: name = Net(...) in the file, or --model NAME"
    )


def _others(module: ModuleType) -> Iterator[str]:
    for name, thing in vars(module).items():
        if (
            name.startswith("_")
            or getattr(thing, "__module__", None) != module.__name__
            or not callable(thing)
        ):
            continue
        needs = f", needs {', '.join(_required(thing))}" if _required(thing) else ""
        if _is_model_class(thing) or isinstance(thing, FunctionType):
            yield f"{name} ({'class' if isinstance(thing, type) else 'function'}{needs})"


def _member(holder: Any, name: str, place: Path | str) -> Any:
    for part in name.split("."):
        if not hasattr(holder, part):
            names = [
                known
                for known, thing in vars(holder).items()
                if callable(thing) and not known.startswith("_")
            ]
            near = (
                difflib.get_close_matches(part, names)
                or names[:20]
                or ["nothing that could be one"]
            )
            raise InputError(f"{place} has no {name!r}. Hint: it has {', '.join(near)}")
        holder = getattr(holder, part)
    return holder


def _build(thing: Any, name: str, place: str, num_classes: int | None = None) -> nn.Module:
    if isinstance(thing, nn.Module):
        return thing
    if not callable(thing):
        raise InputError(
            f"{name} in {place} is a {type(thing).__name__}, not a model, and cannot be called to make one"
        )
    if _required(thing):
        hint = "Hint: write a function without arguments that returns the model"
        raise InputError(f"{name} in {place} needs {', '.join(_required(thing))}. {hint}")
    with _own_errors(place):
        made = thing(**_width(thing, num_classes))
    if not isinstance(made, nn.Module):
        raise InputError(f"{name} in {place} returned a {type(made).__name__}, not a model")
    return made


def _width(maker: Callable[..., Any], num_classes: int | None) -> dict[str, int]:
    """The argument that sets the number of classes, where one is wanted and the maker takes it, be it among its `**kwargs`."""
    parameters = inspect.signature(maker).parameters if num_classes is not None else {}
    takes = "num_classes" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {"num_classes": num_classes} if takes and num_classes is not None else {}


def _load(path: Path) -> ModuleType:
    # A name of its own, so that a file may be called torch.py without hiding torch, and not __main__, so that a script does not run.
    module = ModuleType(f"sffx_viz_{path.stem}")
    module.__file__ = str(path)
    # Dataclasses and type hints look their module up here.
    sys.modules[module.__name__] = module
    with _own_errors(str(path)):
        # Not importlib, which would leave a __pycache__ beside the caller's file.
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    return module


def _imported(module_name: str, name: str, num_classes: int | None) -> nn.Module:
    with as_script(None):
        with _own_errors(module_name):
            module = importlib.import_module(module_name)
        return _build(_member(module, name, module_name), name, module_name, num_classes)


@contextmanager
def as_script(path: Path | None) -> Iterator[None]:
    """The surroundings that a script has: its folder to import from, and its own empty command line."""
    folder = str(path.resolve().parent) if path else str(Path.cwd())
    before = sys.path[:], sys.argv[:]
    sys.path[:] = [folder, *sys.path] if path else [*sys.path, folder]
    sys.argv[:] = [str(path)] if path else sys.argv[:1]
    try:
        yield
    finally:
        sys.path[:], sys.argv[:] = before


@contextmanager
def _own_errors(place: str) -> Iterator[None]:
    """Turns an error in the user's code into one message that shows where in that code it arose."""
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if not _is_machinery(frame.filename)
        ]
        own = [frame for frame in frames if frame.filename == place] or frames[-1:]
        shown = "".join(
            [*traceback.format_list(own), *traceback.format_exception_only(error)]
        ).rstrip()
        raise InputError(f"{place} raised an error of its own:\n{shown}") from error


def _is_machinery(filename: str) -> bool:
    return filename in (__file__, importlib.__file__) or filename.startswith("<frozen ")
