"""Misbehaving images: each ends with its own reason, stays within its limits, and leaves nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil

from agent.core.errors import HibernodeError
from agent.core.types import MIB, SECOND_NS, ContainerOptions, FunctionSpec
from agent.v1 import instance_service_pb2 as instances_pb
from agent.v1 import types_pb2
from agent.wire.clients import DaemonChannel
from agent.wire.convert_function import function_to_proto
from tests.e2e.stack import CALL_S, running_stack, until
from tests.engines import host_traces, images
from tests.engines.engines import Engine
from tests.engines.functions import awake, bad

LOG_LIMIT_BYTES = MIB
PIDS = 48
SETTINGS = {"runtime": {"ready_timeout": "4s", "stop_timeout": "500ms", "log_limit": "1MiB"}}
RUNNING, STOPPED = types_pb2.Instance.STATE_RUNNING, types_pb2.Instance.STATE_STOPPED


@dataclass
class Agent:
    """A lone agent and the calls of the tests."""

    channel: DaemonChannel

    async def create(self, spec: FunctionSpec) -> types_pb2.Instance:
        """Create an instance and wait until it runs."""
        request = instances_pb.CreateInstanceRequest(
            request_id=spec.name, spec=function_to_proto(awake(spec), reveal_secrets=True), wait=True
        )
        return (await self.channel.call(self.channel.instances.CreateInstance, request, CALL_S)).instance

    async def refused(self, spec: FunctionSpec) -> HibernodeError:
        """The error of a failed start."""
        try:
            made = await self.create(spec)
        except HibernodeError as error:
            return error
        raise AssertionError(f"{spec.name} came up: {made}")

    async def stop(self, uid: str) -> types_pb2.Instance:
        request = instances_pb.StopInstanceRequest(uid=uid, grace_ns=SECOND_NS)
        return (await self.channel.call(self.channel.instances.StopInstance, request, CALL_S)).instance


@asynccontextmanager
async def agent_on(engine: Engine) -> AsyncIterator[Agent]:
    images.load(engine, images.BAD)
    async with running_stack(engine_socket=engine.socket, agent_settings=SETTINGS, scheduler=False) as stack:
        async with stack.channel("agent") as channel:
            yield Agent(channel)

        async def all_gone() -> bool:
            return engine.ps() == []

        await until("no container is left", all_gone, 10.0)
        state_uuid = (stack.folder / "agent" / "uuid").read_text().strip()
    left = await asyncio.to_thread(engine.leftovers, state_uuid)
    assert not left, left


async def test_images_that_do_not_start_give_the_reason(engine: Engine) -> None:
    async with agent_on(engine) as agent:
        mute = await agent.refused(bad("mute", "never-listens"))
        assert mute.reason == "FUNCTION_NOT_STARTED"
        assert "Connection refused" in mute.message

        short = await agent.refused(bad("short", "exits"))
        assert short.reason == "FUNCTION_NOT_STARTED"
        assert "exited with code 3" in short.message
        assert "no configuration found" in short.message, "the end of its log"

        hungry = await agent.refused(bad("hungry", "eats-memory"))
        assert hungry.reason == "OUT_OF_MEMORY"


async def test_instance_that_ignores_sigterm_is_killed(engine: Engine) -> None:
    async with agent_on(engine) as agent:
        deaf = await agent.create(bad("deaf", "ignores-sigterm"))
        assert deaf.state == RUNNING, deaf.state_message
        assert (await agent.stop(deaf.uid)).state == STOPPED
        assert not psutil.pid_exists(deaf.pid)


async def test_log_flood_does_not_fill_the_disk(engine: Engine) -> None:
    async with agent_on(engine) as agent:
        loud = await agent.create(bad("loud", "floods-log"))
        assert loud.state == RUNNING, loud.state_message
        sizes: list[int] = []

        async def turned_over() -> bool:
            """Whether the log was rotated: its size on disk has fallen."""
            sizes.append(log_bytes(engine, loud.container_id))
            return any(later < earlier for earlier, later in pairwise(sizes))

        await until("the log was rotated", turned_over, 30.0)
        # An engine checks the size after writing: at most one buffer more.
        assert max(sizes) <= LOG_LIMIT_BYTES + LOG_LIMIT_BYTES // 4
        assert (await agent.stop(loud.uid)).state == STOPPED


def log_bytes(engine: Engine, container: str) -> int:
    total = 0
    for file in engine.folder.rglob(f"*{container}*/**/*.log*"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # just rotated
            continue
    return total


async def test_fork_bomb_is_contained(engine: Engine) -> None:
    async with agent_on(engine) as agent:
        spec = bad("bomb", "forks", container=ContainerOptions(pids_limit=PIDS))
        creating = asyncio.create_task(agent.refused(spec))
        most = 0

        async def full() -> bool:
            nonlocal most
            pids = [pids_of(entry["Id"]) for entry in engine.ps()]
            most = max([most, *pids])
            return most >= PIDS - 8

        await until("it has forked as often as it may", full, 20.0)
        assert (await creating).reason == "FUNCTION_NOT_STARTED"
        assert most <= PIDS


def pids_of(container: str) -> int:
    """Number of its processes now, by the hierarchy that shows most."""
    counts = [0]
    for path in host_traces.cgroups_of(container):
        try:
            counts.append(sum(len(file.read_text().split()) for file in Path(path).rglob("cgroup.procs")))
        except OSError:  # gone meanwhile
            continue
    return max(counts)


async def test_stray_processes_end_with_their_container(engine: Engine) -> None:
    async with agent_on(engine) as agent:
        untidy = await agent.create(bad("untidy", "leaves-strays"))
        assert untidy.state == RUNNING, untidy.state_message
        assert pids_of(untidy.container_id) == 4
        assert (await agent.stop(untidy.uid)).state == STOPPED
        assert pids_of(untidy.container_id) == 0
