"""Listening, and closing without cutting requests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from agent.http.exchange import Exchange
from agent.http.limits import Limits

Handler = Callable[[Exchange], Awaitable[None]]


class Server:
    """A listening server. `port` is the bound one."""

    port: int

    async def close(self, grace_s: float) -> int:
        """Stops listening, closes idle connections, lets requests in flight end for `grace_s` seconds, then
        cuts them. Returns how many were cut."""
        raise NotImplementedError


async def serve(
    handler: Handler,
    host: str,
    port: int,
    limits: Limits,
    *,
    request_ids: Callable[[], str],
    on_fault: Callable[[BaseException], None],
) -> Server:
    """Serves HTTP/1.1 on `host`:`port` (0 = any) of the running loop.

    `handler` gets one Exchange per request and answers it. `request_ids` names the engine's own refusals
    (400, 408, 413); `on_fault` gets what a handler raised, once, to be logged (the client gets a 500).
    Raises OSError if the address can't be bound.
    """
    raise NotImplementedError
