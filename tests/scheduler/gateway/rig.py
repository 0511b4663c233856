"""A gateway with its dispatch loop and dispatcher on real sockets, in front of fake ingresses."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from agent.adapters.kernel.clock import SystemClock
from agent.core.dispatch.dispatcher import Dispatcher
from agent.core.dispatch.events import Event, InstanceReported, NodeReported, NodeSuspect, Wake
from agent.core.types import SECOND_NS, InstanceState
from agent.event_log import EventLog
from agent.http.limits import Limits
from agent.http.request_ids import RequestIds
from agent.http.server import DateHeader, Server, serve
from agent.scheduler.database.store import Store
from agent.scheduler.functions.catalog import Catalog
from agent.scheduler.functions.deploy_rules import Defaults
from agent.scheduler.gateway.dispatching import DispatchLoop
from agent.scheduler.gateway.gateway import Gateway
from agent.scheduler.gateway.ingress_pools import IngressPools
from agent.scheduler.gateway.routes import Router
from agent.v1.function_service_pb2 import DeployFunctionRequest, HttpTrigger
from agent.v1.types_pb2 import FunctionSpec
from tests.fakes.agent_node import FakeIngress
from tests.http.rig import Wire

TOKEN = b"node-token-of-n1-0123456789"
NOON = 784_111_777
"""What every answer is dated: Sun, 06 Nov 1994 08:49:37 GMT."""
PATIENCE_S = 10.0


class WatchedDispatchLoop(DispatchLoop):
    """Sets `turned` after every event."""

    def __init__(self, clock: SystemClock, dispatcher: Dispatcher, wake: Callable[[Wake], None]) -> None:
        super().__init__(clock, dispatcher, wake)
        self.turned = asyncio.Event()

    def apply(self, event: Event) -> None:
        super().apply(event)
        self.turned.set()


@dataclass
class GatewayRig:
    """Functions are deployed by `deploy`, instances appear by `apply`; there is no fleet."""

    gateway: Gateway
    server: Server
    catalog: Catalog
    dispatch_loop: WatchedDispatchLoop
    dispatcher: Dispatcher
    ingresses: dict[str, FakeIngress]
    wakes: list[Wake] = field(default_factory=list)
    suspects: list[str] = field(default_factory=list)
    faults: list[BaseException] = field(default_factory=list)
    wires: list[Wire] = field(default_factory=list)
    gpu_waits: dict[str, str] = field(default_factory=dict)
    """By function: who holds the GPU that an instance of it waits for."""

    def apply(self, event: Event) -> None:
        self.dispatch_loop.apply(event)

    def instance(self, uid: str, state: InstanceState = InstanceState.RUNNING, node: str = "n1", **more: int) -> None:
        self.apply(InstanceReported(uid, "ocr", node, state, **more))  # type: ignore[arg-type]

    async def deploy(self, name: str = "ocr", methods: tuple[str, ...] = (), target: int = 1, **spec: int) -> None:
        message = FunctionSpec(name=name, entrypoint=["app"], **spec)  # type: ignore[arg-type]
        triggers = [HttpTrigger(name="http", methods=methods)]
        await self.catalog.deploy(DeployFunctionRequest(spec=message, target=target, triggers=triggers))

    async def wire(self) -> Wire:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        wire = Wire(reader, writer)
        self.wires.append(wire)
        return wire

    async def ask(self, request: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
        """Send a whole request on a connection of its own; status, headers, body."""
        wire = await self.wire()
        await wire.send(request)
        return await wire.message()

    async def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait until `condition()` holds; it is checked after every event of the dispatch loop."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not condition():
                    self.dispatch_loop.turned.clear()
                    await self.dispatch_loop.turned.wait()
        except TimeoutError:
            raise AssertionError(f"did not happen: {what}") from None

    def queued(self) -> int:
        return self.dispatcher.queue_state("ocr").queued


@asynccontextmanager
async def gateway_rig(tmp: str, *names: str) -> AsyncIterator[GatewayRig]:
    """A gateway with a READY node per name, each with a fake ingress."""
    clock = SystemClock()
    wakes: list[Wake] = []
    suspects: list[str] = []
    faults: list[BaseException] = []
    dispatcher = Dispatcher()
    dispatch_loop = WatchedDispatchLoop(clock, dispatcher, wakes.append)
    fakes = {name: FakeIngress(TOKEN.decode()) for name in names or ("n1",)}
    store = Store(f"sqlite:///{tmp}/scheduler.db")
    await store.open()
    catalog = Catalog(clock, EventLog(clock), store, dispatch_loop.apply, lambda: None, Defaults())
    ingresses = IngressPools(lambda name: f"127.0.0.1:{fakes[name].port}")

    def unreachable(name: str) -> None:
        suspects.append(name)
        dispatch_loop.apply(NodeSuspect(name))

    ids = RequestIds(lambda: clock.wall_ns() // SECOND_NS, random.getrandbits)
    router, pool_of = Router("localhost"), ingresses.pool
    gpu_waits: dict[str, str] = {}

    def gpu_wait(function: str) -> str:
        return gpu_waits.get(function, "")

    gateway = Gateway(clock, router, catalog, dispatch_loop, pool_of, lambda _: TOKEN, unreachable, ids, gpu_wait)
    dates = DateHeader(lambda: NOON)
    server = await serve(
        gateway,
        "127.0.0.1",
        0,
        Limits(),
        request_ids=ids,
        on_fault=lambda error, _: faults.append(error),
        date_header=dates,
    )
    rig = GatewayRig(gateway, server, catalog, dispatch_loop, dispatcher, fakes, wakes, suspects, faults)
    rig.gpu_waits = gpu_waits
    for name, fake in fakes.items():
        await fake.start()
        dispatch_loop.apply(NodeReported(name))
    try:
        yield rig
        assert not faults, faults
    finally:
        for wire in rig.wires:
            wire.close()
        await server.close(0)
        ingresses.close()
        for fake in fakes.values():
            await fake.kill()
        await store.close()
