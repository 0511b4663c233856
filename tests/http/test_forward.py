"""One exchange between a client, the engine and an upstream: streamed, metered, and never half a success."""

from __future__ import annotations

import asyncio
import json
import socket
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.http.forward import Outcome
from agent.http.limits import Limits
from agent.http.message import Header, ResponseHead
from tests.http.rig import PATIENCE_S, Wire, answering, connect, eventually, relay, upstream
from tests.http.test_server import HOST, get, post

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: text/plain\r\n\r\nok"
CHUNKED_POST = b"POST /a HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"


async def test_a_request_there_and_back() -> None:
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
        assert (result.outcome, result.head_status, result.bytes_sent_upstream) == (Outcome.COMPLETE, 201, True)
        assert (result.request_body_bytes, result.response_body_bytes, result.reused) == (5, 2, False)
        assert r.hooks == ["sent", "first", "last"]
    assert seen == [(0, {b"": b"POST /p?q=1 HTTP/1.1", b"host": b"f", b"x-b": b"c", b"content-length": b"5"}, b"hello")]


async def test_connections_are_kept_on_both_sides() -> None:
    async with upstream(answering(OK)) as up, relay(up.port) as r:
        client = await r.client()
        for number in range(20):
            await client.send(get(b"/"))
            assert (await client.message())[2] == b"ok"
            assert (await r.result()).reused is (number > 0)
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
    """Random bodies, random framing, random cuts: what arrives is what was sent."""
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
            assert (await r.result()).outcome is Outcome.COMPLETE

    asyncio.run(story())


async def test_server_sent_events_arrive_one_by_one() -> None:
    """Each event is on the client's side before the upstream makes the next."""
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
        assert (await r.result()).outcome is Outcome.COMPLETE


async def test_a_response_without_framing_ends_with_its_connection() -> None:
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
            assert (await r.result()).outcome is Outcome.COMPLETE
        assert up.connections == 1


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
    """The gateway's side: the body goes only after the ingress has said 100, kept or streamed."""
    granted = asyncio.Event()

    async def script(wire: Wire) -> None:
        _, headers = await wire.head()
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
            await eventually(lambda: r.hooks == ["sent"])
            granted.set()
        assert (await client.head())[0] == 100
        await client.send(b"hello")
        granted.set()
        assert (await client.message())[2] == b"ok"
        result = await r.result()
        assert (result.outcome, result.request_body_bytes) == (Outcome.COMPLETE, 5)


async def test_a_held_answer_leaves_the_body_for_another_try() -> None:
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
        assert (result.outcome, result.head_status, result.request_body_bytes) == (Outcome.HELD, 503, 0)
        assert r.exchanges[0].awaits_continue


async def test_a_held_answer_that_is_whole_keeps_the_connection() -> None:
    async with (
        upstream(answering(b"HTTP/1.1 503 No\r\nContent-Length: 4\r\n\r\nbusy")) as up,
        relay(up.port, response_filter=lambda head: None) as r,
    ):
        client = await r.client()
        for _ in range(3):
            await client.send(get(b"/"))
            assert (await client.message())[2] == b"held"
        assert up.connections == 1


async def test_a_kept_body_is_sent_with_its_length() -> None:
    async def script(wire: Wire) -> None:
        _, headers, body = await wire.message()
        assert (headers[b"content-length"], body) == (b"10", b"hellohello")
        await wire.send(OK)

    async with upstream(script) as up, relay(up.port, keep_body_bytes=100) as r:
        client = await r.client()
        await client.send(CHUNKED_POST + b"5\r\nhello\r\n" * 2 + b"0\r\n\r\n")
        assert (await client.message())[2] == b"ok"


async def test_a_body_too_large_to_keep_is_streamed_whole() -> None:
    async def script(wire: Wire) -> None:
        _, _, body = await wire.message()
        assert body == bytes(range(256)) * 400
        await wire.send(OK)

    async with upstream(script) as up, relay(up.port, keep_body_bytes=1000) as r:
        client = await r.client()
        client.send_blindly(post(b"/", bytes(range(256)) * 400))
        assert (await client.message())[2] == b"ok"


async def test_an_early_response_before_the_body_ended() -> None:
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
        assert (result.outcome, result.request_body_bytes) == (Outcome.COMPLETE, 13)
        await client.send(b"x" * 87 + get(b"/next"))
        assert await client.rest() == b""  # not used on: neither here nor upstream
        await eventually(lambda: not r.pool.connections)


async def test_both_ways_at_once() -> None:
    """A response that begins before the request has ended, and follows it."""

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
        assert (await r.result()).outcome is Outcome.COMPLETE


# --- what goes wrong ---------------------------------------------------------------------------


