"""A peer that is stopped: a load stream has no deadline, so only keepalive ends it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.core.errors import UnavailableError
from agent.v1.scheduler_service_pb2 import ReportLoadRequest
from agent.wire.clients import DaemonChannel
from tests.wire.daemon import NODE_TOKEN

NOTICED_S = 30.0
"""Twice the 15 s of the options. Without the HTTP/2 ping's own limit it takes 70 s."""
CHILD = """
import asyncio, sys
from pathlib import Path
from tests.wire.daemon import running

async def main():
    async with running(Path(sys.argv[1])) as daemon:
        print(daemon.tcp, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A daemon in a process of its own, which can be stopped."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CHILD, str(tmp_path), stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    try:
        yield process
    finally:
        process.kill()
        await process.wait()


@pytest.mark.slow
@pytest.mark.timeout(90)
async def test_a_stopped_scheduler_is_noticed(daemon: asyncio.subprocess.Process) -> None:
    assert daemon.stdout is not None
    async with DaemonChannel((await daemon.stdout.readline()).decode().strip(), NODE_TOKEN) as node:
        stream = node.report_load()
        await stream.send(ReportLoadRequest(epoch=1, sequence=1))
        assert await stream.receive() is not None
        os.kill(daemon.pid, signal.SIGSTOP)
        with pytest.raises(UnavailableError) as ended:
            await asyncio.wait_for(stream.receive(), NOTICED_S)
        assert ended.value.reason == "UNREACHABLE"
