"""Two schedulers on one PostgreSQL, as processes: one is active, the other takes over."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import sqlalchemy as sa

from agent.adapters.daemon.token_file import read_token
from agent.core.errors import UnavailableError
from agent.scheduler.database.leader_lock import LeaderLock
from agent.v1.function_service_pb2 import DeployFunctionRequest, ListFunctionsRequest
from agent.v1.types_pb2 import FunctionSpec
from agent.v1.usage_service_pb2 import ListUsageRequest, UploadUsageWindowsRequest
from agent.wire.clients import DaemonChannel
from agent.wire.convert_usage import window_to_proto
from tests.contract.test_stores import window
from tests.fakes.postgresql import PostgreSQL

NODE, NODE_TOKEN = "gpu-7", "credential-of-gpu-7-0123456789"
PATIENCE_S = 20.0
TAKES_OVER_S = 5.0


@dataclass
class Scheduler:
    """A scheduler process with its own state directory; its messages to systemd arrive at `systemd`."""

    state: Path
    process: asyncio.subprocess.Process
    systemd: socket.socket

    def endpoints(self) -> dict[str, str]:
        try:
            found: dict[str, str] = json.loads((self.state / "endpoints.json").read_text())
        except FileNotFoundError:
            return {}
        return found

    def readyz(self) -> int:
        """Status of /readyz; 0 while it does not answer."""
        admin = self.endpoints().get("admin")
        if not admin:
            return 0
        try:
            with urlopen(f"http://{admin}/readyz", timeout=5) as answer:
                return int(answer.status)
        except HTTPError as error:
            with error:
                return error.code
        except OSError:
            return 0

    async def until_readyz(self, status: int) -> float:
        """Seconds until /readyz answers `status`."""
        began = time.monotonic()
        async with asyncio.timeout(PATIENCE_S):
            while await asyncio.to_thread(self.readyz) != status:
                assert self.process.returncode is None, "it has ended"
                await asyncio.sleep(0.05)
        return time.monotonic() - began

    async def ended(self) -> tuple[int, str]:
        """Exit code and stderr."""
        async with asyncio.timeout(PATIENCE_S):
            _, said = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, said.decode()

    def channel(self) -> DaemonChannel:
        found = self.endpoints()
        return DaemonChannel(found["grpc"], read_token(Path(found["token_file"])))


class Schedulers:
    """Schedulers by name, all on the same database."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.url = url
        self.started: list[Scheduler] = []
        (folder / "token").touch(0o600)
        (folder / "token").write_text(NODE_TOKEN)

    async def start(self, name: str) -> Scheduler:
        state = self.folder / name
        (state / "endpoints.json").unlink(missing_ok=True)
        config = self.folder / f"{name}.yaml"
        config.write_text(
            f"state_dir: {state}\ngateway: {{port: 0}}\ngrpc: {{port: 0}}\nadmin: {{port: 0}}\n"
            f"nodes: [{{name: {NODE}, token_file: {self.folder}/token}}]\ndatabase: '{self.url}'\n"
        )
        systemd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notify = self.folder / f"{name}-{len(self.started)}.socket"
        systemd.bind(str(notify))
        systemd.settimeout(PATIENCE_S)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "agent.daemons.scheduler", "--config", str(config)),
            stderr=asyncio.subprocess.PIPE,
            env={"NOTIFY_SOCKET": str(notify), "PATH": "/usr/bin:/bin", "GRPC_ENABLE_FORK_SUPPORT": "0"},
        )
        self.started.append(Scheduler(state, process, systemd))
        return self.started[-1]


@pytest.fixture
def url(postgres: PostgreSQL) -> Iterator[str]:
    with postgres.database() as name:
        yield postgres.url(name)


@pytest.fixture
async def schedulers(tmp_path: Path, url: str) -> AsyncIterator[Schedulers]:
    made = Schedulers(tmp_path, url)
    yield made
    for one in made.started:
        if one.process.returncode is None:
            one.process.kill()
            await one.process.communicate()
        one.systemd.close()


def lead_sessions(postgres: PostgreSQL, schedulers: Schedulers) -> list[int]:
    """Server processes that hold an advisory lock in the database."""
    name = schedulers.url.partition("@/")[2].partition("?")[0]
    locks = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted"
    return [int(row[0]) for row in postgres.run(locks, database=name)]


