"""The thread that runs all statements on a database: one writer, and a deadline for every call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import sqlalchemy as sa

from agent.core.errors import ExhaustedError, UnavailableError
from agent.scheduler.database.engine import failed

_T = TypeVar("_T")


class DatabaseThread:
    """Runs functions, which use `engine`, in a thread of their own, one after the other."""

    def __init__(
        self,
        engine: sa.Engine,
        name: str,
        subject: str,
        deadline_s: float,
        *,
        timeout_hint: str = "",
        queue_length: int | None = None,
    ) -> None:
        """`name`: of the thread. `subject`, `timeout_hint`: for error messages. `queue_length`: how many calls may wait
        or run; None for any number."""
        self.engine = engine
        self.deadline_s = deadline_s
        self.executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._subject = subject
        self._timeout_hint = timeout_hint
        self._queue_length = queue_length
        self._jobs: list[Future[Any]] = []

    async def run(self, work: Callable[[], _T], *, unsure: str = "") -> _T:
        """Run `work` in the thread. A call that misses its deadline before its turn does not run at all.

        Raises UnavailableError STORE_FAILED, to which `unsure` is added where a write may have happened nevertheless;
        ExhaustedError USAGE_BUSY if `queue_length` calls are open.
        """
        self._jobs = [job for job in self._jobs if not job.done()]
        if self._queue_length is not None and len(self._jobs) >= self._queue_length:
            text = f"{len(self._jobs)} usage calls are waiting for the database; try later"
            raise ExhaustedError("USAGE_BUSY", text)
        job = self.executor.submit(work)
        self._jobs.append(job)
        try:
            async with asyncio.timeout(self.deadline_s):
                return await asyncio.wrap_future(job)
        except TimeoutError:
            began = not job.cancel()
            problem = f"no answer within {self.deadline_s:g} s{self._timeout_hint}"
            raise self._failed(problem, unsure if began else "") from None
        except (sa.exc.SQLAlchemyError, OSError) as error:
            # A connection that broke may have done so after the commit.
            broke = isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated
            raise self._failed(error, unsure if broke else "") from error

    def close(self, last: Callable[[], object] | None = None) -> None:
        """Run `last` after the open calls, by default to dispose of the engine. Does not wait for it."""
        self.executor.submit(last or self.engine.dispose)
        self.executor.shutdown(wait=False)

    def _failed(self, problem: BaseException | str, unsure: str) -> UnavailableError:
        error = failed(self.engine, self._subject, problem)
        return UnavailableError(error.reason, f"{error.message}; {unsure}") if unsure else error
