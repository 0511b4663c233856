"""One exchange streamed both ways between a client and an upstream."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from agent.core.errors import HibernodeError
from agent.http.client import Pool
from agent.http.exchange import Exchange
from agent.http.message import Header, ResponseHead


class Outcome(enum.Enum):
    """How a forwarded exchange ended. Only COMPLETE and MID_BODY ones have begun an answer to the client."""

    COMPLETE = "complete"
    HELD = "held"  # response_filter returned None: the client got nothing, `head` is the upstream's
    CLIENT_GONE = "client_gone"
    CLIENT_FAILED = "client_failed"  # the request's body was bad, too large or too slow; `error` is the answer
    CONNECT_FAILED = "connect_failed"  # nothing was sent: the only failure after which trying again is allowed
    UPSTREAM_FAILED_BEFORE_HEAD = "upstream_failed_before_head"
    UPSTREAM_FAILED_MID_BODY = "upstream_failed_mid_body"  # the client's connection was cut
    TIMEOUT_BEFORE_HEAD = "timeout_before_head"
    TIMEOUT_MID_BODY = "timeout_mid_body"  # the client's connection was cut


@dataclass(slots=True)
class ForwardResult:
    """What happened. If `not exchange.head_sent` and not `exchange.gone`, the caller still owes an answer."""

    outcome: Outcome
    bytes_sent_upstream: bool  # False: no byte of the request can have reached the upstream
    reused: bool  # the connection had served a request before
    head: ResponseHead | None  # the upstream's final head, if it came
    error: HibernodeError | None  # what went wrong, for the answer and the log
    request_body_bytes: int
    response_body_bytes: int

    @property
    def head_status(self) -> int | None:
        return None if self.head is None else self.head.status


ResponseFilter = Callable[[ResponseHead], list[Header] | None]


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
    on_first_byte_sent: Callable[[], None] | None = None,
    on_first_byte: Callable[[], None] | None = None,
    on_last_byte: Callable[[], None] | None = None,
) -> ForwardResult:
    """Sends the request to an upstream of `source` and streams the response to the client. Never raises for
    what the network does; never repeats anything.

    `headers`: end-to-end ones (`headers.request_headers` plus the caller's own); framing, and `host` if
    there is none, are added here. `response_filter` turns the upstream's final head into the headers for the
    client (framing is added here too), or returns None to hold the answer back (outcome HELD, e.g. a refusal
    to be dispatched again). `deadline`: loop time at which the upstream connection is closed. `body`: the
    request's whole body if the caller has it (from `buffer_body`, kept for dispatching again), else it is
    streamed from the exchange. `expect`: sends `Expect: 100-continue` and the body only after the upstream's
    100; else the client gets its 100 as soon as the upstream is connected. Hooks are called inline, at most
    once, so that callers meter with their own clock: `on_first_byte_sent` before the first byte goes to the
    upstream, `on_first_byte` at the first byte of its final head, `on_last_byte` at the last byte of its
    answer, or when its connection is closed in any other way.
    """
    raise NotImplementedError
