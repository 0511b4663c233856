"""Hostile bytes on a real socket get a JSON error and a closed connection; no handler sees them."""

from __future__ import annotations

import json

import pytest

from agent.http.exchange import Exchange
from agent.http.limits import Limits
from tests.http.rig import REQUEST_ID, Wire, connect, relay, serving, upstream
from tests.http.test_head_parser import HOST, HOSTILE

GOOD = b"GET /good HTTP/1.1\r\n" + HOST + b"\r\n"


async def answer_ok(exchange: Exchange) -> None:
    await exchange.answer(200, [], exchange.head.target)


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE.keys())
async def test_refused_and_closed(raw: bytes) -> None:
    seen: list[bytes] = []

    async def handler(exchange: Exchange) -> None:
        seen.append(exchange.head.target)
        await answer_ok(exchange)

    async with serving(handler) as server:
        wire = await connect(server.port)
        await wire.send(raw)
        status, headers, body = await wire.message()
        assert status == 400
        assert headers[b"connection"] == b"close"
        assert headers[b"x-fc-request-id"] == REQUEST_ID.encode()
        answer = json.loads(body)
        assert answer["RequestId"] == REQUEST_ID
        assert answer["Code"] == "InvalidArgument"
        assert answer["Message"]
        # The bytes that follow are never read as a request.
        wire.send_nowait(GOOD)
        wire.close()
        assert await wire.rest() == b""
        assert seen == []
        other = await connect(server.port)
        await other.send(GOOD)
        assert (await other.message())[2] == b"/good"


@pytest.mark.parametrize(
    "chunks",
    [b"+5\r\nhello\r\n", b"0x5\r\nhello\r\n", b"5\nhello\r\n", b"fffffffff\r\n", b"5\r\nhelloX\r\n", b"zz\r\n"],
)
async def test_bad_chunks(chunks: bytes) -> None:
    bodies: list[bytes | None] = []

    async def handler(exchange: Exchange) -> None:
        bodies.append(await exchange.buffer_body(1000))

    async with serving(handler) as server:
        wire = await connect(server.port)
        await wire.send(b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + GOOD)
        status, headers, body = await wire.message()
        assert (status, headers[b"connection"]) == (400, b"close")
        assert json.loads(body)["Code"] == "InvalidArgument"
        wire.close()
        assert await wire.rest() == b""
    assert bodies == []


async def test_body_over_the_limit_is_refused_by_its_length() -> None:
    async with serving(answer_ok, Limits(body_bytes=1000)) as server:
        wire = await connect(server.port)
        await wire.send(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 1001\r\nExpect: 100-continue\r\n\r\n")
        status, headers, body = await wire.message()
        assert (status, headers[b"connection"]) == (413, b"close")
        assert json.loads(body)["Code"] == "RequestEntityTooLarge"


async def test_chunked_body_over_the_limit_is_refused_midway() -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.buffer_body(10**9)

    async with serving(handler, Limits(body_bytes=1000)) as server:
        wire = await connect(server.port)
        await wire.send(b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(3):
            await wire.send(b"190\r\n" + b"x" * 400 + b"\r\n")
        status, headers, _ = await wire.message()
        assert (status, headers[b"connection"]) == (413, b"close")


async def test_upgrade_is_served_as_a_plain_request() -> None:
    async with serving(answer_ok) as server:
        wire = await connect(server.port)
        await wire.send(
            b"GET /ws HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
            b"POST /h2c HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\nhi"
        )
        assert (await wire.message())[2] == b"/ws"
        assert (await wire.message())[2] == b"/h2c"


async def test_one_byte_chunks_are_joined() -> None:
    """Five bytes of framing per byte must not cost both hops one call per byte."""
    sizes: list[int] = []

    async def script(wire: Wire) -> None:
        await wire.head()
        while piece := await wire.chunk():
            sizes.append(len(piece))
        await wire.send(b"HTTP/1.1 204 No Content\r\n\r\n")

    async with upstream(script) as up, relay(up.port) as between:
        wire = await between.client()
        await wire.send(b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n")
        await wire.send(b"1\r\na\r\n" * 10_000 + b"0\r\n\r\n")
        assert (await wire.message(bodyless=True))[0] == 204
    assert sum(sizes) == 10_000
    assert len(sizes) < 1000
