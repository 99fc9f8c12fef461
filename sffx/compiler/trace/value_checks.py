"""Checks of values in a forward, which a trace leaves out.

    assert torch.isfinite(x).all()
    if (lengths == 0).any():
        raise ValueError("an empty sequence")

A graph cannot branch on the values of a tensor. But one side of such a branch computes nothing: it
raises, or it only prints. So a trace goes the other way, and the plan names the check.
"""

from __future__ import annotations

import ast
import dis
import linecache
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias, TypeGuard

import torch

from sffx.compiler.trace.listed import READS_A_NUMBER
from sffx.errors import PACKAGE, is_foreign

# A proxy is asked for its truth value by their code.
_FOLDERS_OF_PROXIES = (PACKAGE, str(Path(torch.fx.__file__).parent))

# A line and a column, and those where it ends.
Place: TypeAlias = tuple[tuple[int, int], tuple[int, int]]

_Statement: TypeAlias = ast.If | ast.Assert | ast.Try | ast.With

# What a branch may call that changes no value.
_REPORTS = (
    *("print", "warn", "warning", "warning_once", "debug", "info", "error", "exception"),
    "critical",
)


class ValueChecks:
    """The checks that a trace has left out.

    Attributes:
        left_out: where they stand, with their code.
    """

    def __init__(self) -> None:
        self.left_out: dict[str, str] = {}

    def outcome(self) -> bool | None:
        """Return the outcome of the condition that the model asks for now, at which it goes on.

        Returns:
            None if it is the condition of another branch, or if code catches what the check raises.
        """
        frame = _frame_of_model()
        if frame is None:
            return None
        check = _check_at(frame)
        if check is None or any(_is_in_try(each) for each in _frames_of_model(frame)):
            return None
        place_asked = _place_asked(frame)
        if place_asked is None and _shares_its_line(check, frame):
            return None
        outcome = _outcome(check, place_asked)
        if outcome is not None:
            place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
            self.left_out[place] = ast.unparse(check.test)
        return outcome


class Passed:
    """A number in the condition of a check, `x.max().item()`, whose value is not known.

    What is computed of it or compared with it is not known either, and has the outcome at which the
    model goes on.

    Args:
        outcome: that one.
    """

    def __init__(self, outcome: bool) -> None:
        self._outcome = outcome

    def __bool__(self) -> bool:
        return self._outcome

    def __float__(self) -> float:
        raise RuntimeError(READS_A_NUMBER)

    def _same(self, *_: Any) -> Passed:
        return self

    __lt__ = __le__ = __gt__ = __ge__ = __add__ = __radd__ = __sub__ = __rsub__ = _same
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __pow__ = __neg__ = __abs__ = _same
    __eq__: Any = _same
    __ne__: Any = _same
    __hash__: Any = None


