"""More connections than the gateway accepts: open ones are served, new ones are refused at once."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager

from tests.e2e.raw_http import ask_raw, connection
from tests.e2e.stack import echo, running_stack

LOGIN_SHELL = 256
"""Open files of a login shell. Linux allows 1,024; fewer show the same with fewer connections."""
CONNECTIONS = 300
QUICK_S = 1.0
REQUEST = b"GET /fn/ocr/answer?n=1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@contextmanager
def as_in_a_login_shell() -> Iterator[None]:
    """Processes started in the block have a low limit of open files, unless they raise it."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (LOGIN_SHELL, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_full_gateway_serves_open_connections_and_refuses_new_ones() -> None:
    settings = {"limits": {"connections": CONNECTIONS}}
    async with AsyncExitStack() as world:
        with as_in_a_login_shell():
            stack = await world.enter_async_context(running_stack(scheduler_settings=settings))
        await stack.deploy(echo("ocr"), target=1)
        async with AsyncExitStack() as crowd:
            idle = [await crowd.enter_async_context(connection(stack.gateway)) for _ in range(CONNECTIONS)]
            for _ in range(3):
                began = time.monotonic()
                refused = await ask_raw(stack.gateway, REQUEST)
                assert (refused.status, refused.code) == (503, "TooManyConnections")
                assert refused.headers["retry-after"] == "1"
                assert time.monotonic() - began < QUICK_S
            reader, writer = idle[-1]
            writer.write(REQUEST)
            async with asyncio.timeout(10):
                assert (await reader.readline()).split()[1] == b"200"
                await reader.read()
        await stack.ask_correctly("ocr", 2)
        await stack.remove_functions(["ocr"])
