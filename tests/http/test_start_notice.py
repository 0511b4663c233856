"""The start notice (102): after a kill of the serving process its peer knows which requests had started."""

from __future__ import annotations

import asyncio
import socket
import sys
from contextlib import suppress

import pytest

from agent.http.exchange import Exchange
from tests.http.rig import PATIENCE_S, connect, serving

HOST = b"Host: f\r\n"
KILLED = """\
import asyncio, os, signal, sys
import uvloop
from agent.http.exchange import Exchange
from agent.http.limits import Limits
from agent.http.server import serve

async def handler(exchange: Exchange) -> None:
    if exchange.head.target == b"/begun":
        exchange.send_processing()
    os.kill(os.getpid(), signal.SIGKILL)

async def main() -> None:
    server = await serve(handler, "127.0.0.1", 0, Limits(), request_ids=str, on_fault=print)
    print(server.port, flush=True)
    await asyncio.sleep(60)

(uvloop.run if sys.argv[1] == "uvloop" else asyncio.run)(main())
"""


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize(("target", "told"), [(b"/begun", b"HTTP/1.1 102 Processing\r\n\r\n"), (b"/waits", b"")])
async def test_start_notice_survives_a_kill(loop: str, target: bytes, told: bytes) -> None:
    """The kill follows at once; the kernel sends corked bytes and then closes in order."""
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", KILLED, loop, stdout=asyncio.subprocess.PIPE)
    assert child.stdout is not None
    try:
        async with asyncio.timeout(PATIENCE_S):
            port = int(await child.stdout.readline())
        wire = await connect(port)
        await wire.send(b"GET %b HTTP/1.1\r\n%b\r\n" % (target, HOST))
        assert await wire.rest() == told
        wire.close()
    finally:
        with suppress(ProcessLookupError):
            child.kill()
        await child.wait()


async def test_start_notice_is_corked_until_the_next_message() -> None:
    corked = []

    def option(exchange: Exchange) -> int:
        sock = exchange._connection.transport.get_extra_info("socket")
        return int(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CORK))

    async def handler(exchange: Exchange) -> None:
        exchange.send_processing()
        corked.append(option(exchange))
        exchange.send_continue()
        corked.append(option(exchange))
        await exchange.buffer_body(100)
        exchange.send_processing()
        corked.append(option(exchange))
        await exchange.answer(200, [], b"ok")
        corked.append(option(exchange))

    async with serving(handler) as server:
        wire = await connect(server.port)
        await wire.send(b"POST /a HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert [(await wire.head())[0], (await wire.head())[0]] == [102, 100]
        await wire.send(b"hi")
        assert [(await wire.head())[0], (await wire.head())[0]] == [102, 200]
        assert corked == [1, 0, 1, 0]
