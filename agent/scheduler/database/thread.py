"""The thread that runs all statements on a database: one writer, and a deadline for every call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

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
        """
        - `name`: of the thread. `subject`: the database in error messages, such as "the usage database".
        - `timeout_hint`: follows "no answer within ... s" in the error of a call that missed its deadline.
        - `queue_length`: how many calls may be waiting or running; None for any number.
        """
        self.engine = engine
        self.deadline_s = deadline_s
        self.executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._subject = subject
        self._timeout_hint = timeout_hint
        self._queue_length = queue_length
        self._open_calls = 0

    async def run(self, work: Callable[[], _T], *, unsure: str = "") -> _T:
        """Run `work` in the thread. A call that misses its deadline before its turn does not run at all.

        Raises UnavailableError STORE_FAILED, to which `unsure` is added where a write may have happened nevertheless;
        ExhaustedError USAGE_BUSY if `queue_length` calls are open.
        """
        if self._queue_length is not None and self._open_calls >= self._queue_length:
            text = f"{self._open_calls} usage calls are waiting for the database; try later"
            raise ExhaustedError("USAGE_BUSY", text)
        job = self.executor.submit(work)
        self._open_calls += 1
        job.add_done_callback(self._closes_call(asyncio.get_running_loop()))
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

    def _closes_call(self, loop: asyncio.AbstractEventLoop) -> Callable[[Future[_T]], None]:
        def close_call() -> None:
            self._open_calls -= 1

        def from_any_thread(_: Future[_T]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(close_call)

        return from_any_thread
