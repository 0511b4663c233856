"""An agent without instances: a real ingress and a real gRPC server over sockets, with knobs and a record.

`FakeIngress` alone is enough for the gateway; `FakeAgentNode` adds InstanceService and the load stream, and is a whole
node for the scheduler. `tests/contract/test_agent_node.py` holds it to what a real agent does.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from agent.core.errors import (
    ConflictError,
    DeadlineError,
    ExhaustedError,
    HibernodeError,
    InvalidArgumentError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from agent.core.function_rules import check_function
from agent.core.types import GIB
from agent.host.instance.waking import MAX_HOLD_NS
from agent.http import hop_headers
from agent.http.exchange import Exchange
from agent.http.limits import Limits
from agent.http.message import Header
from agent.http.server import Server, serve
from agent.v1 import instance_service_pb2 as pb
from agent.v1 import instance_service_pb2_grpc
from agent.v1.scheduler_service_pb2 import InstanceLoad, NodeLoad, Registration, ReportLoadRequest
from agent.v1.types_pb2 import Gpu, HostMemory, Instance, Node
from agent.wire.clients import DaemonChannel, LoadStream
from agent.wire.convert_function import function_from_proto
from agent.wire.server import GrpcServer, Services
from agent.wire.tokens import Principal, Role, TokenTable

WAKE_PATH = hop_headers.WAKE_PATH.decode()
TOKEN, INSTANCE, ANY = hop_headers.TOKEN.decode(), hop_headers.INSTANCE.decode(), hop_headers.ANY_INSTANCE.decode()
DEADLINE_MS, WAKE_HOLD_MS = hop_headers.DEADLINE_MS.decode(), hop_headers.WAKE_HOLD_MS.decode()
STARTED = hop_headers.STARTED.decode()
REFUSED, FREE_SLOTS = hop_headers.REFUSED.decode(), hop_headers.FREE_SLOTS.decode()
QUEUE_TIME, WAKE_TIME = hop_headers.QUEUE_MS.decode(), hop_headers.WAKE_MS.decode()

WAKE_MS = b"12.500"
"""How long every request waited that had to wait, at a frozen instance or at a busy one."""
BODY_BYTES = 64 << 20
CREATED = Timestamp(seconds=1_767_225_600)
Behaviour = Callable[["FakeIngress", Exchange, "Received"], Awaitable[None]]


@dataclass
class Received:
    """A request as it came in at the ingress. `body` is filled by behaviours that read it, `served_by` by the grant."""

    method: str
    target: str
    headers: list[Header]
    body: bytes = b""
    served_by: str = ""
    woke: bool = False  # the instance slept, and woke for it
    waited: bool = False  # the instance was busy

    def get(self, name: str | bytes) -> str | None:
        wanted = name.encode() if isinstance(name, str) else name
        for key, value in self.headers:
            if key == wanted:
                return value.decode("latin-1")
        return None

    @property
    def uid(self) -> str:
        return self.get(INSTANCE) or ""


# ---- what the ingress may do with a request -------------------------------------------------------------------


async def echo(ingress: FakeIngress, exchange: Exchange, received: Received) -> None:
    """Answer 200 with the body once the instance has a slot."""
    await ingress.grant(exchange, received)
    await _answer(ingress, exchange, received)


def refuse(reason: str) -> Behaviour:
    """Answer as an agent whose gate is closed."""

    async def behave(ingress: FakeIngress, exchange: Exchange, received: Received) -> None:
        raise UnavailableError(reason, "the fake was told to refuse")

    return behave


async def vanish(ingress: FakeIngress, exchange: Exchange, received: Received) -> None:
    """Give the request to the instance, then die before an answer."""
    await ingress.grant(exchange, received)
    received.body = await exchange.buffer_body(BODY_BYTES) or b""
    exchange.abort()


async def vanish_waiting(ingress: FakeIngress, exchange: Exchange, received: Received) -> None:
    """Die while the request waits for the instance, which has seen nothing of it."""
    exchange.abort()


def die_in_the_middle(once: asyncio.Event) -> Behaviour:
    """Begin an answer, and die when the event is set (a reset overtakes bytes that are not read yet)."""

    async def behave(ingress: FakeIngress, exchange: Exchange, received: Received) -> None:
        await ingress.grant(exchange, received)
        exchange.begin(200, None, [], 1000)
        exchange.write(b"half")
        exchange.flush()
        await once.wait()
        exchange.abort()

    return behave


def hold(until: asyncio.Event) -> Behaviour:
    """Answer once the event is set."""

    async def behave(ingress: FakeIngress, exchange: Exchange, received: Received) -> None:
        await ingress.grant(exchange, received)
        await until.wait()
        await _answer(ingress, exchange, received)

    return behave


def refuse_before_body(reason: str) -> Behaviour:
    """Refuse without reading the body: no 100 Continue was given."""

    async def behave(ingress: FakeIngress, exchange: Exchange, received: Received) -> None:
        assert not exchange.body_done, "the gateway sent the body before it was asked to"
        await refuse(reason)(ingress, exchange, received)

    return behave


async def _answer(ingress: FakeIngress, exchange: Exchange, received: Received) -> None:
    received.body = await exchange.buffer_body(BODY_BYTES) or b""
    waited = WAKE_TIME if received.woke else QUEUE_TIME
    headers = [
        (b"content-type", b"text/plain"),
        (b"x-fc-status", b"200"),
        (b"x-fc-request-id", (received.get("x-fc-request-id") or "1-0-0-0").encode()),
        (b"x-fc-instance-id", received.served_by.encode()),
        *([(waited.encode(), WAKE_MS)] if received.woke or received.waited else []),
        *ingress.more_headers,
    ]
    await exchange.answer(200, headers, received.body or b"served by " + received.served_by.encode())


class FakeIngress:
    """A node's ingress. `script` holds behaviours for the next requests; then it is `default`.

    What the node behind it knows comes through `check` (raises for an instance that takes no request), `asleep` and
    `wake` (a request to a frozen instance wakes it), `concurrency` and `siblings` (of an instance, itself included).
    Alone it serves every instance there may be.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        self.received: list[Received] = []
        self.script: list[Behaviour] = []
        self.default: Behaviour = echo
        self.more_headers: list[Header] = []
        self.check: Callable[[str], None] = lambda uid: None
        self.wake: Callable[[str], Awaitable[None]] = _wakes_nobody
        self.asleep: Callable[[str], bool] = lambda uid: False
        self.concurrency: Callable[[str], int] = lambda uid: sys.maxsize
        self.siblings: Callable[[str], Sequence[str]] = lambda uid: (uid,)
        self.in_flight: Counter[str] = Counter()
        self.arrived = asyncio.Condition()
        self.left = asyncio.Event()
        self.room = asyncio.Event()
        """Set whenever a request that waits should look again."""
        self.port = 0
        self._server: Server | None = None

    async def start(self, port: int = 0) -> None:
        limits = Limits(header_bytes=16384, body_bytes=BODY_BYTES)
        self._server = await serve(
            self._handle, "127.0.0.1", port, limits, request_ids=lambda: "1-0-0-0", on_fault=_raise_later
        )
        self.port = self._server.port

    async def kill(self) -> None:
        """As SIGKILL: nothing listens, every connection is cut."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.close(0)
        self.in_flight = Counter()

    async def until_received(self, count: int) -> None:
        """Wait until so many requests have arrived."""
        async with asyncio.timeout(10), self.arrived:
            await self.arrived.wait_for(lambda: len(self.received) >= count)

    async def grant(self, exchange: Exchange, received: Received) -> None:
        """Wait for a slot of the instance that is named, or of a sibling where any will do; the slot is given back when
        the request has ended. From here on bytes of it may reach the instance: a caller that asks for it is told."""
        self.check(received.uid)
        try:
            async with asyncio.timeout(_milliseconds(received, DEADLINE_MS, "DEADLINE_INVALID")):
                if self.asleep(received.uid):
                    await self.wake(received.uid)
                    received.woke = True
                while not (uid := self._with_room(received)):
                    self.check(received.uid)
                    received.waited = True
                    self.room.clear()
                    await self.room.wait()
                    if exchange.gone:
                        raise UnavailableError("CLIENT_GONE", "the client left while it waited")
        except TimeoutError:
            raise DeadlineError("QUEUE_TIMEOUT", "no instance became free in time") from None
        received.served_by = uid
        self.in_flight[uid] += 1
        if received.get(STARTED):
            exchange.send_processing()

    def _with_room(self, received: Received) -> str:
        candidates = self.siblings(received.uid) if received.get(ANY) else (received.uid,)
        return next((uid for uid in candidates if self.in_flight[uid] < self.concurrency(uid)), "")

    async def _handle(self, exchange: Exchange) -> None:
        head = exchange.head
        received = Received(head.method.decode(), head.target.decode(), list(head.headers))
        inside = self.in_flight
        try:
            self._authenticate(received)
            if not received.uid:
                raise InvalidArgumentError("INSTANCE_MISSING", "name the instance")
            if received.target == WAKE_PATH and received.get(WAKE_HOLD_MS) is not None:
                await self._wake(exchange, received)
                return
            exchange.on_gone(self.left.set)
            exchange.on_gone(self.room.set)
            behave = self.script.pop(0) if self.script else self.default
            async with self.arrived:
                self.received.append(received)
                self.arrived.notify_all()
            await behave(self, exchange, received)
        except HibernodeError as error:
            request_id = received.get("x-fc-request-id") or "1-0-0-0"
            await exchange.fail(error, request_id, extra=[(REFUSED.encode(), error.reason.encode())])
        finally:
            if received.served_by:
                inside[received.served_by] -= 1
                self.room.set()

    def _authenticate(self, received: Received) -> None:
        given = received.get(TOKEN)
        if given is None:
            raise UnauthenticatedError("TOKEN_MISSING", "the ingress needs the node's token")
        if given != self.token:
            raise UnauthenticatedError("TOKEN_UNKNOWN", "this node does not know that token")

    async def _wake(self, exchange: Exchange, received: Received) -> None:
        """A Wake is no request: it is neither recorded nor scripted."""
        uid = received.uid
        self.check(uid)
        timeout_s = _milliseconds(received, DEADLINE_MS, "DEADLINE_INVALID")
        hold_s = _milliseconds(received, WAKE_HOLD_MS, "HOLD_INVALID")
        if hold_s is None or hold_s > MAX_HOLD_NS / 1e9:
            raise InvalidArgumentError("HOLD_INVALID", "hold must be between 0 and 600 s")
        try:
            async with asyncio.timeout(timeout_s):
                await self.wake(uid)
        except TimeoutError:
            raise DeadlineError("WAKE_TIMEOUT", f"instance {uid} is not awake in time") from None
        free = max(0, min(self.concurrency(uid), 1000) - self.in_flight[uid])
        await exchange.answer(200, [(FREE_SLOTS.encode(), b"%d" % free)])


async def _wakes_nobody(uid: str) -> None:
    raise NotFoundError("INSTANCE_NOT_FOUND", "no such instance")


def _milliseconds(received: Received, name: str, reason: str) -> float | None:
    """A header of milliseconds, in seconds; None if it is not there."""
    given = received.get(name)
    if given is None:
        return None
    if not (given.isascii() and given.isdigit() and len(given) <= 10):
        raise InvalidArgumentError(reason, f"{name} must be a number of milliseconds")
    return int(given) / 1000


def _raise_later(error: BaseException, request_id: str) -> None:
    asyncio.get_running_loop().call_exception_handler({"message": "fake ingress", "exception": error})


# ---- a whole node ---------------------------------------------------------------------------------------------


# To mypy the servicer is abstract; at run time what is left out answers UNIMPLEMENTED, which is what a fake wants.
_Servicer: Any = instance_service_pb2_grpc.InstanceServiceServicer
_ENDED = (Instance.STATE_STOPPED, Instance.STATE_FAILED)


@dataclass
class FakeInstance:
    """An instance that exists only in reports."""

    uid: str
    function: str
    request_id: str
    spec: bytes
    concurrency: int
    revision: str
    gpus: tuple[str, ...]
    state: Instance.State.ValueType = Instance.STATE_RUNNING
    reason: str = ""
    message: str = ""


@dataclass
class FakeAgentNode(_Servicer):  # type: ignore[misc]  # see _Servicer
    """A node. `first_state`: of what it creates; `create_error`, `wake_error`: raised instead of obeying;
    `wake_gate`: a wake waits for it. `ended`: instances that have ended, which are remembered as an agent does."""

    name: str
    token: str
    gpus: int = 2
    instances_per_gpu: int = 1
    runtimes: tuple[str, ...] = ("process",)
    first_state: Instance.State.ValueType = Instance.STATE_RUNNING
    create_error: HibernodeError | None = None
    wake_error: HibernodeError | None = None
    instances: dict[str, FakeInstance] = field(default_factory=dict)
    ended: dict[str, FakeInstance] = field(default_factory=dict)
    woken: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    created: list[str] = field(default_factory=list)
    epoch: int = 1
    boot_id: str = "boot-1"
    wake_gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.wake_gate.set()
        self.ingress = FakeIngress(self.token)
        self.ingress.check = self._check
        self.ingress.wake = self._wake
        self.ingress.asleep = lambda uid: self.instances[uid].state == Instance.STATE_FROZEN
        self.ingress.concurrency = lambda uid: self.instances[uid].concurrency
        self.ingress.siblings = self._siblings
        self._numbers = itertools.count(1)
        self._grpc: GrpcServer | None = None
        self._grpc_port = 0
        self._reporting: asyncio.Task[None] | None = None
        self._changed: dict[str, None] = {}
        self._something = asyncio.Event()
        self._snapshot_due = False

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
        if state in _ENDED:
            self.ended[uid] = self.instances.pop(uid)
        self._report(uid)
        self.ingress.room.set()

    def _check(self, uid: str) -> None:
        one = self.instances.get(uid)
        if one is None:
            raise NotFoundError("INSTANCE_NOT_FOUND", f"no instance {uid!r} on this node")
        if one.state == Instance.STATE_STOPPING:
            raise UnavailableError("INSTANCE_STOPPING", "the instance is being stopped")

    def _siblings(self, uid: str) -> list[str]:
        """The instance itself first, then those of the same function that are awake."""
        function = self.instances[uid].function
        others = [one for one in self.instances.values() if one.function == function and one.uid != uid]
        return [uid, *(one.uid for one in others if one.state == Instance.STATE_RUNNING)]

    async def _wake(self, uid: str) -> None:
        if self.instances[uid].state == Instance.STATE_RUNNING:
            return
        self.woken.append(uid)
        await self.wake_gate.wait()
        if self.wake_error is not None:
            raise self.wake_error
        self.set_state(uid, Instance.STATE_RUNNING)

    # ---- InstanceService --------------------------------------------------------------------------------------

    async def CreateInstance(self, request: pb.CreateInstanceRequest, context: object) -> pb.CreateInstanceResponse:  # noqa: N802
        if self.create_error is not None:
            raise self.create_error
        if not 0 < len(request.request_id) <= 200:
            raise InvalidArgumentError("REQUEST_ID_INVALID", "request_id must have 1 to 200 characters")
        function = function_from_proto(request.spec)
        check_function(function)
        spec = request.spec.SerializeToString(deterministic=True)
        for one in (*self.instances.values(), *self.ended.values()):
            if one.request_id == request.request_id:
                if one.spec != spec:
                    raise ConflictError("REQUEST_ID_REUSED", "another spec under this request_id")
                return pb.CreateInstanceResponse(instance=self._show(one))
        one = FakeInstance(
            uid=f"{self.name}-i{next(self._numbers)}",
            function=request.spec.name,
            request_id=request.request_id,
            spec=spec,
            concurrency=request.spec.instance_concurrency or 1,
            revision=request.spec.revision,
            gpus=self._assign(function.gpu.count),
            state=self.first_state,
        )
        self.instances[one.uid] = one
        self.created.append(request.request_id)
        self._report(one.uid)
        return pb.CreateInstanceResponse(instance=self._show(one))

    def _assign(self, count: int) -> tuple[str, ...]:
        """The GPUs with the fewest instances on them."""
        taken = Counter(gpu for one in self.instances.values() for gpu in one.gpus)
        names = sorted((f"{self.name}-gpu{n}" for n in range(self.gpus)), key=lambda name: taken[name])
        free = [name for name in names if taken[name] < self.instances_per_gpu]
        if len(free) < count:
            raise ExhaustedError("GPU_CAPACITY", f"{count} GPU(s) are wanted and {len(free)} have room")
        return tuple(free[:count])

    async def StopInstance(self, request: pb.StopInstanceRequest, context: object) -> pb.StopInstanceResponse:  # noqa: N802
        one = self.instances.get(request.uid) or self.ended.get(request.uid)
        if one is None:
            raise NotFoundError("INSTANCE_NOT_FOUND", "no such instance")
        if one.state not in _ENDED:
            self.stopped.append(request.uid)
            self.set_state(one.uid, Instance.STATE_STOPPING)
            while self.ingress.in_flight[one.uid]:
                self.ingress.room.clear()
                await self.ingress.room.wait()
            self.set_state(one.uid, Instance.STATE_STOPPED)
        return pb.StopInstanceResponse(instance=self._show(one))

    def _show(self, one: FakeInstance) -> Instance:
        return Instance(
            uid=one.uid,
            node=self.name,
            function=one.function,
            revision=one.revision,
            request_id=one.request_id,
            state=one.state,
            state_reason=one.reason,
            state_message=one.message,
            gpu_uuids=one.gpus,
            healthy=True,
            create_time=CREATED,
            state_time=CREATED,
        )

    # ---- the load stream --------------------------------------------------------------------------------------

    def _report(self, uid: str) -> None:
        self._changed[uid] = None
        self._something.set()

    async def _report_for_ever(self, scheduler: str) -> None:
        async with DaemonChannel(scheduler, self.token) as channel:
            while True:
                stream = channel.report_load()
                reader = asyncio.create_task(self._read(stream))
                try:
                    await self._write(stream.send)
                except HibernodeError:
                    pass
                finally:
                    reader.cancel()
                    await asyncio.gather(reader, return_exceptions=True)
                    stream.close()
                await asyncio.sleep(0.05)

    async def _read(self, stream: LoadStream) -> None:
        while (answer := await stream.receive()) is not None:
            if answer.resync:
                self._snapshot_due = True
                self._something.set()

    async def _write(self, send: Callable[[ReportLoadRequest], Awaitable[None]]) -> None:
        self._snapshot_due = True
        for sequence in itertools.count(1):
            await send(self._message(sequence))
            try:
                async with asyncio.timeout(0.2):
                    await self._something.wait()
            except TimeoutError:
                pass

    def _message(self, sequence: int) -> ReportLoadRequest:
        self._something.clear()
        load = NodeLoad(state=Node.STATE_READY, host_memory=_MEMORY, gpus=self._gpus())
        message = ReportLoadRequest(epoch=self.epoch, sequence=sequence, snapshot=self._snapshot_due, load=load)
        message.monotonic_ns = time.monotonic_ns()
        if sequence == 1:
            message.registration.CopyFrom(self.registration())
        reported = list(self.instances) if self._snapshot_due else list(self._changed)
        if not self._snapshot_due:
            message.removed_uids.extend(uid for uid in self._changed if uid not in self.instances)
        self._snapshot_due = False
        self._changed.clear()
        message.instances.extend(self._load(self.instances.get(uid) or self.ended[uid]) for uid in reported)
        return message

    def registration(self) -> Registration:
        """What it says of itself."""
        return Registration(
            boot_id=self.boot_id,
            agent_version="0.1",
            ingress_address=f"127.0.0.1:{self.ingress.port}",
            grpc_address=f"127.0.0.1:{self._grpc_port}",
            gpus=self._gpus(),
            instances_per_gpu=self.instances_per_gpu,
            runtimes=self.runtimes,
            host_memory=_MEMORY,
            start_time=CREATED,
            gpu_migration=True,
        )

    def _gpus(self) -> list[Gpu]:
        names = [f"{self.name}-gpu{n}" for n in range(self.gpus)]
        return [
            Gpu(uuid=uuid, index=n, model="Emulated H100", memory_total_bytes=16 * GIB, health=Gpu.HEALTH_OK)
            for n, uuid in enumerate(names)
        ]

    def _load(self, one: FakeInstance) -> InstanceLoad:
        return InstanceLoad(
            uid=one.uid,
            function=one.function,
            revision=one.revision,
            request_id=one.request_id,
            state=one.state,
            state_reason=one.reason,
            state_message=one.message,
            in_flight=self.ingress.in_flight[one.uid],
            concurrency=one.concurrency,
            healthy=True,
            gpu_uuids=one.gpus,
            create_time=CREATED,
            state_time=CREATED,
        )


_MEMORY = HostMemory(total_bytes=64 * GIB, available_bytes=48 * GIB)
