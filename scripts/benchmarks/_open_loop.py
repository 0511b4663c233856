"""Open-loop load: sends requests at given times, independent of earlier answers, over keep-alive connections.

One thread sends with microsecond precision, which event loop timers do not have; another reads. A connection carries
one request at a time. If none is free, another one is opened, up to MAX_CONNECTIONS: the server is then overloaded.
"""

from __future__ import annotations

import re
import select
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

MAX_CONNECTIONS = 2000
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_HEAD_END = b"\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Planned:
    """One request: its time after the start, and its bytes."""

    at_ns: int
    message: bytes


@dataclass(slots=True)
class _Sent:
    number: int
    began_ns: int
    answer: bytes = b""


class OpenLoop:
    """Plays one plan against one address."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._poll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self._idle: list[int] = []
        self._under_way: dict[int, _Sent] = {}
        self._latencies: list[int] = []
        self._statuses: dict[int, int] = {}

    def run(self, plan: Sequence[Planned], deadline_s: float) -> tuple[list[float], dict[int, int]]:
        """Latencies in ms by request, from sending to the last byte of the answer, and counts of answers by status.

        Raises RuntimeError if answers are missing `deadline_s` after the last request.
        """
        self._latencies = [-1] * len(plan)
        reader = threading.Thread(target=self._read, args=(len(plan), plan[-1].at_ns / 1e9 + deadline_s), daemon=True)
        reader.start()
        start = time.monotonic_ns() + 50_000_000
        for number, one in enumerate(plan):
            wait_s = (start + one.at_ns - time.monotonic_ns()) / 1e9
            if wait_s > 0:
                time.sleep(wait_s)
            self._send(number, one.message)
        reader.join()
        for found in self._sockets.values():
            found.close()
        self._poll.close()
        missing = self._latencies.count(-1)
        if missing:
            raise RuntimeError(f"{missing} of {len(plan)} requests were not answered")
        return [latency / 1e6 for latency in self._latencies], self._statuses

    def _send(self, number: int, message: bytes) -> None:
        fresh = not self._idle
        if fresh:
            if len(self._sockets) >= MAX_CONNECTIONS:
                raise RuntimeError(f"{MAX_CONNECTIONS} requests in flight: the server does not keep up")
            connection = socket.create_connection(self._address, timeout=10)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            descriptor = connection.fileno()
            self._sockets[descriptor] = connection
        else:
            descriptor = self._idle.pop()
        self._under_way[descriptor] = _Sent(number, time.monotonic_ns())
        self._sockets[descriptor].sendall(message)
        if fresh:
            self._poll.register(descriptor, select.EPOLLIN)

    def _read(self, count: int, deadline_s: float) -> None:
        ends = time.monotonic() + deadline_s
        answered = 0
        while answered < count and time.monotonic() < ends:
            for descriptor, _ in self._poll.poll(0.5):
                data = self._sockets[descriptor].recv(65536)
                now = time.monotonic_ns()
                sent = self._under_way[descriptor]
                sent.answer += data
                if not data:
                    self._poll.unregister(descriptor)
                elif _whole(sent.answer):
                    self._latencies[sent.number] = now - sent.began_ns
                    status = int(sent.answer[9:12])
                    self._statuses[status] = self._statuses.get(status, 0) + 1
                    answered += 1
                    self._idle.append(descriptor)


def _whole(answer: bytes) -> bool:
    end = answer.find(_HEAD_END)
    length = _LENGTH.search(answer, 0, end) if end >= 0 else None
    return length is not None and len(answer) >= end + 4 + int(length[1])
