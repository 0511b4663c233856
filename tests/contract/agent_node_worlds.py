"""A node as the scheduler and the gateway see it: `FakeAgentNode`, and the real ingress, API and load stream on fakes
at every port. Both report to the same recording scheduler."""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from agent.adapters.daemon.scheduler_link import SchedulerLink
from agent.core.types import MILLISECOND_NS, Exit
from agent.host.ingress.ingress import Ingress
from agent.http.exchange import Exchange
from agent.http.limits import Limits
from agent.http.request_ids import RequestIds
from agent.http.server import serve
from agent.v1 import instance_service_pb2 as pb
from agent.v1.types_pb2 import FunctionSpec, Instance
from agent.wire.clients import DaemonChannel
from agent.wire.convert_function import function_to_proto
from agent.wire.server import GrpcServer, Services
from agent.wire.tokens import Principal, Role, TokenTable
from tests.adapters.daemon.test_scheduler_link import Scheduler
from tests.api.test_instance_servicer import Api, an_api
from tests.fakes.agent_node import INSTANCE, TOKEN, FakeAgentNode, FakeIngress, Received, echo, hold
from tests.host.rig import OCR, eventually
from tests.http.rig import Wire, close_clients, connect

CREDENTIAL = "node-credential-0123456789"
HELD = "/held"
"""Requests to this path stay inside until `NodeUnderTest.go`."""
GPUS, PER_GPU = 2, 2
PATIENCE_S = 10.0
Headers = dict[bytes, bytes]


def spec(concurrency: int = 1) -> FunctionSpec:
    return function_to_proto(replace(OCR, instance_concurrency=concurrency, revision="7"))


class NodeUnderTest(ABC):
    """Two GPUs for two instances each. `go`: what is held inside may end."""

    def __init__(self, port: int, channel: DaemonChannel, scheduler: Scheduler) -> None:
        self.port = port
        self.channel = channel
        self.scheduler = scheduler
        self.go = asyncio.Event()
        self._created = 0

    # ---- what differs -----------------------------------------------------------------------------------------

    @abstractmethod
    async def freeze(self, uid: str) -> None: ...

    @abstractmethod
    def hold_wakes(self) -> None:
        """Wakes take until `release_wakes`."""

    @abstractmethod
    def release_wakes(self) -> None: ...

    @abstractmethod
    async def waking(self) -> None:
        """Wait until a wake is held."""

    @abstractmethod
    def time_passes(self) -> None:
        """For a node whose clock moves only when told."""

    @abstractmethod
    def crash(self, uid: str) -> None:
        """The instance ends by itself."""

    @abstractmethod
    def seen(self) -> list[str]:
        """Targets of the requests that have reached an instance."""

    # ---- what does not ----------------------------------------------------------------------------------------

    async def create(self, request_id: str = "", concurrency: int = 1) -> Instance:
        """A RUNNING instance."""
        self._created += 1
        request_id = request_id or f"ocr/7/{self._created}/1"
        request = pb.CreateInstanceRequest(request_id=request_id, spec=spec(concurrency), wait=True)
        return (await self.channel.call(self.channel.instances.CreateInstance, request, PATIENCE_S)).instance

    async def running(self, concurrency: int = 1) -> str:
        return (await self.create(concurrency=concurrency)).uid

    async def frozen(self, concurrency: int = 1) -> str:
        uid = await self.running(concurrency)
        await self.freeze(uid)
        return uid

    async def stop(self, uid: str) -> Instance:
        request = pb.StopInstanceRequest(uid=uid)
        return (await self.channel.call(self.channel.instances.StopInstance, request, PATIENCE_S)).instance

    def head(self, uid: str, path: str = "/", *more: str, token: str = CREDENTIAL, length: int = 0) -> bytes:
        lines = [f"POST {path} HTTP/1.1", "host: ocr.localhost", f"content-length: {length}", *more]
        lines += [f"{TOKEN}: {token}"] if token else []
        lines += [f"{INSTANCE}: {uid}"] if uid else []
        return "\r\n".join(lines).encode() + b"\r\n\r\n"

    async def send(self, uid: str, path: str = "/", *more: str) -> Wire:
        wire = await connect(self.port)
        await wire.send(self.head(uid, path, *more))
        return wire

    async def ask(self, uid: str, path: str = "/", *more: str) -> tuple[int, Headers, bytes]:
        """The answer to a request on a connection of its own."""
        return await (await self.send(uid, path, *more)).message()

    async def inside(self, uid: str) -> asyncio.Task[tuple[int, Headers, bytes]]:
        """A request that has reached the instance and stays there until `go`."""
        before = self.seen().count(HELD)
        asking = asyncio.create_task(self.ask(uid, HELD))
        await eventually(lambda: self.seen().count(HELD) > before)
        return asking


