"""An agent without instances: a real ingress and a real gRPC server over sockets, with knobs and a record.

`FakeIngress` alone is enough for the gateway; `FakeAgentNode` adds InstanceService and the load stream, and is a whole
node for the scheduler.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from agent.core.errors import ConflictError, HibernodeError, NotFoundError
from agent.http import hop_headers
from agent.http.exchange import Exchange
from agent.http.limits import Limits
from agent.http.message import Header
from agent.http.server import Server, serve
from agent.v1 import instance_service_pb2 as pb
from agent.v1 import instance_service_pb2_grpc
from agent.v1.scheduler_service_pb2 import InstanceLoad, NodeLoad, Registration, ReportLoadRequest
from agent.v1.types_pb2 import Gpu, Instance, Node
from agent.wire.clients import DaemonChannel
from agent.wire.server import GrpcServer, Services
from agent.wire.tokens import Principal, Role, TokenTable

WAKE_MS = b"12.500"
"""How long a request waited at a sleeping instance, as the ingress says."""
Behaviour = Callable[["FakeIngress", Exchange, "Received"], Awaitable[None]]


@dataclass
class Received:
    """A request as it came in at the ingress. `body` is filled by behaviours that read it."""

    method: str
    target: str
    headers: list[Header]
    body: bytes = b""
    woke: bool = False  # the instance slept, and woke for it

    def get(self, name: str | bytes) -> str | None:
        wanted = name.encode() if isinstance(name, str) else name
        for key, value in self.headers:
            if key == wanted:
                return value.decode("latin-1")
        return None

    @property
    def uid(self) -> str:
        return self.get(hop_headers.INSTANCE) or ""


# ---- what the ingress may do with a request -------------------------------------------------------------------


async def echo(ingress: FakeIngress, exchange: Exchange, received: Received) -> None:
    """Answer 200 with the body, a header of the hop, and what a spiteful instance might add through a broken agent."""
    received.body = await exchange.buffer_body(64 << 20) or b""
    headers = [
        (b"content-type", b"text/plain"),
        (hop_headers.FREE_SLOTS, b"1"),
        (b"x-fc-request-id", b"not-yours"),
        (b"x-fc-status", b"200"),
        *([(hop_headers.WAKE_MS, WAKE_MS)] if received.woke else []),
        *ingress.more_headers,
    ]
    await exchange.answer(200, headers, received.body or b"served by " + received.uid.encode())


def refuse(reason: str) -> Behaviour:
    """Answer as an agent whose gate is closed."""

    async def behave(ingress: FakeIngress, exchange: Exchange, received: Received) -> None:
        await exchange.answer(503, [(hop_headers.REFUSED, reason.encode())], b"{}")

    return behave


async def vanish(ingress: FakeIngress, exchange: Exchange, received: Received) -> None:
    """Read the request, then die before an answer."""
    received.body = await exchange.buffer_body(64 << 20) or b""
    exchange.abort()


def die_in_the_middle(once: asyncio.Event) -> Behaviour:
    """Begin an answer, and die when the event is set (a reset overtakes bytes that nobody has read yet)."""

    async def behave(ingress: FakeIngress, exchange: Exchange, received: Received) -> None:
        exchange.begin(200, None, [], 1000)
        exchange.write(b"half")
        exchange.flush()
        await once.wait()
        exchange.abort()

    return behave


def hold(until: asyncio.Event) -> Behaviour:
    """Answer once the event is set."""

    async def behave(ingress: FakeIngress, exchange: Exchange, received: Received) -> None:
        await until.wait()
        await echo(ingress, exchange, received)

    return behave


def refuse_before_body(reason: str) -> Behaviour:
    """Refuse without reading the body: no 100 Continue was given."""

    async def behave(ingress: FakeIngress, exchange: Exchange, received: Received) -> None:
        assert exchange.head.expect_continue
        assert not exchange.body_done, "the gateway sent the body before it was asked to"
        await refuse(reason)(ingress, exchange, received)

    return behave


class FakeIngress:
    """A node's ingress. `script` holds behaviours for the next requests; then it is `default`."""

    def __init__(self) -> None:
        self.received: list[Received] = []
        self.script: list[Behaviour] = []
        self.default: Behaviour = echo
        self.more_headers: list[Header] = []
        self.wake: Callable[[str], Awaitable[None]] = _wakes_nobody
        self.asleep: Callable[[str], bool] = lambda uid: False  # then a request wakes the instance and waits for it
        self.arrived = asyncio.Condition()
        self.left = asyncio.Event()
        self.port = 0
        self._server: Server | None = None

    async def start(self, port: int = 0) -> None:
        limits = Limits(header_bytes=16384, body_bytes=64 << 20)
        self._server = await serve(
            self._handle, "127.0.0.1", port, limits, request_ids=lambda: "1-0-0-0", on_fault=_raise_later
        )
        self.port = self._server.port

    async def kill(self) -> None:
        """As SIGKILL: nothing listens, every connection is cut."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.close(0)

    async def until_received(self, count: int) -> None:
        """Wait until so many requests have arrived."""
        async with asyncio.timeout(10), self.arrived:
            await self.arrived.wait_for(lambda: len(self.received) >= count)

    async def _handle(self, exchange: Exchange) -> None:
        head = exchange.head
        received = Received(head.method.decode(), head.target.decode(), list(head.headers))
        if received.target.encode() == hop_headers.WAKE_PATH and received.get(hop_headers.WAKE_HOLD_MS) is not None:
            await self._wake(exchange, received.uid)
            return
        exchange.on_gone(self.left.set)
        behave = self.script.pop(0) if self.script else self.default
        async with self.arrived:
            self.received.append(received)
            self.arrived.notify_all()
        if self.asleep(received.uid):
            try:
                await self.wake(received.uid)
            except HibernodeError as error:
                await refuse(error.reason)(self, exchange, received)
                return
            received.woke = True
        await behave(self, exchange, received)

    async def _wake(self, exchange: Exchange, uid: str) -> None:
        """A Wake is no request: it is neither recorded nor scripted."""
        try:
            await self.wake(uid)
        except HibernodeError as error:
            await exchange.fail(error, "1-0-0-0", extra=[(hop_headers.REFUSED, error.reason.encode())])
        else:
            await exchange.answer(200, [(hop_headers.FREE_SLOTS, b"1")])


async def _wakes_nobody(uid: str) -> None:
    raise NotFoundError("INSTANCE_NOT_FOUND", "no such instance")


def _raise_later(error: BaseException) -> None:
    asyncio.get_running_loop().call_exception_handler({"message": "fake ingress", "exception": error})


# ---- a whole node ---------------------------------------------------------------------------------------------


# To mypy the servicer is abstract; at run time what is left out answers UNIMPLEMENTED, which is what a fake wants.
_Servicer: Any = instance_service_pb2_grpc.InstanceServiceServicer


@dataclass
class FakeInstance:
    """An instance that exists only in reports."""

    uid: str
    function: str
    request_id: str
    spec: bytes
    concurrency: int
    revision: str
    gpu: str
    state: Instance.State.ValueType = Instance.STATE_RUNNING
    reason: str = ""
    message: str = ""


@dataclass
class FakeAgentNode(_Servicer):  # type: ignore[misc]  # see _Servicer
    """A node. `first_state`: of what it creates; `create_error`, `wake_error`: raised instead of obeying;
    `wake_gate`: a wake waits for it."""

    name: str
    token: str
    gpus: int = 2
    instances_per_gpu: int = 1
    runtimes: tuple[str, ...] = ("process",)
    first_state: Instance.State.ValueType = Instance.STATE_RUNNING
    create_error: HibernodeError | None = None
    wake_error: HibernodeError | None = None
    ingress: FakeIngress = field(default_factory=FakeIngress)
    instances: dict[str, FakeInstance] = field(default_factory=dict)
    woken: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    created: list[str] = field(default_factory=list)
    epoch: int = 1
    wake_gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.wake_gate.set()
        self.ingress.wake = self._wake
        self.ingress.asleep = self._sleeps
        self._numbers = itertools.count(1)
        self._grpc: GrpcServer | None = None
        self._grpc_port = 0
        self._reporting: asyncio.Task[None] | None = None
        self._changed: dict[str, None] = {}
        self._something = asyncio.Event()

    async def start(self, scheduler: str) -> None:
        """Serve, and report to the scheduler at `host:port` until `kill`."""
        await self.ingress.start(self.ingress.port)
        tokens = TokenTable([(self.token, Principal("scheduler", Role.OPERATOR))])
        self._grpc = GrpcServer(Services(instances=self), tokens)
        self._grpc_port = self._grpc.bind_tcp("127.0.0.1", self._grpc_port)
        await self._grpc.start()
        self._reporting = asyncio.create_task(self._report_for_ever(scheduler))

    async def kill(self) -> None:
        """As SIGKILL of the agent: instances are remembered, for they live on."""
        if self._reporting is not None:
            self._reporting.cancel()
            await asyncio.gather(self._reporting, return_exceptions=True)
        await self.ingress.kill()
        if self._grpc is not None:
            await self._grpc.stop(0)
        self.epoch += 1

    def set_state(self, uid: str, state: Instance.State.ValueType, reason: str = "", message: str = "") -> None:
        """Something happened to an instance."""
        one = self.instances[uid]
        one.state, one.reason, one.message = state, reason, message
        self._report(uid)

    def _sleeps(self, uid: str) -> bool:
        return uid in self.instances and self.instances[uid].state == Instance.STATE_FROZEN

    async def _wake(self, uid: str) -> None:
        self.woken.append(uid)
        await self.wake_gate.wait()
        if self.wake_error is not None:
            raise self.wake_error
        self.set_state(uid, Instance.STATE_RUNNING)

    # ---- InstanceService --------------------------------------------------------------------------------------

    async def CreateInstance(self, request: pb.CreateInstanceRequest, context: object) -> pb.CreateInstanceResponse:  # noqa: N802
        if self.create_error is not None:
            raise self.create_error
        spec = request.spec.SerializeToString(deterministic=True)
        for one in self.instances.values():
            if one.request_id == request.request_id:
                if one.spec != spec:
                    raise ConflictError("REQUEST_ID_REUSED", "another spec under this request_id")
                return pb.CreateInstanceResponse(instance=self._show(one))
        number = next(self._numbers)
        one = FakeInstance(
            uid=f"{self.name}-i{number}",
            function=request.spec.name,
            request_id=request.request_id,
            spec=spec,
            concurrency=request.spec.instance_concurrency or 1,
            revision=request.spec.revision,
            gpu=f"{self.name}-gpu{(number - 1) % max(1, self.gpus)}",
            state=self.first_state,
        )
        self.instances[one.uid] = one
        self.created.append(request.request_id)
        self._report(one.uid)
        return pb.CreateInstanceResponse(instance=self._show(one))

    async def StopInstance(self, request: pb.StopInstanceRequest, context: object) -> pb.StopInstanceResponse:  # noqa: N802
        one = self.instances.pop(request.uid, None)
        if one is None:
            raise NotFoundError("INSTANCE_NOT_FOUND", "no such instance")
        self.stopped.append(request.uid)
        self._report(request.uid)
        one.state = Instance.STATE_STOPPED
        return pb.StopInstanceResponse(instance=self._show(one))

    def _show(self, one: FakeInstance) -> Instance:
        return Instance(
            uid=one.uid,
            node=self.name,
            function=one.function,
            request_id=one.request_id,
            state=one.state,
            state_reason=one.reason,
            state_message=one.message,
        )

    # ---- the load stream --------------------------------------------------------------------------------------

    def _report(self, uid: str) -> None:
        self._changed[uid] = None
        self._something.set()

    async def _report_for_ever(self, scheduler: str) -> None:
        async with DaemonChannel(scheduler, self.token) as channel:
            while True:
                stream = channel.report_load()
                reader = asyncio.create_task(stream.receive())
                try:
                    await self._write(stream.send)
                except HibernodeError:
                    pass
                finally:
                    reader.cancel()
                    await asyncio.gather(reader, return_exceptions=True)
                    stream.close()
                await asyncio.sleep(0.05)

    async def _write(self, send: Callable[[ReportLoadRequest], Awaitable[None]]) -> None:
        sequence = 0
        while True:
            sequence += 1
            await send(self._message(sequence, snapshot=sequence == 1))
            try:
                async with asyncio.timeout(0.2):
                    await self._something.wait()
            except TimeoutError:
                pass

    def _message(self, sequence: int, *, snapshot: bool) -> ReportLoadRequest:
        self._something.clear()
        message = ReportLoadRequest(
            epoch=self.epoch, sequence=sequence, snapshot=snapshot, load=NodeLoad(state=Node.STATE_READY)
        )
        if snapshot:
            message.registration.CopyFrom(self.registration())
        reported = list(self.instances) if snapshot else [uid for uid in self._changed if uid in self.instances]
        message.removed_uids.extend(uid for uid in self._changed if uid not in self.instances)
        self._changed.clear()
        message.instances.extend(self._load(self.instances[uid]) for uid in reported)
        return message

    def registration(self) -> Registration:
        """What it says of itself."""
        return Registration(
            boot_id="boot-1",
            ingress_address=f"127.0.0.1:{self.ingress.port}",
            grpc_address=f"127.0.0.1:{self._grpc_port}",
            gpus=[Gpu(uuid=f"{self.name}-gpu{n}", index=n, health=Gpu.HEALTH_OK) for n in range(self.gpus)],
            instances_per_gpu=self.instances_per_gpu,
            runtimes=self.runtimes,
            gpu_migration=True,
        )

    def _load(self, one: FakeInstance) -> InstanceLoad:
        return InstanceLoad(
            uid=one.uid,
            function=one.function,
            revision=one.revision,
            request_id=one.request_id,
            state=one.state,
            state_reason=one.reason,
            state_message=one.message,
            concurrency=one.concurrency,
            healthy=True,
            gpu_uuids=[one.gpu],
        )
