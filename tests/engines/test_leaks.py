"""Two hundred instances, twenty at a time: agent and engine return everything that they took from the host."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from agent.v1 import instance_service_pb2 as instances_pb
from agent.v1 import types_pb2
from agent.wire.clients import DaemonChannel
from agent.wire.convert_function import function_to_proto
from tests.e2e.stack import CALL_S, Stack, running_stack
from tests.engines import host_traces
from tests.engines.engines import Engine
from tests.engines.functions import awake, busybox

CYCLES = 200
AT_ONCE = 20
HANDS = 4
"""Number of concurrent instances."""
FIRST = 8
"""Instances before the first count, by which one-time resources (threads, connections, a network) exist."""
SPARE = 3
"""Natural difference between two counts: a helper of the engine, a closing connection."""
POOL = min(32, (os.cpu_count() or 1) + 4)
"""Threads of asyncio's pool: it starts one whenever all are busy, and keeps them. One left by each instance shows."""


@dataclass(frozen=True)
class HostUsage:
    """Resources in use at one moment. `exactly` may not differ, `about` may by SPARE, threads by POOL."""

    exactly: Counter[str]
    about: Counter[str]

    def grown_from(self, before: HostUsage) -> dict[str, tuple[int, int]]:
        """What differs too much: before and now."""
        spare = {**dict.fromkeys(self.about, SPARE), "threads": POOL}
        differs = [name for name in self.exactly if self.exactly[name] != before.exactly[name]]
        grows = [name for name in self.about if self.about[name] > before.about[name] + spare[name]]
        then, now = before.exactly | before.about, self.exactly | self.about
        return {name: (then[name], now[name]) for name in (*differs, *grows)}


def taken(stack: Stack, engine: Engine) -> HostUsage:
    agent = psutil.Process(stack.processes["agent"].pid)
    state = stack.folder / "agent"
    traces = host_traces.take(engine.folder)
    exactly = Counter(
        {
            "containers": len(engine.ps()),
            "networks": len(engine.networks()),
            # Podman mounts its own store while it is busy.
            "mounts of the engine": len([path for path in traces.mounts if path.endswith(("/merged", "/shm"))]),
            "ports of bridges": len(list(Path("/sys/class/net").glob(f"{bridge_of(stack)}/brif/*"))),
            "rows of instances": rows(state / "node.db", "instances"),
            "bundles": len(list((state / "instances").iterdir())),
            "raised limits": len(list((state / "limits").glob("*"))),
            "notes of images": len(list((state / "images").glob("*"))),
        }
    )
    about = Counter(
        {
            "file descriptors": agent.num_fds(),
            "threads": agent.num_threads(),
            "children": len(agent.children(recursive=True)),
            # Engines reap helpers of ended containers with a delay, even those from before the first count.
            "processes of the engine": len(list(engine._processes())),
            "connections": len(agent.net_connections("all")),
        }
    )
    return HostUsage(exactly, about)


def bridge_of(stack: Stack) -> str:
    return f"hib-{(stack.folder / 'agent' / 'uuid').read_text().strip()[:8]}"


def rows(database: Path, table: str) -> int:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as opened:
        return int(opened.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


class InstanceCycles:
    """Creates, sometimes freezes, and deletes instances over one channel."""

    def __init__(self, channel: DaemonChannel) -> None:
        self._channel = channel
        self._made = 0
        self.containers: set[str] = set()
        """The engine's names of all instances ever created."""

    async def create(self) -> str:
        self._made += 1
        request = instances_pb.CreateInstanceRequest(
            request_id=f"life-{self._made}",
            spec=function_to_proto(awake(busybox("mayfly")), reveal_secrets=True),
            wait=True,
        )
        made = (await self._channel.call(self._channel.instances.CreateInstance, request, CALL_S)).instance
        assert made.state == types_pb2.Instance.STATE_RUNNING, (made.state_reason, made.state_message)
        self.containers.add(made.container_id)
        return made.uid

    async def freeze(self, uid: str) -> None:
        request = instances_pb.FreezeInstanceRequest(uid=uid)
        await self._channel.call(self._channel.instances.FreezeInstance, request, CALL_S)

    async def delete(self, uid: str) -> None:
        request = instances_pb.StopInstanceRequest(uid=uid, force=True)
        ended = (await self._channel.call(self._channel.instances.StopInstance, request, CALL_S)).instance
        assert ended.state == types_pb2.Instance.STATE_STOPPED, ended.state_message

    async def live(self, number: int) -> None:
        """One instance's life; every third ends frozen."""
        uid = await self.create()
        if number % 3 == 0:
            await self.freeze(uid)
        await self.delete(uid)

    async def many(self, count: int) -> None:
        hands = asyncio.Semaphore(HANDS)

        async def one(number: int) -> None:
            async with hands:
                await self.live(number)

        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(one(number))


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_two_hundred_instances_leave_nothing_on_the_host(engine: Engine) -> None:
    driver = ("--gpus", str(AT_ONCE), "--gib", "1", "--profile", "580")
    async with running_stack(*driver, engine_socket=engine.socket, scheduler=False) as stack:
        async with stack.channel("agent") as channel:
            lives = InstanceCycles(channel)
            await lives.many(FIRST)
            before = await at_rest(stack, engine)

            await lives.many(CYCLES)
            among = await asyncio.gather(*(lives.create() for _ in range(AT_ONCE)))
            assert len(engine.ps()) == AT_ONCE
            assert len({one.address for one in await stack.instances()}) == AT_ONCE
            await asyncio.gather(*(lives.delete(uid) for uid in among))

            after = await settled(stack, engine, before)
            grown = after.grown_from(before)
            assert not grown, grown
            cgroups = host_traces.container_cgroups()
            assert not [path for path in cgroups if any(container in path for container in lives.containers)]
        logs = list((stack.folder / "agent" / "logs").glob("*"))
        assert len(logs) <= 2 * 200, "logs of the newest 200 that have ended are kept"
        state_uuid = (stack.folder / "agent" / "uuid").read_text().strip()
        log = (stack.folder / "agent.log").open()
    left_over = await asyncio.to_thread(engine.leftovers, state_uuid)
    with log:
        assert not left_over, (left_over, log.read()[-3000:])


async def at_rest(stack: Stack, engine: Engine) -> HostUsage:
    """The count without instances: the record of one that is stopped goes a moment after the answer."""
    now = taken(stack, engine)
    for _ in range(50):
        if not now.exactly["rows of instances"] and not now.exactly["containers"]:
            break
        await asyncio.sleep(0.1)
        now = taken(stack, engine)
    assert not now.exactly["rows of instances"], now.exactly
    assert not now.exactly["containers"], now.exactly
    return now


async def settled(stack: Stack, engine: Engine, before: HostUsage) -> HostUsage:
    """The count once it equals `before`, or after five seconds: engines reap helpers with a delay."""
    now = taken(stack, engine)
    for _ in range(50):
        if not now.grown_from(before):
            break
        await asyncio.sleep(0.1)
        now = taken(stack, engine)
    return now
