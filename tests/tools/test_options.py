"""Commands check their options before they work for hours."""

from __future__ import annotations

import importlib

import pytest


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("bench.__main__", "--rounds 1", "--rounds takes 2 or more, or 0 to count only"),
        ("bench.__main__", "--rounds -1", "from 0 on, not -1"),
        ("bench.__main__", "--rounds 0 --parts family", "these parts are times: family"),
        ("bench.__main__", "--rounds 0 --device cuda", "leave out --device cuda"),
        ("bench.__main__", "--time local step", "lacks BP"),
        ("bench.__main__", "--only resnet19", "no workload has 'resnet19' in its name"),
        ("int8", "--epochs 0", "from 1 on, not 0"),
        ("int8", "--seeds none", "from 1 on, not none"),
        ("pipeline", "--rounds 0", "from 1 on, not 0"),
        ("pipeline", "--batches 0", "from 1 on, not 0"),
        ("pipeline", "--model resnet19", "invalid choice: 'resnet19'"),
        ("pipeline", "--model resnet18", "name another folder by --out"),
        ("replicas", "--rounds 0", "from 1 on, not 0"),
        ("replicas", "--steps 0", "from 1 on, not 0"),
        ("replicas", "--processes 1", "from 2 on, not 1"),
        ("reproduce.__main__", "--seeds 0", "from 1 on, not 0"),
        ("reproduce.__main__", "depth-1 --epochs 0", "from 1 on, not 0"),
        ("reproduce.__main__", "depth-1 --trials 0", "from 1 on, not 0"),
        ("reproduce.__main__", "depth-1 --trial-epochs 0", "from 1 on, not 0"),
        ("reproduce.scff", "--probe-epochs 0", "from 1 on, not 0"),
        ("scaling", "--rounds 0", "from 1 on, not 0"),
        ("zoo.__main__", "--jobs 0", "from 1 on, not 0"),
    ],
)
def test_what_would_fail_later_is_refused_at_once(
    tool: str,
    arguments: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = importlib.import_module(f"tools.{tool}")
    monkeypatch.setattr("sys.argv", [tool, *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
