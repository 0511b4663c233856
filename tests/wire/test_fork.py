"""gRPC's fork handlers log nothing when processes start beside a busy gRPC server on uvloop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

STORY = """
import asyncio, pathlib, sys
import grpc.aio  # the handlers stay off even if this import comes first
import uvloop
from agent.v1.instance_service_pb2 import GetInstanceRequest
from agent.wire.clients import DaemonChannel
from tests.wire.daemon import running

async def story():
    async with running(pathlib.Path(sys.argv[1])) as daemon, DaemonChannel(daemon.unix) as channel:
        async def talk():
            for _ in range(50):
                await channel.call(channel.instances.GetInstance, GetInstanceRequest(uid="whoami"), 10)
        talking = asyncio.create_task(talk())
        for _ in range(5):
            process = await asyncio.create_subprocess_exec(sys.executable, "-S", "-c", "")
            assert await process.wait() == 0
        await talking
        print("done")

uvloop.run(story())
"""


def test_no_fork_warnings(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", STORY, str(tmp_path)], cwd=root, capture_output=True, text=True, timeout=50, check=False
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "done\n", "")
