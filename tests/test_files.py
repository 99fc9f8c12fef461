"""Files appear whole or not at all, whatever fails. The faults are real ones."""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sffx import files
from sffx.errors import ExportError, InputError
from sffx.files import (
    as_path,
    present_folder,
    require_folder_of,
    write,
    writing,
    writing_folder,
)

OLD = b"the old file"
SUPERUSER = os.geteuid() == 0


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    path = tmp_path / "net.bin"
    path.write_bytes(OLD)
    return path


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file can grow beyond 4 KiB: a write fails half way, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def assert_untouched(path: Path) -> None:
    assert path.read_bytes() == OLD
    assert os.listdir(path.parent) == [path.name]


def test_a_new_file_has_the_content_and_the_mode_of_any_new_file(tmp_path: Path) -> None:
    write(tmp_path / "net.bin", b"new")
    (tmp_path / "beside").touch()
    assert (tmp_path / "net.bin").read_bytes() == b"new"
    assert (tmp_path / "net.bin").stat().st_mode == (tmp_path / "beside").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["beside", "net.bin"]


def test_a_path_may_be_a_string_relative_to_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write("net.bin", memoryview(b"new"))
    assert (tmp_path / "net.bin").read_bytes() == b"new"


def test_the_old_file_is_there_until_the_new_one_is_whole(old_file: Path) -> None:
    with writing(old_file) as draft:
        draft.write_bytes(b"new")
        assert old_file.read_bytes() == OLD
        assert draft.name == old_file.name
    assert old_file.read_bytes() == b"new"
    assert os.listdir(old_file.parent) == [old_file.name]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
def test_the_mode_of_the_old_file_is_kept(old_file: Path, mode: int) -> None:
    old_file.chmod(mode)
    write(old_file, b"new")
    assert old_file.read_bytes() == b"new"
    assert stat.S_IMODE(old_file.stat().st_mode) == mode


@pytest.mark.parametrize("exists", [True, False])
def test_a_symbolic_link_stays_and_its_file_is_replaced(tmp_path: Path, *, exists: bool) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    target, link = folder / "net.bin", tmp_path / "link"
    if exists:
        target.write_bytes(OLD)
    link.symlink_to(target)
    write(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert os.listdir(folder) == ["net.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_half_way_leaves_the_old_file(
    old_file: Path, error: type[BaseException]
) -> None:
    def interrupted() -> None:
        with writing(old_file) as draft:
            draft.write_bytes(b"half")
            draft.with_name("beside").write_bytes(b"more")
            raise error

    with pytest.raises(error):
        interrupted()
    assert_untouched(old_file)


@pytest.mark.usefixtures("small_files")
def test_a_failed_write_leaves_the_old_file(old_file: Path) -> None:
    with pytest.raises(
        ExportError, match=r"cannot write '.*net\.bin': File too large\. Hint: is the disk full\?"
    ):
        write(old_file, bytes(10_000))
    assert_untouched(old_file)


@pytest.mark.usefixtures("small_files")
def test_a_failed_write_of_torch_leaves_the_old_file(old_file: Path) -> None:
    # torch turns it into a RuntimeError that does not say so.
    with (
        pytest.raises(ExportError, match=r"cannot write '.*net\.bin': File too large"),
        writing(old_file) as draft,
        draft.open("wb") as file,
    ):
        torch.save(torch.zeros(10_000), file)
    assert_untouched(old_file)


def test_a_failed_rename_leaves_the_old_file(
    old_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ExportError, match=r"cannot write '.*net\.bin': No space left on device"):
        write(old_file, b"new")
    assert_untouched(old_file)


def test_the_data_is_on_the_disk_before_the_rename(
    old_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(old_file.read_bytes()))
    write(old_file, b"new")
    assert seen == [OLD]


def test_an_error_about_another_file_is_not_one_of_writing(old_file: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no_image"), writing(old_file):
        Path("no_image.png").read_bytes()
    assert_untouched(old_file)


def test_other_errors_of_torch_are_not_of_writing(old_file: Path) -> None:
    with pytest.raises(RuntimeError, match="size"), writing(old_file):
        torch.zeros(2) + torch.zeros(3)
    assert_untouched(old_file)


def test_a_draft_that_nobody_wrote_is_an_error(old_file: Path) -> None:
    with pytest.raises(ExportError, match="No such file"), writing(old_file):
        pass
    assert_untouched(old_file)


def test_a_named_pipe_is_written_through(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    write(pipe, b"new" * 100_000)
    reader.join()
    assert received == [b"new" * 100_000]
    assert pipe.is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]


def test_the_standard_output_is_written_through(tmp_path: Path) -> None:
    code = "from sffx.files import write; write('/dev/stdout', b'new')"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"new"


def test_a_device_stays_a_device() -> None:
    write("/dev/null", b"new")
    assert Path("/dev/null").is_char_device()


def test_a_full_device_is_an_error() -> None:
    with pytest.raises(ExportError, match=r"cannot write '/dev/full': No space left on device"):
        write("/dev/full", b"new")
    assert Path("/dev/full").is_char_device()


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"it is a directory\. Hint: name a file in it"):
        write(tmp_path, b"new")
    assert os.listdir(tmp_path) == []


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"the directory '.*nowhere' does not exist\. Hint: create it first"
    ):
        write(tmp_path / "nowhere" / "net.bin", b"new")