class FakeNode(NodeUnderTest):
    """The node of tests/fakes/agent_node.py."""

    def __init__(self, node: FakeAgentNode, channel: DaemonChannel, scheduler: Scheduler) -> None:
        super().__init__(node.ingress.port, channel, scheduler)
        self.node = node
        node.ingress.default = self._serve

    async def _serve(self, ingress: FakeIngress, exchange: Exchange, received: Received) -> None:
        await (hold(self.go) if received.target == HELD else echo)(ingress, exchange, received)

    async def freeze(self, uid: str) -> None:
        self.node.set_state(uid, Instance.STATE_FROZEN)

    def hold_wakes(self) -> None:
        self.node.wake_gate.clear()

    def release_wakes(self) -> None:
        self.node.wake_gate.set()

    async def waking(self) -> None:
        await eventually(lambda: bool(self.node.woken))

    def time_passes(self) -> None:
        pass

    def crash(self, uid: str) -> None:
        self.node.set_state(uid, Instance.STATE_FAILED, "INSTANCE_CRASHED", "exited with code 1")

    def seen(self) -> list[str]:
        return [one.target for one in self.node.ingress.received if one.served_by]


class RealNode(NodeUnderTest):
    """The agent's own ingress, servicer and link."""

    def __init__(self, api: Api, port: int, channel: DaemonChannel, scheduler: Scheduler) -> None:
        super().__init__(port, channel, scheduler)
        self.api = api
        self._held_wakes = False
        app = api.world.app
        app.answers["/"] = app.answers["/hibernode/wake"] = self._echo
        app.answers[HELD] = self._held

    async def _echo(self, exchange: Exchange) -> None:
        await exchange.answer(200, [], await exchange.buffer_body(1 << 20) or b"")

    async def _held(self, exchange: Exchange) -> None:
        await self.go.wait()
        await exchange.answer(200, [], b"")

    async def freeze(self, uid: str) -> None:
        request = pb.FreezeInstanceRequest(uid=uid)
        await self.channel.call(self.channel.instances.FreezeInstance, request, PATIENCE_S)

    def hold_wakes(self) -> None:
        self._held_wakes = True
        self.api.world.freezer.hold("wake")

    def release_wakes(self) -> None:
        if self._held_wakes:
            self._held_wakes = False
            self.api.world.freezer.release("wake")

    async def waking(self) -> None:
        await self.api.world.freezer.entered("wake")

    def time_passes(self) -> None:
        self.api.world.clock.advance(MILLISECOND_NS)

    def crash(self, uid: str) -> None:
        self.api.world.runtime.exit(uid, Exit(code=1))

    def seen(self) -> list[str]:
        return self.api.world.app.paths()


@asynccontextmanager
async def recording_scheduler() -> AsyncIterator[tuple[Scheduler, str]]:
    scheduler = Scheduler()  # type: ignore[abstract]  # the rest of it is not called
    tokens = TokenTable([(CREDENTIAL, Principal("n1", Role.NODE))])
    server = GrpcServer(Services(scheduler=scheduler, usage=scheduler), tokens)
    address = f"127.0.0.1:{server.bind_tcp('127.0.0.1', 0)}"
    await server.start()
    try:
        yield scheduler, address
    finally:
        await server.stop(0)


@asynccontextmanager
async def fake_node() -> AsyncIterator[NodeUnderTest]:
    async with recording_scheduler() as (scheduler, address):
        node = FakeAgentNode("n1", CREDENTIAL, gpus=GPUS, instances_per_gpu=PER_GPU)
        await node.start(address)
        try:
            async with DaemonChannel(node.registration().grpc_address, CREDENTIAL) as channel:
                yield FakeNode(node, channel, scheduler)
        finally:
            await close_clients()
            await node.kill()


@asynccontextmanager
async def real_node() -> AsyncIterator[NodeUnderTest]:
    async with recording_scheduler() as (scheduler, address), an_api(per_gpu=PER_GPU) as api:
        world = api.world
        faults: list[BaseException] = []
        ingress = Ingress(world.node, world.clock, [CREDENTIAL], RequestIds(lambda: 1, lambda bits: 2))
        ingress.open = True
        http = await serve(
            ingress,
            "127.0.0.1",
            0,
            Limits(),
            request_ids=lambda: "1-0-0-0",
            on_fault=lambda error, _: faults.append(error),
        )
        tokens = TokenTable([(CREDENTIAL, Principal("scheduler", Role.OPERATOR))])
        server = GrpcServer(Services(instances=api.servicer), tokens)
        grpc = f"127.0.0.1:{server.bind_tcp('127.0.0.1', 0)}"
        await server.start()
        api.observer.identity = replace(api.observer.identity, instances_per_gpu=PER_GPU)
        api.observer.ingress_address, api.observer.grpc_address = f"127.0.0.1:{http.port}", grpc
        async with DaemonChannel(grpc, CREDENTIAL) as channel, DaemonChannel(address, CREDENTIAL) as upwards:
            link = SchedulerLink(upwards, api.observer, world.node.actors, world.store, 60.0)
            world.node.listeners.append(link)
            reporting = asyncio.create_task(link.run())
            try:
                yield RealNode(api, http.port, channel, scheduler)
            finally:
                reporting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await reporting
                await close_clients()
                await http.close(0.0)
                await server.stop(0)
        assert not faults, faults
