"""Load streams on a real server: one that counts, few beside it, and none that says nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from agent.adapters.kernel.clock import SystemClock
from agent.api.scheduler_servicer import MAX_STREAMS, SchedulerServicer
from agent.core.errors import DeadlineError, ExhaustedError, HibernodeError, InvalidArgumentError, PreconditionError
from agent.core.types import SECOND_NS
from agent.event_log import EventLog
from agent.scheduler.database.store import Store
from agent.scheduler.fleet.fleet import Fleet
from agent.scheduler.fleet.node_scheduling import NodeScheduling
from agent.v1.scheduler_service_pb2 import NodeLoad, Registration, ReportLoadRequest
from agent.v1.types_pb2 import Node
from agent.wire.clients import DaemonChannel, LoadStream
from agent.wire.server import GrpcServer, Services
from agent.wire.tokens import Principal, Role, TokenTable

TOKEN = "credential-of-gpu-1-0123456789"


@asynccontextmanager
async def a_scheduler(silence_s: float = 10.0) -> AsyncIterator[tuple[Fleet, DaemonChannel]]:
    clock = SystemClock()
    events = EventLog(clock)
    fleet = Fleet(clock, events, lambda event: None, lambda: None, 3 * SECOND_NS, 10 * SECOND_NS)
    tokens = TokenTable([(TOKEN, Principal("gpu-1", Role.NODE))])
    servicer = SchedulerServicer(fleet, NodeScheduling(Store("sqlite://"), fleet, events), events, silence_s)
    server = GrpcServer(Services(scheduler=servicer), tokens)
    port = server.bind_tcp("127.0.0.1", 0)
    await server.start()
    try:
        async with DaemonChannel(f"127.0.0.1:{port}", TOKEN) as channel:
            yield fleet, channel
    finally:
        await server.stop(0)


def hello(sequence: int = 1, ingress: str = "127.0.0.1:1") -> ReportLoadRequest:
    registration = Registration(ingress_address=ingress, grpc_address="127.0.0.1:2")
    load = NodeLoad(state=Node.STATE_READY)
    return ReportLoadRequest(epoch=1, sequence=sequence, snapshot=True, registration=registration, load=load)


async def answered(stream: LoadStream) -> None:
    async with asyncio.timeout(10):
        assert await stream.receive() is not None


async def ended_with(stream: LoadStream) -> HibernodeError:
    with pytest.raises(HibernodeError) as caught:
        async with asyncio.timeout(10):
            await stream.receive()
    return caught.value


async def test_a_stream_without_messages_is_ended() -> None:
    async with a_scheduler(silence_s=0.1) as (_, channel):
        stream = channel.report_load()
        await stream.send(hello())
        await answered(stream)
        error = await ended_with(stream)
        assert isinstance(error, DeadlineError)
        assert error.reason == "STREAM_SILENT"


async def test_a_node_cannot_take_all_streams_and_an_old_one_does_not_count() -> None:
    async with a_scheduler() as (fleet, channel):
        streams = []
        for _ in range(MAX_STREAMS):
            streams.append(channel.report_load())
            await streams[-1].send(hello())
            await answered(streams[-1])
        for _ in range(20):
            with pytest.raises(ExhaustedError):
                await channel.report_load().send(hello())
        await streams[0].send(hello(2))
        assert isinstance(await ended_with(streams[0]), PreconditionError), "superseded"
        await streams[-1].send(hello(2))
        await answered(streams[-1])
        node = fleet.node("gpu-1")
        assert node is not None
        assert node.sequence == 2


async def test_a_node_that_registers_a_unix_socket_is_refused() -> None:
    """Whoever calls at an agent's socket is trusted there: the scheduler must not be sent to one."""
    async with a_scheduler() as (fleet, channel):
        stream = channel.report_load()
        await stream.send(hello(ingress="unix:/run/hibernode/agent.sock"))
        error = await ended_with(stream)
        assert isinstance(error, InvalidArgumentError)
        node = fleet.node("gpu-1")
        assert node is not None
        assert not node.registration.ingress_address