async def test_nobody_listens() -> None:
    async with upstream(answering(OK)) as up:
        port = up.port
    async with relay(port) as r:
        client = await r.client()
        await client.send(post(b"/", b"hello"))
        status, _, body = await client.message()
        assert (status, json.loads(body)["Code"]) == (503, "UpstreamConnectFailed")
        result = await r.result()
        assert (result.outcome, result.bytes_sent_upstream) == (Outcome.CONNECT_FAILED, False)
        assert r.hooks == []
        await client.send(get(b"/"))  # the client's connection is as good as before
        assert (await client.message())[0] == 503


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-",
        b"garbage\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 20,
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 40000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\nzz\r\n",  # broken in the first read
    ],
)
async def test_an_upstream_without_an_answer(reply: bytes) -> None:
    async def script(wire: Wire) -> None:
        await wire.message()
        await wire.send(reply)

    async with upstream(script) as up, relay(up.port) as r:
        client = await r.client()
        await client.send(get(b"/"))
        status, _, body = await client.message()
        assert (status, json.loads(body)["Code"]) == (502, "UpstreamBroken")
        result = await r.result()
        assert (result.outcome, result.bytes_sent_upstream) == (Outcome.UPSTREAM_FAILED_BEFORE_HEAD, True)
        assert (r.hooks[0], r.hooks[-1]) == ("sent", "last")
        await eventually(lambda: not r.pool.connections)


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n6\r\nha",
    ],
)
async def test_an_upstream_that_dies_in_mid_body(reply: bytes) -> None:
    """The client must be able to tell: too few bytes, or no last chunk."""

    async def script(wire: Wire) -> None:
        await wire.message()
        await wire.send(reply)

    async with upstream(script) as up, relay(up.port) as r:
        client = await r.client()
        await client.send(get(b"/"))
        _, headers = await client.head()
        rest = await client.rest()
        if b"content-length" in headers:
            assert len(rest) < 10
        else:
            assert not rest.endswith(b"0\r\n\r\n")
        result = await r.result()
        assert (result.outcome, result.head_status) == (Outcome.UPSTREAM_FAILED_MID_BODY, 200)
        assert r.hooks == ["sent", "first", "last"]


async def test_an_http10_client_gets_a_reset_instead_of_half_a_body() -> None:
    go = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.message()
        await wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
        await go.wait()

    async with upstream(script) as up, relay(up.port) as r:
        client = await r.client()
        await client.send(b"GET / HTTP/1.0\r\n\r\n")
        await client.until(b"half")
        go.set()
        with pytest.raises(ConnectionResetError):
            await client.exactly(1)


async def test_a_reset_upstream_does_not_end_a_body_without_framing() -> None:
    go = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.message()
        await wire.send(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        await go.wait()
        linger_zero(wire)

    async with upstream(script) as up, relay(up.port) as r:
        client = await r.client()
        await client.send(get(b"/"))
        await client.until(b"half")
        go.set()
        assert not (await client.rest()).endswith(b"0\r\n\r\n")
        assert (await r.result()).outcome is Outcome.UPSTREAM_FAILED_MID_BODY


def linger_zero(wire: Wire) -> None:
    """Resets the connection, as a killed process with unread input does."""
    sock = wire._writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wire.reset()


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (b"", Outcome.TIMEOUT_BEFORE_HEAD),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", Outcome.TIMEOUT_MID_BODY),
    ],
)
async def test_the_deadline_closes_the_upstream(reply: bytes, outcome: Outcome) -> None:
    closed = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.message()
        await wire.send(reply)
        assert await wire.rest() == b""
        closed.set()

    async with upstream(script) as up, relay(up.port, deadline_s=0.1) as r:
        client = await r.client()
        await client.send(get(b"/"))
        if reply:
            assert (await client.rest()).endswith(b"half")
        else:
            status, _, body = await client.message()
            assert (status, json.loads(body)["Code"]) == (504, "UpstreamTimeout")
        assert (await r.result()).outcome is outcome
        assert r.hooks[-1] == "last"
        async with asyncio.timeout(PATIENCE_S):
            await closed.wait()


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n"])
async def test_a_client_that_leaves_cancels_the_upstream(reply: bytes) -> None:
    began, closed = asyncio.Event(), asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.message()
        await wire.send(reply)
        began.set()
        assert await wire.rest() == b""
        closed.set()

    async with upstream(script) as up, relay(up.port) as r, asyncio.timeout(PATIENCE_S):
        client = await r.client()
        await client.send(get(b"/"))
        await began.wait()
        if reply:
            await client.until(b"hi")
        client.close()
        await closed.wait()
        assert (await r.result()).outcome is Outcome.CLIENT_GONE
        assert r.hooks[-1] == "last"