@pytest.mark.parametrize("name", ["file/net.bin", "loop", "nul\0", "n" * 300])
def test_a_path_where_nothing_can_be_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    problem = r"(cannot write to '.*'|a name in the path is too long): .*\. Hint: "
    with pytest.raises(InputError, match=problem):
        write(tmp_path / name, b"new")
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


def test_a_directory_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    # The superuser writes everywhere but in /proc.
    directory = Path("/proc") if SUPERUSER else tmp_path
    tmp_path.chmod(0o500)
    with pytest.raises(
        InputError, match=rf"cannot write to the directory '{directory}': .*\. Hint: choose another"
    ):
        write(directory / "net.bin", b"new")
    assert os.listdir(tmp_path) == []


def test_a_path_in_a_folder_that_this_user_may_not_enter_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, *_: object, **__: object) -> os.stat_result:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "stat", refuse)  # the superuser may enter every folder
    problem = r"cannot tell what lies at '.*net\.bin': Permission denied\. Hint: may this user"
    for ask in (as_path, require_folder_of):
        with pytest.raises(InputError, match=problem):
            ask(tmp_path / "net.bin")


@pytest.fixture
def old_folder(tmp_path: Path) -> Path:
    path = tmp_path / "net"
    path.mkdir()
    (path / "old.bin").write_bytes(OLD)
    return path


def test_a_new_folder_replaces_the_old_one_with_its_mode(old_folder: Path) -> None:
    old_folder.chmod(0o750)
    with writing_folder(old_folder) as new:
        (new / "net.bin").write_bytes(b"new")
        assert os.listdir(old_folder) == ["old.bin"]
    assert os.listdir(old_folder) == ["net.bin"]
    assert stat.S_IMODE(old_folder.stat().st_mode) == 0o750
    assert os.listdir(old_folder.parent) == ["net"]


def test_a_folder_appears_where_there_was_none(tmp_path: Path) -> None:
    with writing_folder(tmp_path / "net") as new:
        (new / "net.bin").write_bytes(b"new")
        assert not (tmp_path / "net").exists()
    assert (tmp_path / "net" / "net.bin").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["net"]


@pytest.mark.usefixtures("small_files")
def test_a_failed_write_leaves_the_old_folder(old_folder: Path) -> None:
    with (
        pytest.raises(ExportError, match=r"cannot write '.*net': File too large"),
        writing_folder(old_folder) as new,
    ):
        (new / "net.bin").write_bytes(bytes(10_000))
    assert (old_folder / "old.bin").read_bytes() == OLD
    assert os.listdir(old_folder.parent) == ["net"]


