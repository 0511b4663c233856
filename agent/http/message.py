"""What a request's and a response's head are, once parsed.

Not frozen, unlike the rest of the project's dataclasses: a frozen one costs a microsecond more to make, and
two are made for every request. Nobody but the parser writes to them.
"""

from __future__ import annotations

from dataclasses import dataclass

Header = tuple[bytes, bytes]


def lookup(headers: list[Header], name: bytes) -> bytes | None:
    """The value of the first header called `name` (lower case), or None."""
    for key, value in headers:
        if key == name:
            return value
    return None


@dataclass(slots=True)
class RequestHead:
    """A request's head. Names are lower case, values stripped, the order is the client's."""

    method: bytes
    target: bytes  # origin form ("/path?query"), or "*" for OPTIONS
    headers: list[Header]
    length: int | None  # Content-Length, None if there was none
    chunked: bool
    expect_continue: bool
    keep_alive: bool  # HTTP/1.1 without "Connection: close"; HTTP/1.0 connections are always closed
    http10: bool

    def get(self, name: bytes) -> bytes | None:
        """The value of the first header called `name` (lower case), or None."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    @property
    def path(self) -> bytes:
        """The target without its query."""
        return self.target.partition(b"?")[0]

    @property
    def has_body(self) -> bool:
        return self.chunked or bool(self.length)


@dataclass(slots=True)
class ResponseHead:
    """A response's head. Names are lower case, values stripped, the order is the server's."""

    status: int
    reason: bytes
    headers: list[Header]
    length: int | None
    chunked: bool
    keep_alive: bool

    def get(self, name: bytes) -> bytes | None:
        """The value of the first header called `name` (lower case), or None."""
        for key, value in self.headers:
            if key == name:
                return value
        return None
