"""The arguments of a model's forward, in which the inputs of a cut model lie, however deep.

An input of a cut model is one tensor. `model(x, [slow, fast], scale=2)` has the inputs x, paths_0
and paths_1. What is no tensor is a constant: the cut model holds for its value alone.
"""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from sffx.errors import InputError
from sffx.nested import (
    Path,
    Slot,
    as_code,
    form_in_words,
    holds_data,
    holds_slot,
    mapped,
    parts_of,
    values_in,
)

Kind: TypeAlias = Literal["positional", "rest", "keyword"]


@dataclass(frozen=True)
class Argument:
    """One argument of a forward.

    Attributes:
        name: of the parameter; of one that `*args` or `**kwargs` collects, its own.
        kind: "rest" for what can be passed by position alone: what `*args` collects, and what
            stands before a slash.
        value: a slot, a constant, or a list, a tuple, a mapping or a dataclass of such.
    """

    name: str
    kind: Kind
    value: Any


@dataclass(frozen=True)
class Arguments:
    """The arguments of a forward, in order."""

    entries: tuple[Argument, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the inputs, in order."""
        return tuple(value.name for _, value in self._values() if isinstance(value, Slot))

    @property
    def constants(self) -> dict[str, Any]:
        """The constants by their paths, as "flags[0]"."""
        found: dict[str, Any] = {}
        for path, value in self._values():
            if not isinstance(value, Slot):
                found[as_code(path)] = value
        return found

    @property
    def is_flat(self) -> bool:
        """Whether each argument is one input of the same name, which Python can write as one."""
        for entry in self.entries:
            if entry.value != Slot(entry.name) or not is_writable(entry.name):
                return False
        return True

    def fill(self, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and the keyword arguments, given the inputs by name."""

        def filled(value: Any, path: Path) -> Any:
            return values[value.name] if isinstance(value, Slot) else value

        positional = []
        by_name = {}
        for entry in self.entries:
            value = mapped(entry.value, filled, (entry.name,))
            if entry.kind == "keyword":
                by_name[entry.name] = value
            else:
                positional.append(value)
        return tuple(positional), by_name

    def example(self, values: Mapping[str, Any]) -> Any:
        """Return the arguments as one example input: a tuple, or a mapping by name."""
        positional, by_name = self.fill(values)
        if not by_name:
            return positional
        # An example is either a tuple or a mapping, and a mapping holds both.
        names = [entry.name for entry in self.entries if entry.kind != "keyword"]
        return {**dict(zip(names, positional, strict=True)), **by_name}

    def inputs_in(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs by name, given the arguments of a call.

        The call is one of the model, or it has the inputs alone, in order or by name. Constants may
        be left out.

        Raises:
            InputError: the arguments are none of these, or a constant has another value.
        """
        failure: InputError | None = None
        for some_args, some_kwargs in _readings(args, kwargs):
            try:
                return self._inputs_in_call(some_args, some_kwargs)
            except InputError as error:
                # The user is told what is wrong with the call as it is, which is read first.
                failure = failure or error
        alone = self._inputs_alone(args, kwargs)
        if alone is not None:
            return alone
        assert failure is not None  # there is at least one reading
        raise failure

    def _inputs_alone(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Return the inputs of a call that has these alone, in order or by name; None of others.

        An exported model is called like that: `f(x, paths_0, paths_1)`.
        """
        names = self.names
        if not all(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
            return None
        if not kwargs and len(args) == len(names):
            return dict(zip(names, args, strict=True))
        if not args and kwargs.keys() == set(names):
            return {name: kwargs[name] for name in names}
        return None

    def bind(self, x: Any) -> dict[str, Any]:
        """Return the inputs by name, given x as a loader yields it.

        Args:
            x: a tuple of positional arguments, a mapping of keyword arguments, or the one argument.

        Raises:
            InputError: as for `inputs_in`.
        """
        if isinstance(x, Mapping):
            return self.inputs_in((), x)
        if isinstance(x, tuple):
            return self.inputs_in(x, {})
        # The collate function of a loader makes a list of what a data set gives as a tuple. Of one
        # argument, a list may be the argument itself.
        if isinstance(x, list) and len(self.entries) > 1:
            return self.inputs_in(tuple(x), {})
        return self.inputs_in((x,), {})

    def record(self) -> list[Any] | None:
        """Return the arguments in lists, numbers and strings; None where they hold anything else.

        None as well where they are flat and have names, since the inputs say it all.
        """
        has_names = all(entry.kind != "rest" for entry in self.entries)
        if self.is_flat and has_names:
            return None
        try:
            return [[each.name, each.kind, _recorded(each.value)] for each in self.entries]
        except TypeError:
            return None

    def _values(self) -> Iterator[tuple[Path, Any]]:
        """Yield the slots and the constants, each with its path."""
        for entry in self.entries:
            yield from values_in(entry.value, (entry.name,))

    def _inputs_in_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs by name, given the arguments of a call of the model.

        Raises:
            InputError: an argument is missing or unknown, or a constant has another value.
        """
        given = self._by_name(args, kwargs)
        found: dict[str, Any] = {}
        for entry in self.entries:
            if entry.name in given:
                _match(entry.value, given.pop(entry.name), (entry.name,), found)
            elif holds_slot(entry.value):  # only constants may be left out
                raise InputError(
                    f"x lacks the argument {entry.name!r}. "
                    "Hint: pass all arguments with tensors that the example_input held"
                )
        if given:
            raise InputError(
                f"x holds the argument {next(iter(given))!r}, which the example did not hold. "
                "Hint: cut the model with an example_input that holds it"
            )
        return found

    def _by_name(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by the names of the entries."""
        by_position = [entry for entry in self.entries if entry.kind != "keyword"]
        if len(args) > len(by_position):
            # What the example passed by name may be passed by position.
            by_position = list(self.entries)
        if len(args) > len(by_position):
            raise InputError(
                f"x holds {len(args)} arguments, but the model was cut for {len(self.entries)}: "
                f"{', '.join(entry.name for entry in self.entries)}. "
                "Hint: pass as many as the example_input held"
            )
        given: dict[str, Any] = {}
        for entry, value in zip(by_position, args, strict=False):
            given[entry.name] = value
        for name, value in kwargs.items():
            if name in given:
                raise InputError(
                    f"x holds the argument {name!r} twice. "
                    "Hint: pass it by position or by name, not both"
                )
            given[name] = value
        return given


def arguments_of(bound: inspect.BoundArguments) -> tuple[Arguments, dict[str, Any]]:
    """Return the arguments of a call, and the tensors in them by the names of the inputs.

    Of `*x`, with several values, the values are called x_0, x_1 and so on; a single one is x.

    Raises:
        InputError: an argument holds what can be neither an input nor a constant.
    """
    given = list(_given(bound))
    # An argument that is a tensor gives its name to the input, whatever lies deeper in others.
    taken = {name for name, _, value in given if isinstance(value, Tensor)}
    tensors: dict[str, Any] = {}

    # A tensor becomes the slot of an input, and any other value stays as a constant.
    def slot(value: Any, path: Path) -> Any:
        if not isinstance(value, Tensor):
            _require_constant(value, path)
            return value
        name = path[0] if len(path) == 1 else _free_name(path, taken)
        taken.add(name)
        tensors[name] = value
        return Slot(name)

    entries = []
    for name, kind, value in given:
        entries.append(Argument(name, kind, mapped(value, slot, (name,))))
    return Arguments(tuple(entries)), tensors


def recorded_arguments(record: Any) -> Arguments:
    """Return the arguments that `Arguments.record` has written.

    Raises:
        ValueError: it is no such record.
    """
    if not isinstance(record, list):
        raise ValueError(f"{record!r} is no list of arguments")
    entries = []
    for each in record:
        if not isinstance(each, (list, tuple)) or len(each) != 3:
            raise ValueError(f"{each!r} is no argument")
        name, kind, value = each
        if not isinstance(name, str) or kind not in ("positional", "rest", "keyword"):
            raise ValueError(f"{each!r} is no argument")
        entries.append(Argument(name, kind, _read(value)))
    return Arguments(tuple(entries))


def is_writable(name: str) -> bool:
    """Return whether a method can have an argument of a name."""
    return name.isidentifier() and not keyword.iskeyword(name) and name != "self"


def _given(bound: inspect.BoundArguments) -> Iterator[tuple[str, Kind, Any]]:
    """Yield the name, the kind and the value of each argument of a call.

    What the call left out has the model's own default, and is no argument.
    """
    has_gap = False
    for name, parameter in bound.signature.parameters.items():
        if name not in bound.arguments:
            # Python takes no argument by position behind one that is left out.
            has_gap = True
            continue
        value = bound.arguments[name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            are_several = len(value) > 1
            for i, each in enumerate(value):
                own_name = f"{name}_{i}" if are_several else name
                yield own_name, "rest", each
        elif parameter.kind is parameter.VAR_KEYWORD:
            for own_name, each in value.items():
                yield own_name, "keyword", each
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            yield name, "rest", value
        elif parameter.kind is parameter.KEYWORD_ONLY or has_gap:
            yield name, "keyword", value
        else:
            yield name, "positional", value


def _require_constant(value: Any, path: Path) -> None:
    is_data = isinstance(value, (np.ndarray, PackedSequence)) or holds_data(value)
    if is_data:
        raise InputError(
            f"the input {as_code(path)} is a {type(value).__name__}, whose numbers a cut model "
            "would freeze. Hint: pass a tensor, or lists, tuples and mappings of tensors; or wrap "
            "the model in a module whose forward makes it of tensors"
        )


def _free_name(path: Path, taken: set[str]) -> str:
    """Return a name for the input at a path, "images_left_0", that no other input has."""
    name = re.sub(r"\W", "_", "_".join(map(str, path)))
    while name in taken:
        name += "_"
    return name


def _readings(
    args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[Sequence[Any], Mapping[str, Any]]]:
    """Yield a call as it is, and as others that a loader may have meant.

    A loader yields a list or a mapping both for the arguments of a forward and for a single
    argument of this kind. So `f(a, b)` may mean `f([a, b])`, and `f(a=1)` may mean `f({"a": 1})`,
    and the other way round.
    """
    yield args, kwargs
    if kwargs and args:
        return
    if kwargs:
        yield (kwargs,), {}
        return
    if args:
        yield (list(args),), {}
    if len(args) != 1:
        return
    (only,) = args
    if isinstance(only, list):
        yield only, {}
    if isinstance(only, Mapping) and all(map(_is_name, only)):
        yield (), only


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _match(expected: Any, given: Any, path: Path, found: dict[str, Any]) -> None:
    """Add the inputs in a value to those found.

    Args:
        expected: the argument, or a part of it.
        given: the value in its place.
        path: of both.
        found: the inputs by name; to add to.

    Raises:
        InputError: the value has another structure, or another constant.
    """
    if isinstance(expected, Slot):
        if not isinstance(given, (Tensor, np.ndarray)):
            raise InputError(
                f"{as_code(path)} is a {type(given).__name__}, not a tensor. "
                "Hint: pass a tensor, as the example_input held there"
            )
        found[expected.name] = given
        return
    if not holds_slot(expected):
        _require_same(expected, given, path)
        return
    # Inputs lie deeper in it.
    parts = parts_of(expected) or {}
    given_parts = parts_of(given)
    are_sequences = isinstance(expected, (tuple, list)) and isinstance(given, (tuple, list))
    # The collate function of a loader makes lists of tuples, also of named ones.
    if are_sequences and len(given) == len(parts):
        given_parts = dict(zip(parts, given, strict=True))
    if given_parts is None or given_parts.keys() != parts.keys():
        form = form_in_words(expected)
        raise InputError(
            f"{as_code(path)} is {form_in_words(given)}, but the model was cut for {form}. "
            "Hint: pass the structure that the example_input had"
        )
    for key, part in parts.items():
        _match(part, given_parts[key], (*path, key), found)


def _require_same(constant: Any, given: Any, path: Path) -> None:
    try:
        is_same = given is constant or bool(given == constant)
    except Exception:  # a tensor, for example, compares to many truth values
        is_same = False
    if not is_same:
        what = f"a {type(given).__name__}" if holds_data(given) else repr(given)
        raise InputError(
            f"{as_code(path)} is {what}, but the model was cut for {constant!r}. "
            "Hint: cut another one for this value"
        )


def _is_plain(value: Any) -> bool:
    """Return whether JSON has a form for a constant."""
    return value is None or isinstance(value, (bool, int, float, str))


def _recorded(value: Any) -> Any:
    """Return a value of an argument in lists, numbers and strings.

    Raises:
        TypeError: it holds anything else.
    """
    if isinstance(value, Slot):
        return {"input": value.name}
    if _is_plain(value):
        return {"constant": value}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_recorded(part) for part in value]}
    if type(value) is dict and all(map(_is_name, value)):
        return {"dict": {key: _recorded(part) for key, part in value.items()}}
    raise TypeError(f"a {type(value).__name__} cannot be recorded")


def _read(record: Any) -> Any:
    """Return a value that `_recorded` has written.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(record, Mapping) or len(record) != 1:
        raise ValueError(f"{record!r} is no value of an argument")
    ((kind, content),) = record.items()
    if kind == "input" and isinstance(content, str):
        return Slot(content)
    if kind == "constant" and _is_plain(content):
        return content
    if kind in ("list", "tuple") and isinstance(content, (list, tuple)):
        parts = [_read(part) for part in content]
        return parts if kind == "list" else tuple(parts)
    if kind == "dict" and isinstance(content, Mapping):
        return {key: _read(part) for key, part in content.items()}
    raise ValueError(f"{record!r} is no value of an argument")