def test_a_failed_exchange_leaves_the_old_folder(
    old_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace
    monkeypatch.setattr(files, "_swap", lambda one, other: False)

    def full(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with (
        pytest.raises(ExportError, match=r"cannot write '.*net': No space left on device"),
        writing_folder(old_folder) as new,
    ):
        (new / "net.bin").write_bytes(b"new")
    assert (old_folder / "old.bin").read_bytes() == OLD
    assert os.listdir(old_folder.parent) == ["net"]


def test_a_file_is_no_folder(old_file: Path) -> None:
    with (
        pytest.raises(InputError, match=r"it is a file\. Hint: name a folder"),
        writing_folder(old_file),
    ):
        pass
    assert_untouched(old_file)


def test_a_pipe_that_nobody_reads_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match=r"nobody reads this pipe\. Hint: start the reader first"):
        write(pipe, b"content")
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def swap_is_possible(folder: Path) -> bool:
    one = folder / "one"
    other = folder / "other"
    one.mkdir()
    other.mkdir()
    possible = files._swap(one, other)
    one.rmdir()
    other.rmdir()
    return possible


def test_at_every_moment_a_folder_is_in_its_place(old_folder: Path, tmp_path: Path) -> None:
    if not swap_is_possible(tmp_path):
        pytest.skip("this file system cannot exchange two folders")
    missing = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            if not old_folder.exists():
                missing.append(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for i in range(50):
        with writing_folder(old_folder) as new:
            (new / f"{i}.bin").write_bytes(b"new")
    stop.set()
    watcher.join()
    assert not missing
    assert os.listdir(old_folder) == ["49.bin"]
    assert os.listdir(tmp_path) == ["net"]


def test_where_folders_cannot_be_exchanged_two_renames_do_it(
    old_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_swap", lambda one, other: False)
    with writing_folder(old_folder) as new:
        (new / "net.bin").write_bytes(b"new")
    assert os.listdir(old_folder) == ["net.bin"]
    assert os.listdir(old_folder.parent) == ["net"]


def test_between_two_renames_a_reader_finds_the_old_folder(
    old_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_swap", lambda one, other: False)
    replace = os.replace
    seen = []

    def watched(source: Path, target: Path) -> None:
        replace(source, target)
        place = present_folder(old_folder)
        seen.append((place == old_folder, sorted(os.listdir(place))))

    monkeypatch.setattr(os, "replace", watched)
    with writing_folder(old_folder) as new:
        (new / "net.bin").write_bytes(b"new")
    assert seen == [(False, ["old.bin"]), (True, ["net.bin"])]
    nowhere = old_folder.with_name("nowhere")
    assert present_folder(nowhere) == nowhere


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from sffx import files

kind, path, moment = sys.argv[1:]
if moment == "renamed":  # after the first of two renames
    files._swap = lambda one, other: False
    replace = os.replace
    def killing(one, other):
        replace(one, other)
        os.kill(os.getpid(), signal.SIGKILL)
    os.replace = killing
with getattr(files, kind)(path) as draft:
    (draft / "new.bin" if draft.is_dir() else draft).write_bytes(b"half")
    if moment == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
    if moment == "alive":
        print(draft.parent, flush=True)
        sys.stdin.read()
"""


def start_writer(kind: str, path: Path, moment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", KILLED_WRITER, kind, str(path), moment]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


@pytest.mark.parametrize("kind", ["writing", "writing_folder"])
def test_drafts_of_killed_processes_are_removed_by_the_next(tmp_path: Path, kind: str) -> None:
    for _ in range(2):
        with start_writer(kind, tmp_path / "net", "writing") as process:
            process.wait()
    assert os.listdir(tmp_path) != []
    write(tmp_path / "other.bin", b"new")
    assert os.listdir(tmp_path) == ["other.bin"]


def test_hidden_folders_of_others_stay(tmp_path: Path) -> None:
    own = tmp_path / ".sffx-cache" / "run.pt"
    own.parent.mkdir()
    own.write_bytes(OLD)
    write(tmp_path / "other.bin", b"new")
    assert own.read_bytes() == OLD


def test_drafts_of_living_processes_stay(tmp_path: Path) -> None:
    with start_writer("writing", tmp_path / "net.bin", "alive") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        draft = Path(process.stdout.readline().strip())
        write(tmp_path / "other.bin", b"new")
        assert draft.is_dir()
        process.stdin.close()
    assert (tmp_path / "net.bin").read_bytes() == b"half"


def test_a_folder_that_was_moved_aside_is_never_removed(old_folder: Path) -> None:
    with start_writer("writing_folder", old_folder, "renamed") as process:
        process.wait()
    assert not old_folder.exists()
    write(old_folder.with_name("other.bin"), b"new")
    aside = list(old_folder.parent.glob(".sffx-draft-*/old/net/old.bin"))
    assert [path.read_bytes() for path in aside] == [OLD]
    # A reader finds it there, and the next writer clears it away.
    assert (present_folder(old_folder) / "old.bin").read_bytes() == OLD
    with writing_folder(old_folder) as new:
        (new / "net.bin").write_bytes(b"new")
    assert present_folder(old_folder) == old_folder
    write(old_folder.with_name("other.bin"), b"newer")
    assert list(old_folder.parent.glob(".sffx-*")) == []
