"""A pool of connections to one upstream, and small whole-body calls over it."""

from __future__ import annotations

from dataclasses import dataclass

from agent.http.limits import UpstreamLimits
from agent.http.message import Header


@dataclass(frozen=True, slots=True)
class Response:
    """A whole response of `Pool.request`."""

    status: int
    headers: list[Header]
    body: bytes


class UpstreamConnection:
    """One connection; see upstream.py."""


class Pool:
    """Keep-alive connections to one `host`:`port`. Last used, first re-used. No waiting: whoever bounds the
    requests bounds the connections; beyond `limits.max_connections` acquire fails."""

    def __init__(self, host: str, port: int, limits: UpstreamLimits) -> None: ...

    def take(self) -> UpstreamConnection | None:
        """An idle connection at once, or None."""
        raise NotImplementedError

    async def acquire(self, deadline: float, *, fresh: bool = False) -> UpstreamConnection:
        """An idle connection, or a new one by `deadline` (loop time). Raises ConnectFailedError."""
        raise NotImplementedError

    def release(self, connection: UpstreamConnection) -> None:
        """Gives a connection back; it is kept only if its last exchange ended cleanly and it is not
        retired."""

    def retire(self) -> None:
        """Closes the idle connections now and lets busy ones not be re-used. The pool stays usable: the next
        acquire connects anew. For the moment an instance's freeze begins."""

    close_idle = retire

    async def close(self) -> None:
        """Retires, and cuts the busy ones too."""

    async def request(
        self,
        method: bytes,
        target: bytes,
        headers: list[Header],
        body: bytes = b"",
        *,
        timeout_s: float,
        max_body_bytes: int = 65536,
        fresh: bool = False,
    ) -> Response:
        """One small call with its whole body, for hooks and health checks. Never repeated.

        `fresh`: on a connection of its own. Raises ConnectFailedError, UpstreamTimeoutError,
        UpstreamBrokenError (also for a response over `max_body_bytes`).
        """
        raise NotImplementedError
