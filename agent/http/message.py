"""Parsed heads of requests and responses.

Unlike the project's other dataclasses they are not frozen: a frozen one takes a microsecond longer to make, and every
request makes two. Only the parser writes to them.
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
    """A request's head: names in lower case, values stripped, in the client's order."""

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
    """A response's head: names in lower case, values stripped, in the server's order."""

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
