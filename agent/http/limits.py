"""Bounds and timeouts that callers of the engine set. Sizes in bytes, times in seconds of the event loop's clock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server accepts from its clients.

    Defaults follow the Function Compute contract where it has a limit: headers 8 KB in total, path plus query 4 KB,
    sync body 32 MB. An ingress needs a higher `header_bytes`, with room for the headers that the gateway adds.
    """

    header_bytes: int = 8192  # all header lines together, request line not counted; more is 400
    target_bytes: int = 4096  # path plus query; more is 400
    body_bytes: int = 32 * 1024 * 1024  # more is 413
    buffer_bytes: int = 64 * 1024  # body or pipelined bytes kept before reading pauses (plus one socket read)
    write_buffer_bytes: int = 64 * 1024  # answer bytes waiting for the client before the upstream is paused
    max_connections: int = 4096  # further ones are answered 503 and closed
    header_timeout_s: float = 10.0  # first byte to the end of a request's head
    keep_alive_s: float = 75.0  # idle between requests
    body_stall_s: float = 30.0  # no byte of a request's body received
    write_stall_s: float = 60.0  # no byte of an answer taken by the client
    linger_s: float = 2.0  # how long input is discarded after an answer that came before the body's end


@dataclass(frozen=True, slots=True)
class UpstreamLimits:
    """What a pool accepts from its upstream, and how long it keeps connections."""

    header_bytes: int = 32 * 1024  # a response's head
    write_buffer_bytes: int = 64 * 1024  # request bytes waiting for the upstream before the client is paused
    max_connections: int = 1024  # open ones, busy and idle
    max_idle: int = 256
    idle_s: float = 60.0  # shorter than the upstream's keep-alive (Function Compute requires 15 min of instances)
    connect_timeout_s: float = 5.0
    # Silence of the peer's kernel after which its connections break (TCP_USER_TIMEOUT and keep-alive probes); 0: the
    # half minute of `tcp_options`. Not for upstreams that may leave a body unread for that long.
    silence_s: float = 0.0
