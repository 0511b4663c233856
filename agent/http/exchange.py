"""One request and its answer, as a handler sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from agent.core.errors import HibernodeError
from agent.http.message import Header, RequestHead


class BodySink(Protocol):
    """Who takes a request's body while it arrives."""

    def body_data(self, data: bytes) -> None: ...
    def body_end(self) -> None: ...
    def body_failed(self, error: HibernodeError) -> None: ...


class Exchange:
    """One request and its answer. Single use, on one event loop; made by the server, one at a time a
    connection.

    A client that half-closes its connection counts as gone, as with nginx: its leaving can't be told from
    that.
    """

    head: RequestHead
    peer: str  # the client's address, without port

    @property
    def gone(self) -> bool:
        """The client left (or its connection was given up): nothing that is written reaches anybody."""
        raise NotImplementedError

    @property
    def head_sent(self) -> bool:
        """An answer has begun; no other can be given."""
        raise NotImplementedError

    def on_gone(self, callback: Callable[[], None]) -> None:
        """Calls `callback` once when the client leaves before its answer is whole; at once if it has left."""

    def off_gone(self, callback: Callable[[], None]) -> None:
        """Forgets a callback."""

    def send_continue(self) -> None:
        """Sends `100 Continue` if the client asked for it, has not got it, and no answer has begun."""

    async def buffer_body(self, limit_bytes: int) -> bytes | None:
        """The whole body if it ends within `limit_bytes`, else None; nothing is lost then, what has arrived
        stays in front of what `forward` streams. Sends 100 Continue if asked. Raises as `read_body`, but
        never 413."""
        raise NotImplementedError

    async def read_body(self, limit_bytes: int) -> bytes:
        """The whole body, at most `limit_bytes`. Sends 100 Continue if asked.

        Raises HttpError 413 (over the limit), 400 (bad framing), 408 (stalled), ClientGoneError.
        """
        raise NotImplementedError

    async def answer(self, status: int, headers: list[Header], body: bytes = b"", *, close: bool = False) -> None:
        """Answers with a whole body; `content-length` is added. Waits for a slow client only while its write
        buffer is over the limit. Does nothing if the client has gone. Raises RuntimeError if an answer has
        begun."""

    async def fail(self, error: BaseException, request_id: str, *, extra: list[Header] | None = None) -> None:
        """Answers with `errors.error_answer`; if an answer has begun, cuts the connection instead."""
