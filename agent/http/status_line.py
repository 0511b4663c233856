"""The first line of an answer."""

from __future__ import annotations

from http import HTTPStatus

_RENAMED = {413: "Content Too Large", 414: "URI Too Long", 416: "Range Not Satisfiable", 422: "Unprocessable Content"}
"""RFC 9110's phrases where Python before 3.13 has those of earlier standards."""
_LINES = {
    status.value: f"HTTP/1.1 {status.value} {_RENAMED.get(status.value, status.phrase)}\r\n".encode()
    for status in HTTPStatus
}


def status_line(status: int) -> bytes:
    """The line with the status's standard phrase (RFC 9110, 15); an unknown status has none."""
    return _LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
