"""One exchange streamed between a client and an upstream."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.http.message import Header, ResponseHead
from agent.http.relay import RelayOutcome
from tests.http.rig import Wire, answering, eventually, relay, upstream
from tests.http.test_server import HOST, get, post

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: text/plain\r\n\r\nok"
CHUNKED_POST = b"POST /a HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"


async def test_request_and_answer() -> None:
    seen: list[tuple[int, dict[bytes, bytes], bytes]] = []

    async def script(wire: Wire) -> None:
        seen.append(await wire.message())
        await wire.send(b"HTTP/1.1 201 Made\r\nX-Fc-Status: 200\r\nServer: x\r\nX-A: b\r\nContent-Length: 2\r\n\r\nok")

    async with upstream(script) as up, relay(up.port) as r:
        client = await r.client()
        await client.send(post(b"/p?q=1", b"hello", b"X-Fc-Spoof: 1", b"Connection: X-Hop", b"X-Hop: 1", b"X-B: c"))
        assert await client.message() == (
            201,
            {b"": b"HTTP/1.1 201 Made", b"x-fc-status": b"200", b"x-a": b"b", b"content-length": b"2"},
            b"ok",
        )
        result = await r.result()
        assert (result.outcome, result.head_status) == (RelayOutcome.COMPLETE, 201)
        assert (result.request_body_bytes, result.response_body_bytes) == (5, 2)
        assert len(r.last_bytes) == 1
    assert seen == [(0, {b"": b"POST /p?q=1 HTTP/1.1", b"host": b"f", b"x-b": b"c", b"content-length": b"5"}, b"hello")]


async def test_connections_are_reused_on_both_sides() -> None:
    async with upstream(answering(OK)) as up, relay(up.port) as r:
        client = await r.client()
        for _ in range(20):
            await client.send(get(b"/"))
            assert (await client.message())[2] == b"ok"
        assert up.connections == 1


@settings(max_examples=40)
@given(
    request=st.lists(st.binary(min_size=1, max_size=5000), max_size=5),
    response=st.lists(st.binary(min_size=1, max_size=5000), max_size=5),
    how=st.sampled_from(["length", "chunked", "close"]),
    chunked_request=st.booleans(),
    cut=st.integers(1, 2000),
)
def test_round_trip(request: list[bytes], response: list[bytes], how: str, chunked_request: bool, cut: int) -> None:
    """Random bodies with random framing and cuts arrive as they were sent."""
    sent, answered = b"".join(request), b"".join(response)

    async def script(wire: Wire) -> None:
        _, headers, body = await wire.message()
        assert body == sent
        raw = b"HTTP/1.1 200 OK\r\n"
        if how == "chunked":
            raw += b"Transfer-Encoding: chunked\r\n\r\n"
            raw += b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in response) + b"0\r\nt: 1\r\n\r\n"
        elif how == "length":
            raw += b"Content-Length: %d\r\n\r\n" % len(answered) + answered
        else:
            raw += b"\r\n" + answered
        await in_pieces(wire, raw)
        assert headers

    async def in_pieces(wire: Wire, raw: bytes) -> None:
        for start in range(0, len(raw), cut):
            await wire.send(raw[start : start + cut])
            await asyncio.sleep(0)

    async def story() -> None:
        async with upstream(script) as up, relay(up.port) as r:
            client = await r.client()
            if chunked_request:
                await in_pieces(
                    client,
                    CHUNKED_POST + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in request) + b"0\r\n\r\n",
                )
            else:
                await in_pieces(client, post(b"/a", sent))
            assert (await client.message())[2] == answered
            assert (await r.result()).outcome is RelayOutcome.COMPLETE

    asyncio.run(story())


async def test_server_sent_events_arrive_one_by_one() -> None:
    """Each event has arrived before the upstream sends the next."""
    taken = asyncio.Semaphore(0)

    async def script(wire: Wire) -> None:
        await wire.message()
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number in range(10):
            await taken.acquire()
            event = b"data: %d\n\n" % number
            await wire.send(b"%x\r\n%b\r\n" % (len(event), event))
        await taken.acquire()
        await wire.send(b"0\r\n\r\n")

    async with upstream(script) as up, relay(up.port) as r:
        client = await r.client()
        await client.send(get(b"/events"))
        assert (await client.head())[0] == 200  # before any event exists
        for number in range(10):
            taken.release()
            assert await client.chunk() == b"data: %d\n\n" % number
        taken.release()
        assert await client.chunk() == b""
        assert (await r.result()).outcome is RelayOutcome.COMPLETE


async def test_response_without_framing_ends_with_its_connection() -> None:
    async def script(wire: Wire) -> None:
        await wire.message()
        await wire.send(b"HTTP/1.0 200 OK\r\n\r\nold")
        wire.close()

    async with upstream(script) as up, relay(up.port) as r:
        for _ in range(2):
            client = await r.client()
            await client.send(get(b"/") + get(b"/"))
            assert (await client.message())[2] == b"old"
            assert (await client.message())[2] == b"old"
        assert up.connections == 4
        old = await r.client()
        await old.send(b"GET / HTTP/1.0\r\n\r\n")
        assert (await old.rest()).endswith(b"\r\n\r\nold")


@pytest.mark.parametrize(
    ("method", "response", "length"),
    [
        (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 12345\r\n\r\n", b"12345"),
        (b"HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", None),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 12345\r\n\r\n", b"12345"),
        (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n", None),
        (b"GET", b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", None),
    ],
)
async def test_responses_without_a_body(method: bytes, response: bytes, length: bytes | None) -> None:
    async with upstream(answering(response)) as up, relay(up.port) as r:
        client = await r.client()
        for _ in range(3):
            await client.send(method + get(b"/")[3:])
            _, headers = await client.head()
            assert headers.get(b"content-length") == length
            assert b"transfer-encoding" not in headers
            assert (await r.result()).outcome is RelayOutcome.COMPLETE
        # A simple server may send the body that its answer to HEAD announces, at any time.
        assert up.connections == (3 if method == b"HEAD" else 1)


async def test_late_body_after_head_is_not_the_next_answer() -> None:
    heads, sent_late = asyncio.Event(), asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.message()
        if heads.is_set():
            await wire.send(OK)
            return
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
        await heads.wait()
        with contextlib.suppress(ConnectionError):
            await wire.send(b"stray")
        sent_late.set()

    async with upstream(script) as up, relay(up.port) as r:
        client = await r.client()
        await client.send(b"HEAD" + get(b"/")[3:])
        await client.head()
        heads.set()
        await client.send(get(b"/"))
        assert (await client.message())[2] == b"ok"
        await asyncio.wait_for(sent_late.wait(), 5)


async def test_interim_responses() -> None:
    early = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    async with upstream(answering(early + OK)) as up, relay(up.port) as r:
        client = await r.client()
        for _ in range(2):
            await client.send(post(b"/", b"hello"))
            assert (await client.message())[2] == b"ok"
        assert up.connections == 1


async def test_100_continue_comes_once_the_upstream_is_connected() -> None:
    async def script(wire: Wire) -> None:
        _, headers, body = await wire.message()
        assert b"expect" not in headers
        assert body == b"hello"
        await wire.send(OK)

    async with upstream(script) as up, relay(up.port) as r:
        client = await r.client()
        await client.send(b"POST /a HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        assert (await client.head())[0] == 100
        await client.send(b"hello")
        assert (await client.message())[2] == b"ok"


@pytest.mark.parametrize("kept", [None, 64])
async def test_expect_towards_the_upstream(kept: int | None) -> None:
    """As the gateway does: a body, buffered or streamed, is sent after the ingress's 100."""
    asked, granted = asyncio.Event(), asyncio.Event()

    async def script(wire: Wire) -> None:
        _, headers = await wire.head()
        asked.set()
        assert headers[b"expect"] == b"100-continue"
        assert headers[b"content-length"] == b"5"
        await granted.wait()
        await wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert await wire.exactly(5) == b"hello"
        await wire.send(OK)

    async with upstream(script) as up, relay(up.port, expect=True, keep_body_bytes=kept) as r:
        client = await r.client()
        await client.send(b"POST /a HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        if kept is None:
            await asked.wait()
            granted.set()
        assert (await client.head())[0] == 100
        await client.send(b"hello")
        granted.set()
        assert (await client.message())[2] == b"ok"
        result = await r.result()
        assert (result.outcome, result.request_body_bytes) == (RelayOutcome.COMPLETE, 5)


async def test_held_answer_leaves_the_body_for_another_dispatch() -> None:
    def refuse(head: ResponseHead) -> list[Header] | None:
        return None if head.get(b"x-hibernode-refused") else []

    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.send(b"HTTP/1.1 503 No\r\nX-Hibernode-Refused: 1\r\nContent-Length: 4\r\n\r\nbusy")

    async with upstream(script) as up, relay(up.port, expect=True, response_filter=refuse) as r:
        client = await r.client()
        await client.send(b"POST /a HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        assert (await client.message())[2] == b"held"  # the rig's answer, not the upstream's
        result = await r.result()
        assert (result.outcome, result.head_status, result.request_body_bytes) == (RelayOutcome.HELD, 503, 0)


async def test_complete_held_answer_keeps_the_connection() -> None:
    async with (
        upstream(answering(b"HTTP/1.1 503 No\r\nContent-Length: 4\r\n\r\nbusy")) as up,
        relay(up.port, response_filter=lambda head: None) as r,
    ):
        client = await r.client()
        for _ in range(3):
            await client.send(get(b"/"))
            assert (await client.message())[2] == b"held"
        assert up.connections == 1


async def test_buffered_body_is_sent_with_its_length() -> None:
    async def script(wire: Wire) -> None:
        _, headers, body = await wire.message()
        assert (headers[b"content-length"], body) == (b"10", b"hellohello")
        await wire.send(OK)

    async with upstream(script) as up, relay(up.port, keep_body_bytes=100) as r:
        client = await r.client()
        await client.send(CHUNKED_POST + b"5\r\nhello\r\n" * 2 + b"0\r\n\r\n")
        assert (await client.message())[2] == b"ok"


async def test_body_too_large_to_buffer_is_streamed_completely() -> None:
    async def script(wire: Wire) -> None:
        _, _, body = await wire.message()
        assert body == bytes(range(256)) * 400
        await wire.send(OK)

    async with upstream(script) as up, relay(up.port, keep_body_bytes=1000) as r:
        client = await r.client()
        client.send_nowait(post(b"/", bytes(range(256)) * 400))
        assert (await client.message())[2] == b"ok"


async def test_response_before_the_end_of_the_body() -> None:
    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.send(b"HTTP/1.1 403 No\r\nContent-Length: 2\r\n\r\nno")
        await wire.rest()

    async with upstream(script) as up, relay(up.port) as r:
        client = await r.client()
        await client.send(b"POST /a HTTP/1.1\r\n" + HOST + b"Content-Length: 100\r\n\r\nthe beginning")
        status, _, body = await client.message()
        assert (status, body) == (403, b"no")
        result = await r.result()
        assert (result.outcome, result.request_body_bytes) == (RelayOutcome.COMPLETE, 13)
        await client.send(b"x" * 87 + get(b"/next"))
        assert await client.rest() == b""  # both connections are closed
        await eventually(lambda: not r.pool.connections)


async def test_request_and_response_stream_at_the_same_time() -> None:

    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while piece := await wire.chunk():
            await wire.send(b"%x\r\n%b\r\n" % (len(piece), piece.upper()))
        await wire.send(b"0\r\n\r\n")

    async with upstream(script) as up, relay(up.port) as r:
        client = await r.client()
        await client.send(CHUNKED_POST)
        assert (await client.head())[0] == 200
        for word in (b"to", b"and", b"fro"):
            await client.send(b"%x\r\n%b\r\n" % (len(word), word))
            assert await client.chunk() == word.upper()
        await client.send(b"0\r\n\r\n")
        assert await client.chunk() == b""
        await client.send(get(b"/"))
        assert (await r.result()).outcome is RelayOutcome.COMPLETE
