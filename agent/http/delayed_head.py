"""A relay whose answer's head waits for headers that take a moment: the log of the request that it answers.

Only exchanges that ask for it have one. Meanwhile the upstream is not read: what came with its head (one read of the
socket at most) is all that is kept. Its deadline runs on, and the client may leave, as ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from agent.http.exchange import Exchange
from agent.http.message import Header, ResponseHead
from agent.http.pool import Pool
from agent.http.relay import Done, Hook, Relay, RelayOutcome, ResponseFilter
from agent.http.upstream import UpstreamConnection

LateHeaders = Callable[[], Awaitable[list[Header]]]
"""Called at the upstream's head; bounded in time by itself. Cancelled if the exchange ends before it has answered."""


class DelayedHeadRelay(Relay):
    """As `Relay`; `late` is asked once, and its headers are added to those of the response filter."""

    __slots__ = ("_arrived", "_client_full", "_late", "_waiting", "_whole")

    def __init__(
        self,
        exchange: Exchange,
        source: Pool,
        connection: UpstreamConnection,
        response_filter: ResponseFilter,
        on_done: Done,
        on_first_byte: Hook | None,
        on_last_byte: Hook | None,
        late: LateHeaders,
    ) -> None:
        super().__init__(exchange, source, connection, response_filter, on_done, on_first_byte, on_last_byte)
        self._late = late
        self._arrived: list[bytes] = []
        self._whole = False
        self._client_full = False
        self._waiting: asyncio.Task[None] | None = None

    def response_whole(self, head: ResponseHead, body: bytes) -> None:
        self.response_head(head)
        self.response_data(body)
        self.response_end()

    def response_head(self, head: ResponseHead) -> None:
        self.head = head
        hook, self._on_first_byte = self._on_first_byte, None
        if hook is not None:
            hook()
        self._connection.pause()
        self._waiting = asyncio.get_running_loop().create_task(self._answer(head))

    async def _answer(self, head: ResponseHead) -> None:
        fault: Exception | None = None
        more: list[Header] = []
        try:
            more = await self._late()
        except Exception as error:
            fault = error
        if self.ended:
            return
        self._waiting = None
        if fault is not None:
            self._end(RelayOutcome.COMPLETE, fault)
            return
        inner = self._filter

        def with_more(answer: ResponseHead) -> list[Header] | None:
            headers = inner(answer)
            return None if headers is None else headers + more

        self._filter = with_more
        super().response_head(head)
        if not self._over():
            self._go_on()

    def _over(self) -> bool:
        return self.ended

    def _go_on(self) -> None:
        """What came while we waited, then whatever comes."""
        for data in self._arrived:
            super().response_data(data)
        self._arrived = []
        if self._whole:
            super().response_end()
            return
        super().response_flush()
        if not self._client_full:
            self._connection.resume()  # no effect on one that has ended

    def response_data(self, data: bytes) -> None:
        if self._waiting is not None:
            self._arrived.append(data)
        else:
            super().response_data(data)

    def response_flush(self) -> None:
        if self._waiting is None:
            super().response_flush()

    def response_end(self) -> None:
        if self._waiting is not None:
            self._whole = True
        else:
            super().response_end()

    def client_writable(self, writable: bool) -> None:
        self._client_full = not writable
        if self._waiting is None or not writable:
            super().client_writable(writable)

    def _end(self, outcome: RelayOutcome, fault: Exception | None = None) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        super()._end(outcome, fault)
