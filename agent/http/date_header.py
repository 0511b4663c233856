"""The `date` header of answers: whoever answers clients says when (RFC 9110, 6.6.1)."""

from __future__ import annotations

from collections.abc import Callable
from email.utils import formatdate


class DateHeader:
    """`date: Sun, 06 Nov 1994 08:49:37 GMT\\r\\n`, written anew when the second changes. `wall_s`: Unix seconds."""

    __slots__ = ("_line", "_second", "_wall_s")

    def __init__(self, wall_s: Callable[[], int]) -> None:
        self._wall_s = wall_s
        self._second = -1
        self._line = b""

    def __call__(self) -> bytes:
        second = self._wall_s()
        if second != self._second:
            self._second = second
            self._line = b"date: %b\r\n" % formatdate(second, usegmt=True).encode()
        return self._line
