"""A whole node without a host: the real actors, executors, gates, GPU allocator and ledger, on fakes at every port.

Time moves only by `rig.clock`. The instances' server is `App`, on a real socket.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from agent.core.types import SECOND_NS, FunctionSpec, GpuNeed, IdlePolicy, InstanceState
from agent.event_log import EventLog
from agent.host.billing.billing import Billing
from agent.host.instance.actor import Actor
from agent.host.instance.context import InstanceContext
from agent.host.instance.memory_reservations import MemoryReservations
from agent.host.node.node import Node, NodeSettings
from agent.host.node.recovery import Recovery, RecoverySummary
from agent.http.exchange import Exchange
from agent.http.limits import Limits
from agent.http.message import RequestHead
from agent.http.request_ids import RequestIds
from agent.http.server import serve
from tests.fakes.clock import FakeClock
from tests.fakes.freezer import FakeFreezer
from tests.fakes.gpus import FakeGpus
from tests.fakes.host_memory import FakeHostMemory
from tests.fakes.runtime import FakeRuntime
from tests.fakes.stores import MemoryStore

PATIENCE_S = 10.0
OCR = FunctionSpec(
    "ocr",
    command=("serve",),
    gpu=GpuNeed(memory_bytes=1 << 30),
    idle=IdlePolicy(freeze_after_ns=10 * SECOND_NS),
)
_IDS = RequestIds(lambda: 0x67A59F35, lambda bits: 7)

Handler = Callable[[Exchange], Any]


@dataclass
class App:
    """The server inside every instance. `answers` maps a path to a status or to a handler of its own."""

    answers: dict[str, int | Handler] = field(default_factory=dict)
    requests: list[RequestHead] = field(default_factory=list)
    port: int = 0
    seen: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def handle(self, exchange: Exchange) -> None:
        async with self.seen:
            self.requests.append(exchange.head)
            self.seen.notify_all()
        answer = self.answers.get(exchange.head.path.decode(), 200)
        if isinstance(answer, int):
            await exchange.buffer_body(1 << 20)
            await exchange.answer(answer, [(b"content-type", b"text/plain")], b"done")
        else:
            await answer(exchange)

    def paths(self) -> list[str]:
        return [head.path.decode() for head in self.requests]

    async def until_asked(self, path: str, times: int = 1) -> None:
        """Wait until `path` has been requested `times` times."""
        async with asyncio.timeout(PATIENCE_S), self.seen:
            await self.seen.wait_for(lambda: self.paths().count(path) >= times)


@dataclass
class NodeRig:
    """`node` is the running agent's; `restart` is what a SIGKILL and a new agent do. Ports outlive both."""

    app: App
    per_gpu: int = 1
    migrate: bool = False
    clock: FakeClock = field(default_factory=FakeClock)
    runtime: FakeRuntime = field(default_factory=FakeRuntime)
    freezer: FakeFreezer = field(default_factory=FakeFreezer)
    gpus: FakeGpus = field(default_factory=FakeGpus)
    store: MemoryStore = field(default_factory=MemoryStore)
    memory: FakeHostMemory = field(default_factory=FakeHostMemory)
    store_problem: str = ""
    release_timeout_ns: int = 30 * SECOND_NS
    stop_timeout_s: float = 5.0
    ready_timeout_s: float = 5.0
    wrap: Callable[[object], Any] = lambda port: port
    uids: Any = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        self.runtime.port_of = lambda spec: self.app.port
        self.agents: list[Node] = []
        self.billing: Billing
        self.node: Node
        self.events: EventLog

    async def boot(self) -> None:
        """A new agent on this host; nothing is recovered yet."""
        self.events = EventLog(self.clock)
        self.billing = Billing(self.clock, self.store, node="n1", boot_id=self.runtime.boot_id)
        await self.billing.load()
        context = InstanceContext(
            clock=self.clock,
            runtime=self.wrap(self.runtime),
            freezer=self.wrap(self.freezer),
            memory=MemoryReservations(self.memory, limit_bytes=0, reserve_bytes=0),
            store=self.wrap(self.store),
            events=self.events,
            request_ids=_IDS,
            ready_timeout_s=self.ready_timeout_s,
            stop_timeout_s=self.stop_timeout_s,
            environment={},
            gpu_models={gpu.uuid: gpu.model for gpu in self.gpus.gpus},
            gpu_numbers=lambda uuids: self.node.broker.cuda_numbers(uuids),  # noqa: PLW0108 - the node is made later
            store_problem=lambda: self.store_problem,
        )
        self.node = Node(
            NodeSettings(
                per_gpu=self.per_gpu,
                max_hold_ns=10 * SECOND_NS,
                release_timeout_ns=self.release_timeout_ns,
                max_waiting=100,
                types={"fc.gpu.ada.1": "Emulated L20"},
                migrate=self.migrate,
            ),
            self.gpus.gpus,
            context,
            gpus=self.gpus,
            meters=self.billing,
            new_uid=lambda: f"i-{next(self.uids)}",
        )
        self.agents.append(self.node)

    async def recover(self, deadline_s: float = 5.0) -> RecoverySummary:
        known = frozenset(self.node.broker.inventory)
        found = await Recovery(self.node, known, instance_deadline_s=deadline_s, ask_again_s=0.001).run()
        self.billing.complete_ended()
        return found

    async def kill_agent(self) -> None:
        """SIGKILL: whatever the agent was doing stops where it is; ports and containers do not notice."""
        await kill(self.node)

    async def restart(self) -> RecoverySummary:
        """SIGKILL, and a new agent that recovers."""
        await self.billing.flush()
        await self.kill_agent()
        await self.boot()
        return await self.recover()

    async def create(self, function: FunctionSpec = OCR, request_id: str = "") -> Actor:
        """One more instance, STARTING."""
        return await self.node.create(request_id or f"create-{next(self.uids)}", function)

    async def running(self, function: FunctionSpec = OCR) -> Actor:
        """One more instance, RUNNING."""
        actor = await self.create(function)
        await until(actor, InstanceState.RUNNING)
        return actor

    async def frozen(self, function: FunctionSpec = OCR) -> Actor:
        """One more instance, FROZEN by its idle timer."""
        actor = await self.running(function)
        self.clock.advance(function.idle.freeze_after_ns)
        await until(actor, InstanceState.FROZEN)
        await released(self, actor)
        return actor

    def names(self, uid: str = "") -> list[str]:
        """Names of the events so far."""
        return [event.name for event in self.events.read(instance_uid=uid)]

    def messages(self, name: str) -> list[str]:
        return [event.message for event in self.events.read() if event.name == name]

    def holder(self, index: int = 0) -> str:
        return self.node.broker.allocator.devices[self.gpus.gpus[index].uuid].holder