def _frame_of_model() -> FrameType | None:
    """Return the frame of the code that asked a proxy for its truth value."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(_FOLDERS_OF_PROXIES):
        frame = frame.f_back
    return frame


def _check_at(frame: FrameType) -> ast.If | ast.Assert | None:
    """Return the innermost statement whose condition is computed in a frame, if it is a check."""
    found: ast.If | ast.Assert | None = None
    for node in _statements(frame.f_code.co_filename):
        if not isinstance(node, (ast.If, ast.Assert)):
            continue
        # An interpreter may be at the first line of the statement.
        if not node.lineno <= frame.f_lineno <= (node.test.end_lineno or node.lineno):
            continue
        if found is None or node.lineno >= found.lineno:
            found = node
    return found


def _outcome(check: ast.If | ast.Assert, place: Place | None) -> bool | None:
    """Return the outcome of the part of a check that is asked for, at which the model goes on.

    Args:
        check: the statement.
        place: of the part, None where it is not known.

    Returns:
        None if it is no check, or if it is not known which part is asked, and it matters.
    """
    if isinstance(check, ast.Assert):
        wanted = True
    elif _computes_nothing(check.body):
        wanted = False
    elif check.orelse and _computes_nothing(check.orelse):
        wanted = True
    else:
        return None
    parts = dict(_parts(check.test, wanted))
    for part, outcome in parts.items():
        if _holds(part, place):
            return outcome
    # All of them may want the same, so that it makes no difference.
    is_inside = place is None or _begins(check, place)
    outcomes = set(parts.values())
    if is_inside and len(outcomes) == 1:
        return outcomes.pop()
    return None


def _parts(condition: ast.expr, wanted: bool) -> Iterator[tuple[ast.expr, bool]]:
    """Yield the parts of a condition, each with the outcome that gives it the wanted one."""
    if isinstance(condition, ast.UnaryOp) and isinstance(condition.op, ast.Not):
        yield from _parts(condition.operand, not wanted)
    elif isinstance(condition, ast.BoolOp):
        for part in condition.values:
            yield from _parts(part, wanted)
    else:
        yield condition, wanted


def _place_asked(frame: FrameType) -> Place | None:
    """Return where in its file a frame has just computed what it asks, None if it is not known."""
    if sys.version_info < (3, 11):
        return None
    code = frame.f_code
    current = frame.f_lasti // 2
    positions = list(code.co_positions())[: current + 1]
    if _asks(dis.opname[code.co_code[frame.f_lasti]]):
        # It may stand for the whole statement. What it asks was computed right before.
        positions.pop()
    line, end_line, column, end_column = positions[-1]
    if line is None or end_line is None or column is None or end_column is None:
        return None
    return (line, column), (end_line, end_column)


def _asks(instruction: str) -> bool:
    """Return whether an instruction only asks for the truth value of what was computed."""
    return "JUMP" in instruction or instruction in ("TO_BOOL", "UNARY_NOT")


def _holds(part: ast.expr, place: Place | None) -> bool:
    """Return whether what ends at a place belongs to a part of a condition."""
    if place is None:
        return False
    begin = (part.lineno, part.col_offset)
    end = (part.end_lineno or part.lineno, part.end_col_offset or 0)
    return begin < place[1] <= end


def _begins(check: ast.If | ast.Assert, place: Place) -> bool:
    """Return whether a place begins where a check does.

    The code of an assertion that pytest has rewritten has the place of the whole statement.
    """
    return place[0] == (check.lineno, check.col_offset)


def _shares_its_line(check: ast.If | ast.Assert, frame: FrameType) -> bool:
    """Return whether another statement may stand on the lines of a condition."""
    lines = linecache.getlines(frame.f_code.co_filename)
    return any(";" in line for line in lines[check.lineno - 1 : check.test.end_lineno])


def _computes_nothing(statements: list[ast.stmt]) -> bool:
    """Return whether statements end in an error, or only report something."""
    if isinstance(statements[-1], ast.Raise):
        return True
    return all(_reports(each) for each in statements)


def _reports(statement: ast.stmt) -> bool:
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Call):
        return False
    function = statement.value.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in _REPORTS


def _is_in_try(frame: FrameType) -> bool:
    """Return whether the code that runs in a frame would catch an error."""
    for node in _statements(frame.f_code.co_filename):
        if not _catches(node):
            continue
        first, last = node.body[0].lineno, node.body[-1].end_lineno or 0
        if first <= frame.f_lineno <= last:
            return True
    return False


def _catches(node: ast.stmt) -> TypeGuard[ast.Try | ast.With]:
    if isinstance(node, ast.With):
        return any("suppress" in ast.unparse(item.context_expr) for item in node.items)
    return isinstance(node, ast.Try) and bool(node.handlers)


def _frames_of_model(frame: FrameType) -> Iterator[FrameType]:
    """Yield a frame and those of the model's code above it, up to the call by the trace."""
    each: FrameType | None = frame
    while each is not None and not _calls_the_model(each):
        if not is_foreign(each.f_code.co_filename):
            yield each
        each = each.f_back


def _calls_the_model(frame: FrameType) -> bool:
    # Further up stands the code that cuts the model, which may well catch errors.
    return frame.f_code.co_name == "trace" and frame.f_code.co_filename.startswith(PACKAGE)


def _statements(filename: str) -> tuple[_Statement, ...]:
    """Return the statements of a file that check or catch, none where its source is not known."""
    return _statements_of("".join(linecache.getlines(filename)))


@lru_cache(maxsize=16)
def _statements_of(source: str) -> tuple[_Statement, ...]:
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a cell of a notebook with a magic command
        return ()
    kinds = (ast.If, ast.Assert, ast.Try, ast.With)
    return tuple(node for node in ast.walk(tree) if isinstance(node, kinds))
