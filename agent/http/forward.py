"""One exchange streamed both ways between a client and an upstream.

Everything between the first and the last byte happens in callbacks of the two connections (relay.py): a chunk goes from
one socket's read to the other's write without a task in between. The awaiting caller is woken once, at the end.
Trailers are dropped in both directions; 1xx other than 100 are dropped.
"""

from __future__ import annotations

import asyncio

from agent.http.delayed_head import DelayedHeadRelay, LateHeaders
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
    connect_deadline: float | None = None,
    late_headers: LateHeaders | None = None,
    on_first_byte_sent: Hook | None = None,
    on_first_byte: Hook | None = None,
    on_last_byte: Hook | None = None,
) -> ForwardResult:
    """Sends the request to an upstream of `source` and streams the response to the client. Never raises for
    what the network does; never repeats anything.

    `headers`: end-to-end ones (`headers.request_headers` plus the caller's own); framing, and `host` if
    there is none, are added here. `response_filter` turns the upstream's final head into the headers for the
    client (framing is added here too), or returns None to hold the answer back (outcome HELD, e.g. a refusal
    to be dispatched again). `deadline`: loop time at which the upstream connection is closed. `body`: the
    request's whole body if the caller has it (from `buffer_body`, kept for dispatching again), else it is
    streamed from the exchange. `expect`: sends `Expect: 100-continue`, and the body only after the upstream's
    100; else the client gets its 100 as soon as the upstream is connected. `late_headers`: asked at the upstream's
    head for headers that take a moment; the client's head waits for them. Hooks are called inline, at most
    once, so that callers meter with their own clock: `on_first_byte_sent` before the first byte goes to the
    upstream, `on_first_byte` at the upstream's final head, `on_last_byte` at the last byte of its answer, or
    when its connection is given up for any other reason. Raises ValueError for CR or LF in a header, and what
    `response_filter` or `late_headers` raise.
    """
    if exchange.gone:
        return ForwardResult(RelayOutcome.CLIENT_GONE, False, False, None, None, 0, 0)
    connection = source.take()
    if connection is None:
        try:
            connection = await source.acquire(deadline if connect_deadline is None else connect_deadline)
        except ConnectFailedError as error:
            return ForwardResult(RelayOutcome.CONNECT_FAILED, False, False, None, error, 0, 0)
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
        late_headers=late_headers,
        on_first_byte_sent=on_first_byte_sent,
        on_first_byte=on_first_byte,
        on_last_byte=on_last_byte,
    )
    try:
        result = await done
    except asyncio.CancelledError:
        relay.give_up()
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
    late_headers: LateHeaders | None = None,
    on_first_byte_sent: Hook | None = None,
    on_first_byte: Hook | None = None,
    on_last_byte: Hook | None = None,
    prepared: bytes | None = None,
) -> Relay:
    """As `forward`, without a task: on a `connection` that the caller has (from `source.take()`), with a callback at
    the end. It owns the connection from here on. `on_done` comes exactly once, perhaps before this returns, and must
    not raise; a fault of `response_filter` is in its result. `prepared`: the head, by `prepare` of the same arguments.
    Raises ValueError for CR or LF in a header, and has given the connection back then."""
    has_body = bool(body) if body is not None else exchange.head.has_body
    try:
        message = prepared or prepare(exchange, source, method, target, headers, body, expect=expect and has_body)
    except ValueError:
        source.release(connection)
        raise
    relay: Relay
    if late_headers is None:
        relay = Relay(exchange, source, connection, response_filter, on_done, on_first_byte, on_last_byte)
    else:
        hooks = (on_first_byte, on_last_byte)
        relay = DelayedHeadRelay(exchange, source, connection, response_filter, on_done, *hooks, late=late_headers)
    connection.start(relay, method, deadline)
    if body is None and has_body:
        connection.be_patient()
    exchange.attach(relay)
    if not relay.ended:  # the client may have left while somebody connected
        relay.sent = True
        if on_first_byte_sent is not None:
            on_first_byte_sent()
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
    """The head that `forward` would send. Raises ValueError for CR or LF in a header."""
    framing = b"" if lookup(headers, b"host") is not None else b"host: %b\r\n" % source.authority
    length = exchange.head.length if body is None else len(body)
    if body is None and exchange.head.chunked:
        framing += b"transfer-encoding: chunked\r\n"
    elif length or exchange.head.length is not None or method in (b"POST", b"PUT", b"PATCH"):
        framing += b"content-length: %d\r\n" % (length or 0)
    if expect:
        framing += b"expect: 100-continue\r\n"
    return serialise(b"%b %b HTTP/1.1\r\n" % (method, target), headers, framing)
