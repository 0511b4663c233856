"""The daemons that the CLI talks to: `tests.fakes.daemon`, and the real servicers with a node and a fleet on fakes.

Both know the same things: on gpu-host-1 the instances i-run (ocr, busy), i-cold (ocr, FROZEN), i-chat (chat, idle) and
i-dead (ocr, FAILED), usage of chat, ocr and tts with a gap in that of chat, and gpu-host-2, which is lost.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.api.node_ledger import NodeLedger
from agent.api.node_servicer import NodeServicer
from agent.api.scheduler_servicer import SchedulerServicer
from agent.api.usage_servicer import UsageServicer
from agent.core.billing.price_book import parse_price_book
from agent.core.billing.window import UsageWindow
from agent.core.errors import HibernodeError, InstanceError
from agent.core.types import MILLISECOND_NS, SECOND_NS, Exit, FunctionSpec
from agent.daemons.scheduler import PRICE_BOOK
from agent.ports import StartSpec
from agent.scheduler.database.store import Store
from agent.scheduler.fleet.node_scheduling import NodeScheduling
from agent.scheduler.usage.collector import UsageCollector, UsageDatabase
from agent.scheduler.usage.reports import UsageReports
from agent.v1 import function_service_pb2 as fn
from agent.v1 import instance_service_pb2 as inst
from agent.v1 import node_service_pb2 as node
from agent.v1 import scheduler_service_pb2 as sched
from agent.v1 import usage_service_pb2 as usage
from agent.v1.scheduler_service_pb2 import NodeLoad, Registration, ReportLoadRequest
from agent.v1.types_pb2 import Node
from agent.wire.clients import DaemonChannel
from agent.wire.convert_function import function_to_proto
from agent.wire.convert_load import load_of_instance
from agent.wire.server import GrpcServer, Services
from agent.wire.tokens import TokenTable
from tests.api.test_instance_servicer import Api, an_api
from tests.contract.test_stores import window
from tests.fakes import daemon
from tests.fakes.exec_session import FakeExecSession
from tests.fakes.fleet_story import INSTANCES, NODE
from tests.fakes.gpus import FakeGpus, gpu
from tests.host.rig import OCR, enter, eventually
from tests.scheduler.functions.autoscaler_rig import Rig

PRICED_NS = 1_780_000_000_000_000_000
"""A time for which the price book that comes with Hibernode has prices."""
LOG = b"Loading model\n\xff not UTF-8\n"
PATIENCE_S = 10.0
GPUS = 6
"""Of the real node: nothing here has to wait for one."""


@asynccontextmanager
async def fake_agent(folder: Path) -> AsyncIterator[DaemonChannel]:
    async with daemon.daemons(folder / "a"), DaemonChannel(f"unix:{folder / 'a' / 'agent.sock'}") as channel:
        yield channel


@asynccontextmanager
async def fake_scheduler(folder: Path) -> AsyncIterator[DaemonChannel]:
    async with daemon.daemons(folder / "s"):
        where = json.loads((folder / "s" / "scheduler" / "endpoints.json").read_text())["grpc"]
        async with DaemonChannel(where, daemon.TOKEN) as channel:
            yield channel


@asynccontextmanager
async def _served(services: Services, path: Path) -> AsyncIterator[DaemonChannel]:
    server = GrpcServer(services, TokenTable([]))
    server.bind_unix(str(path))
    await server.start()
    try:
        async with DaemonChannel(f"unix:{path}") as channel:
            yield channel
    finally:
        await server.stop(0)


@asynccontextmanager
async def real_agent(folder: Path) -> AsyncIterator[DaemonChannel]:
    uids = itertools.chain(["run", "cold", "chat", "dead"], itertools.count(1))
    async with an_api(gpus=FakeGpus([gpu(index) for index in range(GPUS)]), uids=uids) as api:
        world = api.world
        api.observer.identity = replace(api.observer.identity, name="gpu-host-1")
        world.runtime.executes = True
        world.runtime.port_of = lambda spec: _port(spec, world.app.port)
        nodes = NodeServicer(api.observer, NodeLedger(world.store, world.billing.unwritten))
        async with _served(Services(instances=api.servicer, nodes=nodes), folder / "agent.sock") as channel:
            for function in ("ocr", "ocr", "chat", "ocr"):
                await _create(api, channel, replace(OCR, name=function, environment=(("KEY", "secret"),)))
            await channel.call(channel.instances.FreezeInstance, inst.FreezeInstanceRequest(uid="i-cold"), PATIENCE_S)
            world.runtime.exit("i-dead", Exit(code=3))
            await eventually(lambda: "i-dead" in world.node.ended)
            await enter(world.node.actors["i-run"])
            world.runtime.print("i-run", LOG)
            world.clock.advance(SECOND_NS)
            await world.billing.flush()
            performing = asyncio.create_task(_perform_all(world.runtime.sessions))
            try:
                yield channel
            finally:
                performing.cancel()
                await asyncio.gather(performing, return_exceptions=True)
                world.node.actors["i-run"].gate.leave()


def _port(spec: StartSpec, port: int) -> int:
    """A function called `broken` never listens."""
    if spec.instance.function.name == "broken":
        raise InstanceError("FUNCTION_NOT_STARTED", "port 9000 never answered")
    return port


async def _create(api: Api, channel: DaemonChannel, function: FunctionSpec) -> None:
    made = function_to_proto(function, reveal_secrets=True)
    number = len(api.world.node.actors)
    request = inst.CreateInstanceRequest(request_id=f"{function.name}/1/{number}/1", spec=made, wait=True)
    await channel.call(channel.instances.CreateInstance, request, PATIENCE_S)
    api.world.clock.advance(MILLISECOND_NS)  # they are told apart by age


async def _perform_all(sessions: list[FakeExecSession]) -> None:
    """The commands that run inside do what `tests.fakes.exec_story` says."""
    async with asyncio.TaskGroup() as tasks:
        for number in itertools.count():
            while len(sessions) <= number:  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.001)
            tasks.create_task(_perform(sessions[number]))


async def _perform(session: FakeExecSession) -> None:
    program, *arguments = session.spec.command
    if program == "say":
        session.say(b"out ")
        session.say(b"err\n", is_error=True)
        session.say(b" ".join(word.encode() for word in arguments) + b"\n")
    if program == "cat":
        await session.input_ended.wait()
        session.say(bytes(session.given))
    session.end(int(arguments[0]) if program == "exit" else 0)


class _Central(Rig):
    """With more functions than one."""

    def moved(self) -> None:
        pass


@asynccontextmanager
async def real_scheduler(folder: Path) -> AsyncIterator[DaemonChannel]:
    store = Store(f"sqlite:///{folder}/scheduler.db")
    database = UsageDatabase.at(f"sqlite:///{folder}/scheduler.db")
    await store.open()
    await database.open()
    rig = _Central(store)
    rig.fleet.expect("gpu-host-2")
    rig.clock.advance(10 * SECOND_NS)
    rig.fleet.check_silence()
    _report(rig)
    collector = UsageCollector(database, rig.clock)
    for function, seqs in (("chat", (0, 2)), ("ocr", (0, 1, 2)), ("tts", (0,))):
        await collector.accept("gpu-host-1", [_window(function, seq) for seq in seqs])
    services = Services(
        scheduler=SchedulerServicer(rig.fleet, NodeScheduling(store, rig.fleet, rig.event_log), rig.event_log),
        functions=rig.servicer,
        usage=UsageServicer(
            collector, UsageReports(database), parse_price_book(yaml.safe_load(PRICE_BOOK.read_text()))
        ),
    )
    try:
        async with _served(services, folder / "scheduler.sock") as channel:
            yield channel
    finally:
        database.close()
        await store.close()


def _window(function: str, seq: int) -> UsageWindow:
    return replace(
        window(f"i-{function}", seq), node="gpu-host-1", function=function, start_wall_ns=PRICED_NS + seq * 100
    )


def _report(rig: Rig) -> None:
    """gpu-host-1 has what the fake's has."""
    message = ReportLoadRequest(
        epoch=1,
        sequence=1,
        snapshot=True,
        registration=Registration(ingress_address="127.0.0.1:1", grpc_address="127.0.0.1:2", gpus=NODE.gpus),
        load=NodeLoad(state=Node.STATE_READY, gpus=NODE.gpus),
        instances=[load_of_instance(one, concurrency=1) for one in INSTANCES],
    )
    rig.fleet.receive("gpu-host-1", rig.fleet.stream_opened("gpu-host-1"), message)


# ---- calls ----------------------------------------------------------------------------------------------------


async def ask(channel: DaemonChannel, service: str, method: str, **fields: Any) -> Any:
    """`service.method(fields)`: the answer."""
    stub = getattr(getattr(channel, service), method)
    modules = {"instances": inst, "nodes": node, "functions": fn, "scheduler": sched, "usage": usage}
    return await channel.call(stub, getattr(modules[service], f"{method}Request")(**fields), PATIENCE_S)


async def refused(call: Awaitable[object], kind: type[HibernodeError], reason: str) -> HibernodeError:
    with pytest.raises(kind) as caught:
        await call
    assert (type(caught.value), caught.value.reason) == (kind, reason)
    assert caught.value.message
    return caught.value


async def pages(channel: DaemonChannel, service: str, method: str, field: str, **fields: Any) -> list[Any]:
    """All items, one a page."""
    found: list[Any] = []
    token = ""
    while True:
        answer = await ask(channel, service, method, page_size=1, page_token=token, **fields)
        items, token = getattr(answer, field), answer.next_page_token
        assert len(items) == 1 or (not items and not token)
        found += items
        if not token:
            return found
