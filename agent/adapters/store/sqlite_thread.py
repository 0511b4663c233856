"""One thread that owns one SQLite connection: a bounded queue of jobs, whose results return to the event loop.

The loop never touches the disk. A job that misses its deadline before it starts is dropped; one that has started runs
to its end in the thread, so its outcome is final before the next job starts.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from agent.adapters.store.schema import migrate
from agent.core.errors import UnavailableError

T = TypeVar("T")

_STORAGE_ERRORS = (sqlite3.Error, OSError, ValueError, msgspec.MsgspecError)


@dataclass(frozen=True, slots=True)
class StoreHealth:
    """Whether the last job succeeded. `failures` counts consecutive failures, `message` is the last one's."""

    ok: bool
    failures: int = 0
    message: str = ""


def store_failed(path: Path, problem: str) -> UnavailableError:
    """The one error of a store, with its fix."""
    return UnavailableError(
        "STORE_FAILED",
        f"the store {path} failed: {problem}. Check the disk's space and health; a damaged file can be moved away, "
        "which forgets its instances and the usage that was not uploaded yet",
        path=str(path),
    )


@dataclass(frozen=True, slots=True)
class _Job:
    future: Future[Any]
    work: Callable[[sqlite3.Connection], Any]
    durable: bool


class StoreThread:
    """Runs jobs on the connection, one after the other. Opens it at the first job and again after every failure."""

    def __init__(self, path: Path, *, deadline_s: float, queue_length: int, max_bytes: int) -> None:
        self.path = path
        self.health = StoreHealth(ok=True)
        self._deadline_s = deadline_s
        self._max_bytes = max_bytes
        self._jobs: queue.Queue[_Job | None] = queue.Queue(queue_length)
        self._connection: sqlite3.Connection | None = None
        self._ended = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="node-store", daemon=True)
        self._thread.start()

    async def run(self, work: Callable[[sqlite3.Connection], T], *, durable: bool = False) -> T:
        """Run `work` in its own transaction and return its result.

        `durable` waits until it is on disk; otherwise it survives the process, perhaps not the machine. Raises
        UnavailableError STORE_FAILED on any failure, a full queue or the deadline: the outcome is then unknown, and
        repeating the job must be harmless.
        """
        if self._closing:
            raise self._failed("it is closed")
        future: Future[T] = Future()
        try:
            self._jobs.put_nowait(_Job(future, work, durable))
        except queue.Full:
            raise self._failed(f"{self._jobs.maxsize} jobs already wait for the disk") from None
        try:
            async with asyncio.timeout(self._deadline_s):
                result = await asyncio.wrap_future(future)
        except TimeoutError:
            raise self._failed(f"no answer from the disk within {self._deadline_s:g} s") from None
        except _STORAGE_ERRORS as error:
            raise self._failed(str(error)) from error
        self.health = StoreHealth(ok=True)
        return result

    async def close(self) -> None:
        """Finish the queued jobs, close the file, end the thread; give up after the deadline. Idempotent."""
        self._closing = True
        with suppress(queue.Full):
            self._jobs.put_nowait(None)
        await asyncio.to_thread(self._ended.wait, self._deadline_s)

    def _failed(self, problem: str) -> UnavailableError:
        self.health = StoreHealth(ok=False, failures=self.health.failures + 1, message=problem)
        return store_failed(self.path, problem)

    # ---- in the thread -------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if job.future.set_running_or_notify_cancel():
                self._answer(job)
            del job
        self._disconnect()
        self._ended.set()

    def _answer(self, job: _Job) -> None:
        try:
            connection = self._connection or self._connect()
            # Can't be changed inside a transaction, so it is set before each.
            connection.execute(f"PRAGMA synchronous = {'FULL' if job.durable else 'NORMAL'}")
            connection.execute("BEGIN IMMEDIATE")
            result = job.work(connection)
            connection.execute("COMMIT")
        except BaseException as error:
            # A new connection is free of a half-done transaction or a replaced file.
            self._disconnect()
            job.future.set_exception(error)
        else:
            job.future.set_result(result)

    def _connect(self) -> sqlite3.Connection:
        # Holds the environment of functions: owner only, even after a copy from a backup. -wal and -shm follow.
        database = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.fchmod(database, 0o600)
        os.close(database)
        connection = sqlite3.connect(self.path, timeout=self._deadline_s, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            if self._max_bytes:
                (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
                connection.execute(f"PRAGMA max_page_count = {max(1, self._max_bytes // page_bytes)}")
            migrate(connection)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()