async def test_a_client_that_leaves_in_mid_upload() -> None:
    began, closed = asyncio.Event(), asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.head()
        began.set()
        assert await wire.rest() == b"half"
        closed.set()

    async with upstream(script) as up, relay(up.port) as r, asyncio.timeout(PATIENCE_S):
        client = await r.client()
        await client.send(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 9\r\n\r\nhalf")
        await began.wait()
        client.close()
        await closed.wait()
        assert (await r.result()).outcome is Outcome.CLIENT_GONE


@pytest.mark.parametrize(
    ("rest", "limits", "status"),
    [
        (b"zz\r\n", Limits(), 400),
        (b"fff\r\n", Limits(body_bytes=1000), 413),
        (b"5\r\nhe", Limits(body_stall_s=0.05), 408),
    ],
)
async def test_a_request_body_that_goes_bad(rest: bytes, limits: Limits, status: int) -> None:
    """The upstream never sees an end of it."""
    upstream_saw: asyncio.Queue[bytes] = asyncio.Queue()

    async def script(wire: Wire) -> None:
        await wire.head()
        upstream_saw.put_nowait(await wire.rest())

    async with upstream(script) as up, relay(up.port, limits=limits) as r, asyncio.timeout(PATIENCE_S):
        client = await r.client()
        await client.send(CHUNKED_POST + b"4\r\ngood\r\n")
        await eventually(lambda: r.hooks == ["sent"])
        await client.send(rest)
        answer, headers, _ = await client.message()
        assert (answer, headers[b"connection"]) == (status, b"close")
        assert (await r.result()).outcome is Outcome.CLIENT_FAILED
        assert not (await upstream_saw.get()).endswith(b"0\r\n\r\n")


async def test_bytes_behind_a_response_cost_the_connection() -> None:
    """Whose they are nobody can tell: least of all the next client's."""
    async with upstream(answering(OK + b"HTTP/1.1 200 OK\r\n\r\npoison")) as up, relay(up.port) as r:
        client = await r.client()
        for _ in range(3):
            await client.send(get(b"/"))
            assert (await client.message())[2] == b"ok"
        assert up.connections == 3


async def test_a_fault_of_the_filter_reaches_the_callers_hands() -> None:
    def broken(head: ResponseHead) -> list[Header] | None:
        return [(b"x", b"a\r\nb: c")]

    faults: list[BaseException] = []
    async with upstream(answering(OK)) as up, relay(up.port, response_filter=broken) as r:
        r.server.on_fault = faults.append
        client = await r.client()
        await client.send(get(b"/"))
        assert (await client.message())[0] == 500
        assert isinstance(faults[0], ValueError)
        assert r.hooks == ["sent", "first", "last"]


# --- back-pressure -----------------------------------------------------------------------------


async def test_a_slow_client_holds_the_upstream_back() -> None:
    size = 64 << 20
    sent = 0

    async def script(wire: Wire) -> None:
        nonlocal sent
        await wire.message()
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size >> 16):
            await wire.send(b"x" * 65536)
            sent += 65536

    async with upstream(script) as up, relay(up.port) as r:
        client = await connect(r.server.port, buffer_bytes=1024)
        await client.send(get(b"/"))
        await client.head()
        await eventually(lambda: r.pool.reading_pauses > 0)
        (connection,) = r.server.connections
        high = 65536 + 2 * 2**18  # the limit, and what two reads may bring before the pause works
        assert connection.transport.get_write_buffer_size() < high
        assert sent < size  # the rest waits at its source
        taken = 0
        while taken < size:
            taken += len(await client.exactly(min(1 << 20, size - taken)))
            assert connection.transport.get_write_buffer_size() < high
        assert (await r.result()).response_body_bytes == size


async def test_a_slow_upstream_holds_the_client_back() -> None:
    size = 30 << 20
    go = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.head()
        await go.wait()
        taken = 0
        while taken < size:
            taken += len(await wire.exactly(min(1 << 20, size - taken)))
        await wire.send(OK)

    async with upstream(script) as up, relay(up.port) as r:
        client = await r.client()
        client.send_blindly(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % size + b"x" * size)
        await eventually(lambda: r.server.reading_pauses > 0)
        (connection,) = r.pool.connections
        assert connection.transport.get_write_buffer_size() < 65536 + 2 * 2**18
        go.set()
        assert (await client.message())[2] == b"ok"
        assert (await r.result()).request_body_bytes == size


async def test_a_body_nobody_takes_yet_is_kept_up_to_the_limit() -> None:
    """While a request waits for a connection, its client is made to wait, not the memory to grow."""
    size = 8 << 20
    async with upstream(answering(OK)) as up, relay(up.port) as r:
        gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        acquire = r.pool.acquire

        async def slow(deadline: float, *, fresh: bool = False):  # type: ignore[no-untyped-def]
            await gate
            return await acquire(deadline, fresh=fresh)

        r.pool.acquire = slow  # type: ignore[method-assign]
        client = await r.client()
        client.send_blindly(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % size + b"x" * size)
        await eventually(lambda: r.server.reading_pauses > 0)
        assert r.exchanges[0]._buffered < 65536 + 2 * 2**18
        gate.set_result(None)
        assert (await client.message())[2] == b"ok"
