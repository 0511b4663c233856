"""What a connection asks of the kernel. Connections that are not TCP are left as they are."""

from __future__ import annotations

import asyncio
import socket

# A host that lost its power sends no FIN: a request inside would wait for its own deadline, a day perhaps. With
# `silence_s` TCP_USER_TIMEOUT decides, when the first probe after it is due. It counts from what was heard last, and of
# a peer that is well nothing is heard between probes, so they come often: a cut of half of it breaks nothing.
PROBES_S = 1
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))


def watch_peer(transport: asyncio.Transport, silence_s: float) -> None:
    """The kernel notices within half a minute, or `silence_s`, that the other machine is gone, however long an answer
    takes."""
    sock = _tcp(transport)
    if sock is None:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    if silence_s:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBES_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBES_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, max(1, int(silence_s / PROBES_S)))
        bound_silence(transport, silence_s)


def bound_silence(transport: asyncio.Transport, silence_s: float) -> None:
    """It breaks after so long without a word of the other machine's kernel, also where that leaves data unread; 0: only
    where probes are not answered."""
    sock = _tcp(transport)
    if sock is not None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(silence_s * 1000))


def cork(transport: asyncio.Transport, on: bool) -> None:
    """What is written stays in the kernel until the cork is taken out, 0.2 s at most (TCP_CORK, tcp(7))."""
    sock = _tcp(transport)
    if sock is not None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, on)


def _tcp(transport: asyncio.Transport) -> socket.socket | None:
    sock: socket.socket | None = transport.get_extra_info("socket")
    return sock if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6) else None
