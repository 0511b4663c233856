"""systemd's notification socket: READY=1, STOPPING=1, WATCHDOG=1. Does nothing without systemd."""

from __future__ import annotations

import os
import socket


def notify_socket() -> socket.socket:
    """A socket connected to it. Raises OSError; FileNotFoundError without systemd."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        raise FileNotFoundError("NOTIFY_SOCKET is not set")
    if address.startswith("@"):
        address = "\0" + address[1:]
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        channel.connect(address)
    except OSError:
        channel.close()
        raise
    return channel


def notify(message: str) -> bool:
    """Send one message, e.g. "READY=1". False, not an error, without systemd."""
    try:
        with notify_socket() as channel:
            channel.sendall(message.encode())
    except OSError:
        return False
    return True


def watchdog_interval_s() -> float | None:
    """How often to feed the watchdog: half of systemd's limit; None if it does not watch."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    return int(usec) / 2_000_000 if usec.isdecimal() and int(usec) > 0 else None
