"""Bounds calls that last as long as their callers like (a terminal, a followed log): in number and in time. None
outlives the agent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from agent.core.errors import DeadlineError, ExhaustedError, UnavailableError

CLOSE_DEADLINE_S = 10.0


class StreamLimits:
    """Admits `most` calls at once, each for `longest_s` at most; `what` names them in errors ("commands inside")."""

    def __init__(self, what: str, most: int, longest_s: float) -> None:
        self._what = what
        self._most = most
        self._longest_s = longest_s
        self._limits: set[asyncio.Timeout] = set()
        self._closed = False
        self._none_left = asyncio.Event()
        self._none_left.set()

    @property
    def open(self) -> int:
        """Calls under way."""
        return len(self._limits)

    @asynccontextmanager
    async def admit(self) -> AsyncIterator[asyncio.Timeout]:
        """Admit one call, within one task. The yielded timeout has expired if the limit or `close` ended the call.

        Raises UnavailableError AGENT_STOPPING, ExhaustedError TOO_MANY_CALLS, DeadlineError CALL_TOO_LONG.
        """
        if self._closed:
            raise self._stopping()
        if len(self._limits) >= self._most:
            text = f"{len(self._limits)} {self._what} are under way on this node, the maximum; end one first"
            raise ExhaustedError("TOO_MANY_CALLS", text)
        limit = asyncio.timeout(self._longest_s)
        self._limits.add(limit)
        self._none_left.clear()
        try:
            async with limit:
                yield limit
        except TimeoutError:
            if not limit.expired():
                raise  # the call's own
            if self._closed:
                raise self._stopping() from None
            text = f"{self._what} last {self._longest_s:g} s at most; start a new one"
            raise DeadlineError("CALL_TOO_LONG", text) from None
        finally:
            self._limits.discard(limit)
            if not self._limits:
                self._none_left.set()

    def _stopping(self) -> UnavailableError:
        return UnavailableError("AGENT_STOPPING", "this node's agent is stopping; try again once it is back")

    async def close(self) -> None:
        """End all calls, admit no more. Returns once they have cleaned up, after `CLOSE_DEADLINE_S` at the latest."""
        self._closed = True
        for limit in self._limits:
            with suppress(RuntimeError):  # it is ending already
                limit.reschedule(0.0)
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_DEADLINE_S):
                await self._none_left.wait()