async def kill(node: Node) -> None:
    proofs = [*node.broker._proofs.values(), *node.broker._late_proofs]
    tasks: list[asyncio.Task[Any] | None] = [*node._creating.values(), *node._endings, *proofs]
    for executor in node.executors.values():
        executor._closed = True
        tasks += [executor._task, executor._watch, executor._health._task]
    for actor in node.actors.values():
        actor._closed = True
        for timer in (actor._idle_timer, actor._wake_timer):
            if timer is not None:
                timer.cancel()
    living = [task for task in tasks if task is not None]
    for task in living:
        task.cancel()
    await asyncio.gather(*living, return_exceptions=True)
    if node.broker._timer is not None:
        node.broker._timer.cancel()
    for executor in node.executors.values():
        if executor._actor.pool is not None:
            executor._actor.pool.close()


async def until(actor: Actor, *states: InstanceState) -> None:
    await actor.wait_until(lambda i: i.state in states, PATIENCE_S, "TEST")


async def released(rig: NodeRig, actor: Actor) -> None:
    """Wait for the proof that its GPUs are free."""
    proof = rig.node.broker._proofs.get(actor.uid)
    if proof is not None:
        await asyncio.wait_for(asyncio.shield(proof), PATIENCE_S)


async def eventually(condition: Callable[[], bool]) -> None:
    """Turn by turn of the loop, with a deadline."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.001)


@asynccontextmanager
async def node_rig(**knobs: Any) -> AsyncIterator[NodeRig]:
    """A node with two GPUs and its instances' server; taken down whatever happened."""
    app = App()
    faults: list[BaseException] = []
    server = await serve(
        app.handle,
        "127.0.0.1",
        0,
        Limits(),
        request_ids=lambda: "1-0-0-0",
        on_fault=lambda error, _: faults.append(error),
    )
    app.port = server.port
    rig = NodeRig(app, **knobs)
    await rig.boot()
    try:
        yield rig
    finally:
        for node in rig.agents:
            await kill(node)
        await server.close(0.0)
        await rig.billing.stop()
    assert not faults, faults
    assert not [rig.messages(n) for n in ("instance.impossible_event", "gpu.grant_unexpected") if rig.messages(n)]


def environment_of(rig: NodeRig, uid: str) -> Mapping[str, str]:
    return rig.runtime.containers[uid].spec.environment


async def enter(actor: Actor) -> None:
    """One request gets in (waiting for a wake if need be)."""
    ticket = actor.gate.try_enter()
    if ticket is not None:
        await actor.gate.wait(ticket, PATIENCE_S)


async def hangs(exchange: Exchange) -> None:
    """A handler that answers only by the caller's leaving."""
    left = asyncio.Event()
    exchange.on_gone(left.set)
    await left.wait()
