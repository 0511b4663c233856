"""Socket options of connections. Connections other than TCP are left as they are."""

from __future__ import annotations

import asyncio
import socket

# A host that lost power sends no FIN; without probes a request would wait for its own deadline, up to a day. With
# `silence_s` TCP_USER_TIMEOUT decides, checked when a probe is due. It counts from the last segment received, and an
# idle peer sends only replies to probes: probes are frequent, so that a short outage breaks no healthy connection.
PROBE_INTERVAL_S = 1
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))


def watch_peer(transport: asyncio.Transport, silence_s: float) -> None:
    """Lets the kernel drop a dead peer within `silence_s`; 0: half a minute, or more while data is unacknowledged."""
    sock = _tcp(transport)
    if sock is None:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    if silence_s:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_INTERVAL_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_INTERVAL_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, max(1, int(silence_s / PROBE_INTERVAL_S)))
        bound_silence(transport, silence_s)


def bound_silence(transport: asyncio.Transport, silence_s: float) -> None:
    """Sets TCP_USER_TIMEOUT: the connection breaks after this long without an acknowledgement, even if the peer only
    leaves data unread. 0 disables it: the kernel's bounds on probes and retransmissions remain."""
    sock = _tcp(transport)
    if sock is not None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(silence_s * 1000))


def cork(transport: asyncio.Transport, on: bool) -> None:
    """Sets TCP_CORK: the kernel holds written data back until it is cleared, 0.2 s at most (tcp(7))."""
    sock = _tcp(transport)
    if sock is not None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, on)


def _tcp(transport: asyncio.Transport) -> socket.socket | None:
    sock: socket.socket | None = transport.get_extra_info("socket")
    return sock if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6) else None
