"""Wait for other processes, and name the one that failed, ended or hangs.

A process that waits for a message would wait for ever if the sender is gone, and torch's own error
names a socket and not a rank. So the ranks of a pipeline leave notes for each other in the store of
the process group: the first failure, and who waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from datetime import timedelta
from queue import SimpleQueue
from typing import Any, TypeVar

import torch.distributed as dist

from sffx.errors import ProcessError

T = TypeVar("T")

# Seconds between two looks at the notes of other ranks.
POLL = 0.5
# Seconds between two looks whether all ranks are there.
_MEETING_POLL = 0.02
# Seconds that a rank has to leave a note on its failure, once its connections are closed.
GRACE = 1.5

_FAILURE = "failure"


class Watch:
    """Waits for other ranks, and raises a `ProcessError` that names the rank at fault.

    Waiting is done by a thread, since torch's own wait cannot be interrupted, and closes the
    connection when its time is over.

    Args:
        store: shared by all ranks.
        names: of all ranks, "rank 1 (block_3 to block_5)", by the rank.
        rank: of this process.
        timeout: after which a rank that everybody waits for counts as hanging.

    Attributes:
        names: as above.
        waited: seconds that this process has waited, in total.
    """

    def __init__(
        self, store: dist.Store, names: dict[int, str], rank: int, timeout: timedelta
    ) -> None:
        self._store = store
        self.names = names
        self._rank = rank
        self._timeout = timeout
        self._tasks: SimpleQueue[tuple[Callable[[], Any], futures.Future[Any]]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self.waited = 0.0

    def meet(self) -> None:
        """Wait until all ranks are here, before there are connections.

        Raises:
            ProcessError: a rank failed before, ended or hangs.
        """
        self._note_status("waits")
        start = time.monotonic()
        # A rank leaves its first note when it comes here.
        expected = [self._status_of(rank) for rank in self.names]
        while not self._has_notes(expected):
            self._raise_failure()
            self._raise_if_over(start)
            time.sleep(_MEETING_POLL)
        self._note_status("runs")
        self.waited += time.monotonic() - start

    def wait(self, works: Sequence[dist.Work], peer: int | None = None) -> None:
        """Wait until messages from or to a rank are complete.

        Args:
            works: what torch returned for the messages.
            peer: the other rank, None for all.

        Raises:
            ProcessError: a rank failed, ended or hangs.
        """

        def complete() -> None:
            for work in works:
                work.wait()

        self.call(complete, peer)

    def call(self, function: Callable[[], T], peer: int | None = None) -> T:
        """Return what a function returns that waits for other ranks, such as a collective.

        Args:
            function: that waits.
            peer: the rank that it waits for, None for all.

        Raises:
            ProcessError: a rank failed, ended or hangs.
        """
        future = self._started(function)
        start = time.monotonic()
        # A note costs a message, so a short wait leaves none.
        has_noted = False
        while not futures.wait([future], timeout=POLL).done:
            if not has_noted:
                self._note_status("waits")
                has_noted = True
            self._raise_failure()
            self._raise_if_over(start)
        if has_noted:
            self._note_status("runs")
        self.waited += time.monotonic() - start
        try:
            return future.result()
        except RuntimeError as error:
            raise self._explained(error, peer) from error

    @contextmanager
    def naming(self, peer: int) -> Iterator[None]:
        """Name a rank if torch raises an error while a message to or from it is begun."""
        try:
            yield
        except RuntimeError as error:
            raise self._explained(error, peer) from error

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Leave a note for the other ranks if this one fails inside the context."""
        try:
            yield
        except ProcessError:
            raise
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            self._note_failure(f"{self.names[self._rank]} failed: {reason}")
            raise

    def _started(self, function: Callable[[], T]) -> futures.Future[T]:
        if self._thread is None:
            # A daemon, so that a wait that never ends does not keep the process alive.
            self._thread = threading.Thread(target=self._run, daemon=True, name="sffx pipeline")
            self._thread.start()
        future: futures.Future[T] = futures.Future()
        self._tasks.put((function, future))
        return future

    def _run(self) -> None:
        while True:
            function, future = self._tasks.get()
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
            # The function holds tensors that were sent or received.
            del function, future

    def _explained(self, error: RuntimeError, peer: int | None) -> ProcessError:
        """Return the error that says why a connection broke.

        A rank that fails closes its connections, and its note may come after that.
        """
        end = time.monotonic() + GRACE
        while time.monotonic() < end:
            failure = self._read(_FAILURE)
            if failure:
                return _error(failure)
            time.sleep(0.05)
        gone = "another rank" if peer is None else self.names[peer]
        failure = f"{gone} ended, or its connection broke, without an error of its own: {error}"
        self._note_failure(failure)
        return _error(failure)

    def _raise_failure(self) -> None:
        """Raise a ProcessError if a rank has left a note that it failed."""
        failure = self._read(_FAILURE)
        if failure:
            raise _error(failure)

    def _raise_if_over(self, start: float) -> None:
        """Raise a ProcessError that names the ranks that hang if the time to wait is over."""
        if time.monotonic() - start <= self._timeout.total_seconds():
            return
        hanging = []
        for rank, name in self.names.items():
            if self._read(self._status_of(rank)) != "waits":
                hanging.append(name)
        seconds = self._timeout.total_seconds()
        failure = f"the other ranks have waited for {seconds:g} s: {', '.join(hanging)} hangs"
        if not hanging:
            failure = f"all ranks have waited for {seconds:g} s for each other"
        self._note_failure(failure)
        raise _error(failure)

    def _note_failure(self, failure: str) -> None:
        """Leave a note of a failure, unless there is one: the first one is the cause."""
        try:
            self._store.compare_set(_FAILURE, "", failure)
        except RuntimeError:
            return  # the process with the store is gone

    def _note_status(self, status: str) -> None:
        """Leave a note on what this rank does: it "waits" for others, or "runs"."""
        try:
            self._store.set(self._status_of(self._rank), status)
        except RuntimeError:
            return  # the process with the store is gone

    def _has_notes(self, keys: list[str]) -> bool:
        try:
            return bool(self._store.check(keys))
        except RuntimeError as error:
            raise self._explained(error, None) from error

    def _read(self, key: str) -> str:
        """Return a note, "" where there is none."""
        try:
            # Without this check, reading waits until somebody writes.
            if not self._store.check([key]):
                return ""
            return self._store.get(key).decode()
        except RuntimeError:
            return ""  # the process with the store is gone

    @staticmethod
    def _status_of(rank: int) -> str:
        return f"status of {rank}"


def _error(failure: str) -> ProcessError:
    return ProcessError(
        f"{failure}. Hint: mend the cause, start all ranks again, and resume from a checkpoint"
    )
