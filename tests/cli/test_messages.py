"""How a command ends: by itself, by Ctrl-C, or because nobody reads what it prints."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from sffx.cli.messages import exit_code
from sffx.errors import InputError


def ends(error: BaseException) -> int:
    def work() -> None:
        raise error

    return exit_code("sffx-viz", work)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("num_classes is 7. Hint: leave num_classes out"), 2, "--classes is 7. Hint: "),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_is_a_line_and_a_code(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ends(error) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sffx-viz: {message}")


def test_an_error_of_sffx_itself_is_shown_whole() -> None:
    with pytest.raises(ZeroDivisionError):
        ends(ZeroDivisionError())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_stdout_cannot_encode_is_no_error(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    out = io.TextIOWrapper(written, encoding)
    monkeypatch.setattr(sys, "stdout", out)
    assert exit_code("sffx-viz", lambda: print("layer1.0 … 日本")) == 0
    expected = "layer1.0 … 日本" if encoding == "utf-8" else "layer1.0 ? ??"
    assert written.getvalue().decode(encoding) == f"{expected}\n"
    assert out.errors == "strict"


def test_a_pipe_that_is_closed_early_is_no_traceback() -> None:
    code = "from sffx.cli.messages import exit_code; exit(exit_code('x', lambda: print('y' * 99)))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