async def test_the_standby_takes_over_from_a_killed_scheduler(schedulers: Schedulers) -> None:
    active = await schedulers.start("a")
    await active.until_readyz(200)
    standby = await schedulers.start("b")
    await standby.until_readyz(503)
    said = await asyncio.to_thread(standby.systemd.recv, 4096)
    assert said == b"READY=1\nSTATUS=standing by: another scheduler is active on this database"
    assert set(standby.endpoints()) == {"admin", "token_file"}, "no gateway, no API"

    async with active.channel() as channel:
        spec = FunctionSpec(name="ocr", entrypoint=["app"])
        await channel.call(channel.functions.DeployFunction, DeployFunctionRequest(spec=spec, target=0), 10)
    async with DaemonChannel(active.endpoints()["grpc"], NODE_TOKEN) as agent:
        windows = UploadUsageWindowsRequest(windows=[window_to_proto(window())])
        await agent.call(agent.usage.UploadUsageWindows, windows, 10)

    active.process.kill()
    assert await standby.until_readyz(200) < TAKES_OVER_S
    async with standby.channel() as channel:
        functions = await channel.call(channel.functions.ListFunctions, ListFunctionsRequest(), 10)
        assert [one.name for one in functions.functions] == ["ocr"]
        usage = await channel.call(channel.usage.ListUsage, ListUsageRequest(), 10)
        assert [(row.function, row.window_count) for row in usage.rows] == [("ocr", 1)]

    back = await schedulers.start("a")
    await back.until_readyz(503)


async def test_a_scheduler_without_its_session_becomes_a_standby(schedulers: Schedulers, postgres: PostgreSQL) -> None:
    first = await schedulers.start("a")
    await first.until_readyz(200)
    second = await schedulers.start("b")
    await second.until_readyz(503)
    (session,) = lead_sessions(postgres, schedulers)
    postgres.run(f"SELECT pg_terminate_backend({session})")
    code, said = await first.ended()
    assert code == 5
    assert "hibernode: LEAD_LOST: this scheduler's lock in the database may be gone" in said
    assert await second.until_readyz(200) < TAKES_OVER_S
    (session_of_second,) = lead_sessions(postgres, schedulers)
    assert session_of_second != session


async def test_a_scheduler_whose_database_does_not_answer_ends(schedulers: Schedulers, postgres: PostgreSQL) -> None:
    """The server hangs: the scheduler does not know whether it still holds the lock."""
    active = await schedulers.start("a")
    await active.until_readyz(200)
    (session,) = lead_sessions(postgres, schedulers)
    os.kill(session, signal.SIGSTOP)
    try:
        code, said = await active.ended()
    finally:
        os.kill(session, signal.SIGCONT)
    assert code == 5
    assert "LEAD_LOST" in said
    assert "no answer within 4 s" in said


async def test_a_stopping_scheduler_hands_over_and_a_standby_stops_on_request(schedulers: Schedulers) -> None:
    first = await schedulers.start("a")
    await first.until_readyz(200)
    second, third = await schedulers.start("b"), await schedulers.start("c")
    await second.until_readyz(503)
    await third.until_readyz(503)
    third.process.send_signal(signal.SIGTERM)
    assert (await third.ended())[0] == 0
    first.process.send_signal(signal.SIGTERM)
    assert (await first.ended())[0] == 0
    assert await second.until_readyz(200) < TAKES_OVER_S


async def test_a_standby_outlives_a_restart_of_the_database(postgres: PostgreSQL, url: str) -> None:
    active, standby = LeaderLock(url, poll_s=0.05), LeaderLock(url, poll_s=0.05)
    assert await active.take()
    assert not await standby.take()
    postgres.stop()
    waiting = asyncio.create_task(standby.wait())
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(UnavailableError, match="LEAD_LOST"):
            await active.watch()
        postgres.start()
        await waiting
    active.close()
    standby.close()


async def test_a_lead_whose_session_is_not_its_own_is_none(postgres: PostgreSQL, url: str) -> None:
    """As behind a pooler, which may run the next statement in a session without the lock."""
    lead = LeaderLock(url, poll_s=0.01)
    assert await lead.take()
    assert lead._connection is not None
    await lead._database.run(partial(lead._connection.execute, sa.text("SELECT pg_advisory_unlock_all()")))
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(UnavailableError, match="a pooler has to keep sessions"):
            await lead.watch()
    lead.close()


async def test_on_sqlite_the_lock_is_always_held(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/scheduler.db"
    first, second = LeaderLock(url), LeaderLock(url)
    assert [await first.take(), await second.take()] == [True, True]
    watching = asyncio.create_task(first.watch())
    await asyncio.sleep(0)
    assert not watching.done()
    watching.cancel()
    first.close()
    second.close()
