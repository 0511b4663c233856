"""A library's connection: datagrams on a SOCK_SEQPACKET socket, on the event loop."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable, Sequence

from agent.emulated.pids import namespace_of
from agent.emulated.protocol import HEADER_BYTES, MAX_PAYLOAD, Message

_BATCH = 16
_SO_PEERPIDFD = 77  # Linux 6.5
_CREDENTIALS = struct.Struct("3i")


class Connection:
    """`pid` and `uid` are the peer's as seen on the host, even for a process in a container.

    A peer that sends malformed messages or reads no answers is disconnected: nothing is buffered for it."""

    def __init__(
        self,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
        on_message: Callable[[Connection, Message], None],
        on_close: Callable[[Connection], None],
    ) -> None:
        self._sock = sock
        self._loop = loop
        self._on_message = on_message
        self._on_close = on_close
        self.closed = False
        self._namespace = -1
        self.pid, self.uid, _gid = _CREDENTIALS.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        sock.setblocking(False)
        loop.add_reader(sock.fileno(), self._read)

    @property
    def namespace(self) -> int:
        """Inode of the peer's pid namespace; 0 if it is not visible."""
        if self._namespace < 0:
            self._namespace = namespace_of(self.pid)
        return self._namespace

    def open_pidfd(self) -> int:
        """A pidfd of the process that connected. Raises OSError if it is gone."""
        try:
            return self._sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
        except OSError:
            return os.pidfd_open(self.pid)

    def _read(self) -> None:
        for _ in range(_BATCH):
            try:
                data = self._sock.recv(HEADER_BYTES + MAX_PAYLOAD)
                if not data:
                    return self.close()
                message = Message.decode(data)
            except BlockingIOError:
                return None
            except (OSError, struct.error):
                return self.close()
            self._on_message(self, message)
            if self.closed:
                return None
        return None

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        if self.closed:
            return
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
        try:
            if control:
                self._sock.sendmsg([message.encode()], control)
            else:
                self._sock.send(message.encode())
        except OSError:
            self.close()

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        self._on_close(self)
