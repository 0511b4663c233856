"""A relay whose answer's head waits for headers that are not known yet, such as the log of its request.

Meanwhile the upstream is not read; only what came with its head is kept, one read of the socket at most. The deadline
still counts, and the client may leave.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from agent.http.exchange import Exchange
from agent.http.message import Header, ResponseHead
from agent.http.pool import Pool
from agent.http.relay import Done, Hook, Relay, RelayOutcome, ResponseFilter
from agent.http.upstream import UpstreamConnection

DeferredHeaders = Callable[[], Awaitable[list[Header]]]
"""Called when the upstream's head has arrived; bounds its own time. Cancelled if the exchange ends first."""


class DelayedHeadRelay(Relay):
    """Adds the headers of `deferred` to those of the response filter; holds the upstream's calls back until it can."""

    __slots__ = ("_deferred", "_held_back", "_task")

    def __init__(
        self,
        exchange: Exchange,
        source: Pool,
        connection: UpstreamConnection,
        response_filter: ResponseFilter,
        on_done: Done,
        on_last_byte: Hook | None,
        deferred: DeferredHeaders,
    ) -> None:
        super().__init__(exchange, source, connection, response_filter, on_done, on_last_byte)
        self._deferred = deferred
        self._held_back: list[tuple[Callable[..., None], tuple[bytes, ...]]] = []
        self._task: asyncio.Task[None] | None = None

    def response_whole(self, head: ResponseHead, body: bytes) -> None:
        self.response_head(head)
        self.response_data(body)
        self.response_end()

    def response_head(self, head: ResponseHead) -> None:
        self.head = head
        self._connection.pause()
        self._task = self._exchange.loop.create_task(self._answer(head))

    async def _answer(self, head: ResponseHead) -> None:
        fault: Exception | None = None
        more: list[Header] = []
        try:
            more = await self._deferred()
        except Exception as error:
            fault = error
        self._task = None
        if self.ended or fault is not None:
            self._end(RelayOutcome.COMPLETE, fault)  # no effect on a relay that has ended
            return
        inner = self._filter
        self._filter = lambda answer: None if (headers := inner(answer)) is None else headers + more
        super().response_head(head)
        for call, args in self._held_back:
            if not self.ended:
                call(self, *args)
        if self._exchange.writable:
            self.client_writable(True)  # reads the upstream again, unless its connection has been released

    def response_data(self, data: bytes) -> None:
        self._after_head(Relay.response_data, data)

    def response_flush(self) -> None:
        self._after_head(Relay.response_flush)

    def response_end(self) -> None:
        self._after_head(Relay.response_end)

    def _after_head(self, call: Callable[..., None], *args: bytes) -> None:
        if self._task is None:
            call(self, *args)
        else:
            self._held_back.append((call, args))

    def client_writable(self, writable: bool) -> None:
        if self._task is None:
            super().client_writable(writable)

    def _end(self, outcome: RelayOutcome, fault: Exception | None = None) -> None:
        if self._task is not None:
            self._task.cancel()
        super()._end(outcome, fault)
