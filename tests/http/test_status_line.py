"""The phrases of answers are the standard ones, whoever answers."""

from __future__ import annotations

import pytest

from agent.http.limits import Limits
from agent.http.status_line import status_line
from tests.http.rig import connect, serving
from tests.http.test_hostile_clients import answer_ok

# RFC 9110, section 15; RFC 6585 for 431.
PHRASES = {
    200: "OK",
    308: "Permanent Redirect",
    400: "Bad Request",
    408: "Request Timeout",
    413: "Content Too Large",
    414: "URI Too Long",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}


@pytest.mark.parametrize(("status", "phrase"), PHRASES.items())
def test_the_phrase_is_the_standard_s(status: int, phrase: str) -> None:
    assert status_line(status) == f"HTTP/1.1 {status} {phrase}\r\n".encode()


def test_an_unknown_status_has_no_phrase() -> None:
    assert status_line(299) == b"HTTP/1.1 299 \r\n"


@pytest.mark.parametrize(
    ("request_head", "line"),
    [
        (b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 1001\r\n\r\n", b"HTTP/1.1 413 Content Too Large\r\n"),
        (b"GET / HTTP/1.1\r\nhost: h\r\nbad header\r\n\r\n", b"HTTP/1.1 400 Bad Request\r\n"),
    ],
)
async def test_a_refusal_before_any_handler_has_it_too(request_head: bytes, line: bytes) -> None:
    async with serving(answer_ok, Limits(body_bytes=1000)) as server:
        wire = await connect(server.port)
        await wire.send(request_head)
        assert await wire.until(b"\r\n") == line
