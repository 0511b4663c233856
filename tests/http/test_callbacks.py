"""Handlers without a task: plain functions that take an exchange over and answer by callbacks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from agent.http.exchange import Exchange
from agent.http.forward import ForwardResult, forward, forward_now
from agent.http.header_filter import instance_answer_headers, request_headers
from agent.http.limits import Limits, UpstreamLimits
from agent.http.message import Header, ResponseHead
from agent.http.pool import Pool
from agent.http.relay import RelayOutcome
from tests.http.rig import answering, connect, eventually, paused, serving, upstream
from tests.http.test_server import get, post

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def at_once(exchange: Exchange) -> None:
    exchange.begin(200, None, [], len(exchange.head.target))
    exchange.write(exchange.head.target)
    exchange.finish()


async def test_long_pipeline_answered_at_once_does_not_recurse() -> None:
    async with serving(at_once) as server:
        wire = await connect(server.port)
        count = 5000
        wire.send_nowait(b"".join(get(b"/%d" % n) for n in range(count)))
        for n in range(count):
            assert (await wire.message())[2] == b"/%d" % n


async def test_pipeline_with_unread_answers_is_bounded() -> None:
    answered = 0

    def handler(exchange: Exchange) -> None:
        nonlocal answered
        answered += 1
        exchange.begin(200, None, [], 100_000)
        exchange.write(b"x" * 100_000)
        exchange.finish()

    async with serving(handler, Limits(buffer_bytes=1000)) as server:
        wire = await connect(server.port, buffer_bytes=1024)
        count = 1000
        wire.send_nowait(get(b"/") * count)
        await eventually(lambda: paused(server.connections))
        (connection,) = server.connections
        await eventually(lambda: not connection.writable)
        assert answered < count
        assert connection.transport.get_write_buffer_size() < 65536 + 2 * 100_000
        for _ in range(count):
            assert len((await wire.message())[2]) == 100_000
        assert answered == count


async def test_plain_handler_that_raises_is_answered_500() -> None:
    def handler(exchange: Exchange) -> None:
        raise LookupError

    async with serving(handler) as server:
        faults: list[BaseException] = []
        server.on_fault = lambda error, _: faults.append(error)
        wire = await connect(server.port)
        await wire.send(get(b"/"))
        assert (await wire.message())[0] == 500
        assert isinstance(faults[0], LookupError)


async def test_forward_now() -> None:
    """`forward_now` with an idle connection, `forward` without one."""
    calls: list[str] = []
    results: list[ForwardResult] = []
    loop = asyncio.get_running_loop()

    def clean(head: ResponseHead) -> list[Header]:
        return instance_answer_headers(head.headers)

    def handler(exchange: Exchange) -> Awaitable[None] | None:
        head, deadline = exchange.head, loop.time() + 5
        headers = request_headers(head.headers)
        connection = pool.take()
        if connection is None:
            calls.append("task")

            async def connect_first() -> None:
                results.append(
                    await forward(
                        exchange, pool, head.method, head.target, headers, deadline=deadline, response_filter=clean
                    )
                )

            return connect_first()
        calls.append("now")
        forward_now(
            exchange,
            pool,
            connection,
            head.method,
            head.target,
            headers,
            deadline=deadline,
            response_filter=clean,
            on_done=results.append,
        )
        return None

    async with upstream(answering(OK)) as up, serving(handler) as server:
        pool = Pool("127.0.0.1", up.port, UpstreamLimits())
        wire = await connect(server.port)
        for _ in range(3):
            await wire.send(post(b"/", b"hello"))
            assert (await wire.message())[2] == b"ok"
        assert calls == ["task", "now", "now"]
        assert [result.outcome for result in results] == [RelayOutcome.COMPLETE] * 3
        assert up.connections == 1
        pool.close()
