"""Streams one exchange both ways between a client and an upstream.

Between the first and the last byte only callbacks of the two connections run (relay.py): a chunk goes from one socket's
read to the other's write without a task in between. The awaiting caller is woken once, at the end. Trailers are dropped
in both directions, 1xx responses other than 100 too.
"""

from __future__ import annotations

import asyncio

from agent.http.delayed_head import DeferredHeaders, DelayedHeadRelay
from agent.http.errors import ConnectFailedError
from agent.http.exchange import Exchange
from agent.http.head_parser import serialise
from agent.http.message import Header, lookup
from agent.http.pool import Pool
from agent.http.relay import Done, Hook, Relay, RelayOutcome, ResponseFilter
from agent.http.relay import ForwardResult as ForwardResult  # noqa: PLC0414 (re-exported)
from agent.http.upstream import UpstreamConnection


async def forward(
    exchange: Exchange,
    source: Pool,
    method: bytes,
    target: bytes,
    headers: list[Header],
    *,
    deadline: float,
    response_filter: ResponseFilter,
    body: bytes | None = None,
    expect: bool = False,
    deferred_headers: DeferredHeaders | None = None,
    on_last_byte: Hook | None = None,
) -> ForwardResult:
    """Sends the request to an upstream of `source` and streams the response to the client. Network failures are
    outcomes, not exceptions; nothing is ever sent twice.

    - `headers`: end-to-end ones (`header_filter.request_headers` plus the caller's own). Framing is added, and `host`
      if there is none.
    - `deadline`: loop time at which the upstream connection is closed.
    - `response_filter`: turns the upstream's final head into the client's headers (framing is added), or returns None
      to hold the answer back: outcome HELD, for a refusal that is dispatched again.
    - `body`: the whole body if the caller has it (from `buffer_body`); else the exchange's is streamed.
    - `expect`: sends `Expect: 100-continue`, and the body after the upstream's 100. Without it the client gets its 100
      as soon as the upstream is connected.
    - `deferred_headers`: awaited once the upstream's head has come; the client's head waits for what it returns.
    - `on_last_byte`: called inline, once, when the last byte of the upstream's answer has arrived or its connection is
      closed for any other reason.

    Raises ValueError for CR or LF in a header, and whatever `response_filter` or `deferred_headers` raise.
    """
    if exchange.gone:
        return ForwardResult(RelayOutcome.CLIENT_GONE, None, None, 0, 0)
    connection = source.take()
    if connection is None:
        try:
            connection = await source.acquire(deadline)
        except ConnectFailedError as error:
            return ForwardResult(RelayOutcome.CONNECT_FAILED, None, error, 0, 0)
    done: asyncio.Future[ForwardResult] = exchange.loop.create_future()

    def wake(result: ForwardResult) -> None:
        if not done.done():  # else the caller was cancelled
            done.set_result(result)

    relay = forward_now(
        exchange,
        source,
        connection,
        method,
        target,
        headers,
        deadline=deadline,
        response_filter=response_filter,
        on_done=wake,
        body=body,
        expect=expect,
        deferred_headers=deferred_headers,
        on_last_byte=on_last_byte,
    )
    try:
        result = await done
    except asyncio.CancelledError:
        relay.cancel()
        raise
    if result.fault is not None:
        raise result.fault
    return result


def forward_now(
    exchange: Exchange,
    source: Pool,
    connection: UpstreamConnection,
    method: bytes,
    target: bytes,
    headers: list[Header],
    *,
    deadline: float,
    response_filter: ResponseFilter,
    on_done: Done,
    body: bytes | None = None,
    expect: bool = False,
    deferred_headers: DeferredHeaders | None = None,
    on_last_byte: Hook | None = None,
    prepared: bytes | None = None,
) -> Relay:
    """As `forward`, without a task.

    - `connection`: from `source.take()`; owned by the relay from here on.
    - `on_done`: called exactly once, possibly before this returns; must not raise. What `response_filter` or
      `deferred_headers` raised is in its result.
    - `prepared`: the head, made by `prepare` from the same arguments.

    Raises ValueError for CR or LF in a header, after it has released the connection.
    """
    has_body = bool(body) if body is not None else exchange.head.has_body
    try:
        message = prepared or prepare(exchange, source, method, target, headers, body, expect=expect and has_body)
    except ValueError:
        source.release(connection)
        raise
    relay: Relay
    if deferred_headers is None:
        relay = Relay(exchange, source, connection, response_filter, on_done, on_last_byte)
    else:
        parts = (exchange, source, connection, response_filter, on_done, on_last_byte)
        relay = DelayedHeadRelay(*parts, deferred=deferred_headers)
    connection.start(relay, method, deadline)
    if body is None and has_body:
        connection.allow_silence()
    exchange.attach(relay)
    if not relay.ended:  # the client may have left while the upstream connected
        relay.send(message, body, has_body, expect)
    return relay


def prepare(
    exchange: Exchange,
    source: Pool,
    method: bytes,
    target: bytes,
    headers: list[Header],
    body: bytes | None = None,
    *,
    expect: bool = False,
) -> bytes:
    """The request head that `forward` would send. Raises ValueError for CR or LF in a header."""
    framing = b"" if lookup(headers, b"host") is not None else b"host: %b\r\n" % source.authority
    length = exchange.head.length if body is None else len(body)
    if body is None and exchange.head.chunked:
        framing += b"transfer-encoding: chunked\r\n"
    elif length or exchange.head.length is not None or method in (b"POST", b"PUT", b"PATCH"):
        framing += b"content-length: %d\r\n" % (length or 0)
    if expect:
        framing += b"expect: 100-continue\r\n"
    return serialise(b"%b %b HTTP/1.1\r\n" % (method, target), headers, framing)
