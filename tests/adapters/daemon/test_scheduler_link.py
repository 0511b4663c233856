"""The line to the scheduler, on a real gRPC server that plays it: reports, resync, outages, uploads."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest
from structlog.testing import capture_logs

from agent.adapters.daemon import scheduler_link, usage_upload
from agent.adapters.daemon.scheduler_link import SchedulerLink
from agent.core.errors import UnavailableError
from agent.core.types import SECOND_NS, Hook, Hooks, InstanceState
from agent.v1 import scheduler_service_pb2_grpc, usage_service_pb2, usage_service_pb2_grpc
from agent.v1.scheduler_service_pb2 import ReportLoadRequest, ReportLoadResponse
from agent.v1.types_pb2 import Instance
from agent.wire.clients import DaemonChannel
from agent.wire.server import GrpcServer, Services
from agent.wire.tokens import Principal, Role, TokenTable
from tests.api.test_instance_servicer import observer_of
from tests.contract.test_stores import window
from tests.host.rig import OCR, World, a_world, eventually, hangs, until

TOKEN = "node-credential-0123456789"


@dataclass
class Scheduler(scheduler_service_pb2_grpc.SchedulerServiceServicer, usage_service_pb2_grpc.UsageServiceServicer):
    """Writes down what it hears. `resync_at`: at this sequence number it asks for everything anew, once."""

    heard: list[ReportLoadRequest] = field(default_factory=list)
    news: asyncio.Condition = field(default_factory=asyncio.Condition)
    resync_at: int = 0
    end_after: int = 0
    refuse_uploads: bool = False
    uploads: list[list[tuple[str, int]]] = field(default_factory=list)
    acknowledge: int = 1 << 30
    refuses: str = ""
    nodes: set[str] = field(default_factory=set)

    async def ReportLoad(  # noqa: N802
        self, request_iterator: AsyncIterator[ReportLoadRequest], context: object
    ) -> AsyncIterator[ReportLoadResponse]:
        async for message in request_iterator:
            async with self.news:
                self.heard.append(message)
                self.news.notify_all()
            resync = message.sequence == self.resync_at
            self.resync_at = 0 if resync else self.resync_at
            yield ReportLoadResponse(node="n1", resync=resync)
            if message.sequence == self.end_after:
                self.end_after = 0
                return

    async def UploadUsageWindows(  # noqa: N802
        self, request: usage_service_pb2.UploadUsageWindowsRequest, context: object
    ) -> usage_service_pb2.UploadUsageWindowsResponse:
        if self.refuse_uploads:
            raise UnavailableError("STORE_FAILED", "no room")
        self.uploads.append([(window.instance_uid, window.seq) for window in request.windows])
        self.nodes.update(window.node for window in request.windows)
        answer = usage_service_pb2.UploadUsageWindowsResponse()
        for one in request.windows:
            if one.instance_uid == self.refuses:
                answer.refusals.add(instance_uid=one.instance_uid, seq=one.seq, reason="USAGE_FOREIGN_NODE")
        for uid in sorted({one.instance_uid for one in request.windows} - {self.refuses}):
            seqs = [w.seq for w in request.windows if w.instance_uid == uid and w.seq <= self.acknowledge]
            if seqs:
                answer.marks.add(instance_uid=uid, seq=max(seqs))
        return answer

    async def until_heard(self, what: object, deadline_s: float = 10.0) -> ReportLoadRequest:
        """The first message for which `what` holds."""
        assert callable(what)
        async with asyncio.timeout(deadline_s), self.news:
            await self.news.wait_for(lambda: any(what(message) for message in self.heard))
        return next(message for message in self.heard if what(message))


@dataclass
class Line:
    world: World
    link: SchedulerLink
    scheduler: Scheduler


@asynccontextmanager
async def a_line(*, credential: str = TOKEN, **knobs: object) -> AsyncIterator[Line]:
    scheduler = Scheduler(**knobs)  # type: ignore[abstract, arg-type]  # the rest of them is not called
    tokens = TokenTable([(TOKEN, Principal("n1", Role.NODE))])
    server = GrpcServer(Services(scheduler=scheduler, usage=scheduler), tokens)
    port = server.bind_tcp("127.0.0.1", 0)
    await server.start()
    async with a_world() as world, DaemonChannel(f"127.0.0.1:{port}", credential) as channel:
        link = SchedulerLink(channel, observer_of(world), world.node.actors, world.store, 0.01)
        world.node.listeners.append(link)
        running = asyncio.create_task(link.run())
        try:
            yield Line(world, link, scheduler)
            assert not running.done(), "it goes on through everything"
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            await server.stop(0)


def counted(channel: DaemonChannel, method: str) -> list[None]:
    """One entry for every call of the method from now on."""
    real, calls = getattr(channel, method), list[None]()

    def call() -> object:
        calls.append(None)
        return real()

    setattr(channel, method, call)
    return calls


def shows(uid: str, state: Instance.State.ValueType) -> object:
    return lambda message: any(one.uid == uid and one.state == state for one in message.instances)


async def test_it_registers_and_then_reports_changes_at_once() -> None:
    async with a_line() as line:
        first = await line.scheduler.until_heard(lambda message: True)
        assert (first.sequence, first.snapshot) == (1, True)
        assert len(first.registration.gpus) == 2
        actor = await line.world.running()
        change = await line.scheduler.until_heard(shows(actor.uid, Instance.STATE_RUNNING))
        assert not change.snapshot
        numbers = [message.sequence for message in line.scheduler.heard]
        assert numbers == list(range(1, len(numbers) + 1))
        assert line.link.connected


async def test_one_that_wakes_is_told_when_it_is_awake_or_else_a_little_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a request waits for it the loop has better things to do; a wake that takes seconds is not hidden."""
    monkeypatch.setattr(scheduler_link, "HEARTBEAT_S", 60.0)
    async with a_line() as line:
        actor = await line.world.frozen()
        await line.scheduler.until_heard(shows(actor.uid, Instance.STATE_FROZEN))
        line.world.freezer.hold("wake")
        began = asyncio.get_running_loop().time()
        actor.wake(0, line.world.clock.monotonic_ns() + SECOND_NS)
        await line.scheduler.until_heard(shows(actor.uid, Instance.STATE_RESTORING))
        assert asyncio.get_running_loop().time() - began >= scheduler_link.WAKE_REPORT_DELAY_S
        line.world.freezer.release("wake")
        line.scheduler.heard.clear()
        await line.scheduler.until_heard(shows(actor.uid, Instance.STATE_RUNNING))


async def test_an_instance_is_reported_as_soon_as_it_is_made_however_long_it_takes_to_start() -> None:
    """The scheduler gives an instance up that it has not heard of 15 s after its create: models load longer."""
    async with a_line() as line:
        await line.scheduler.until_heard(lambda message: message.snapshot)
        line.world.app.answers["/initialize"] = hangs
        actor = await line.world.create(replace(OCR, hooks=Hooks(initializer=Hook(timeout_ns=300 * SECOND_NS))))
        first = await line.scheduler.until_heard(lambda message: any(x.uid == actor.uid for x in message.instances))
        assert first.instances[0].state == Instance.STATE_STARTING
        assert actor.state is InstanceState.STARTING


async def test_requests_inside_are_told_with_the_heartbeat_where_no_edge_tells_them() -> None:
    """Of several at a time only the first and the last make an edge: what was said in between would be believed on."""
    async with a_line() as line:
        actor = await line.world.running(replace(OCR, instance_concurrency=4))
        assert [actor.gate.try_enter() for _ in range(3)] == [None] * 3

        def says(count: int) -> object:
            return lambda message: any((one.uid, one.in_flight) == (actor.uid, count) for one in message.instances)

        await line.scheduler.until_heard(says(3))
        actor.gate.leave()
        await line.scheduler.until_heard(says(2))
        for _ in range(2):
            actor.gate.leave()
        await line.scheduler.until_heard(says(0))


async def test_an_instance_that_is_gone_is_reported_as_gone() -> None:
    from agent.core.lifecycle.events import StopAsked

    async with a_line() as line:
        actor = await line.world.running()
        await line.scheduler.until_heard(shows(actor.uid, Instance.STATE_RUNNING))
        actor.handle(StopAsked(SECOND_NS))
        await line.scheduler.until_heard(lambda message: actor.uid in message.removed_uids)


async def test_a_resync_sends_everything_anew() -> None:
    async with a_line(resync_at=2) as line:
        actor = await line.world.running()
        again = await line.scheduler.until_heard(lambda message: message.snapshot and message.sequence > 1)
        assert [one.uid for one in again.instances] == [actor.uid]


async def test_a_stream_that_ends_is_opened_again_with_everything() -> None:
    async with a_line(end_after=1) as line:
        actor = await line.world.running()

        def fresh(message: ReportLoadRequest) -> bool:
            return message.sequence == 1 and bool(message.instances)

        again = await line.scheduler.until_heard(fresh)
        assert again.registration.gpus
        assert again.instances[0].uid == actor.uid


async def test_a_credential_the_scheduler_does_not_know_is_said_once_and_not_at_every_attempt() -> None:
    """A node that never connects must not look like one that has nothing to say."""
    with capture_logs() as logs:
        async with a_line(credential="a-token-of-nobody-0123456789") as line:
            attempts = counted(line.link._channel, "report_load")
            await eventually(lambda: len(attempts) >= 3)
            assert not line.link.connected
    said = [entry for entry in logs if entry["event"].startswith("scheduler.")]
    assert [(entry["event"], entry["reason"]) for entry in said] == [("scheduler.not_connected", "TOKEN_UNKNOWN")]


async def test_a_bug_in_a_report_does_not_end_the_reports() -> None:
    async with a_line() as line:
        await line.scheduler.until_heard(lambda message: True)
        real, failed = line.link._observer.node, asyncio.Event()

        def broken() -> object:
            failed.set()
            line.link._observer.node = real  # type: ignore[method-assign]
            raise KeyError("a GPU nobody knows")

        line.link._observer.node = broken  # type: ignore[assignment, method-assign]
        actor = await line.world.running()
        await asyncio.wait_for(failed.wait(), 5)
        await line.scheduler.until_heard(shows(actor.uid, Instance.STATE_RUNNING))


async def test_windows_are_uploaded_until_acknowledged() -> None:
    async with a_line(acknowledge=0) as line:
        actor = await line.world.frozen()
        line.world.clock.advance(SECOND_NS)
        line.world.billing.changed(actor.uid, InstanceState.FROZEN)
        await line.world.billing.flush()
        await eventually(lambda: bool(line.scheduler.uploads) and line.scheduler.uploads[-1][0][1] > 0)
        line.scheduler.acknowledge = 1 << 30
        sealed = {(w.instance_uid, w.seq) for w in await line.world.store.read_windows() if w.sealed}
        await eventually(lambda: line.world.store._acknowledged >= sealed)
        assert await line.link.usage.upload_once() is False, "nothing is sent twice"


async def test_windows_bear_the_name_of_the_credential() -> None:
    """node_name is for people; a node whose host name is another must not lose its bill."""
    async with a_line() as line:
        await line.scheduler.until_heard(lambda message: message.snapshot)
        await eventually(lambda: line.link.connected)
        await line.world.store.upsert_windows([window("i-new", 0)])
        await eventually(lambda: ("i-new", 0) in line.world.store._acknowledged)
        assert line.scheduler.nodes == {"n1"}


async def test_windows_of_before_wait_for_the_name_of_the_credential() -> None:
    """An agent that comes back has windows before it has heard its name: under its own they are refused for good."""
    async with a_line(refuse_uploads=True) as line:
        await line.world.store.upsert_windows([window("i-before", 0)])
        line.scheduler.refuse_uploads = False
        observer = observer_of(line.world)
        observer.identity = replace(observer.identity, name="a-host-name")
        before_it_connects = SchedulerLink(line.link._channel, observer, line.world.node.actors, line.world.store, 0.01)
        await before_it_connects.usage.upload_once()
        await eventually(lambda: ("i-before", 0) in line.world.store._acknowledged)
        assert line.scheduler.nodes == {"n1"}


async def test_windows_that_are_refused_are_put_aside_and_the_others_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that was renamed: its old windows stand before all others, and more of them than one upload takes."""
    monkeypatch.setattr(usage_upload, "UPLOAD_BATCH", 2)
    old = [window("i-a-old", seq) for seq in range(5)]
    async with a_line(refuses="i-a-old") as line:
        await line.world.store.upsert_windows([*old, window("i-new", 0)])
        await eventually(lambda: ("i-new", 0) in line.world.store._acknowledged)
        assert await line.world.store.unacknowledged(10) == []
        sent = [key for batch in line.scheduler.uploads for key in batch]
        assert len(sent) == len(set(sent)), "none is offered twice"
        kept = await line.world.store.read_windows("i-a-old")
        assert len(kept) == 5, "they stay in the node's own ledger"


async def test_an_upload_that_fails_is_tried_again_and_forgets_nothing() -> None:
    async with a_line(refuse_uploads=True) as line:
        actor = await line.world.running()
        line.world.clock.advance(SECOND_NS)
        line.world.billing.changed(actor.uid, InstanceState.RUNNING)
        await line.world.billing.flush()
        before = await line.world.store.unacknowledged(10)
        assert before
        line.scheduler.refuse_uploads = False
        keys = {(w.instance_uid, w.seq) for w in before}
        await eventually(lambda: line.world.store._acknowledged >= keys)
        assert {key for batch in line.scheduler.uploads for key in batch} >= keys
        await until(actor, InstanceState.RUNNING)


def test_the_bounds_are_those_of_the_design() -> None:
    assert (scheduler_link.COALESCE_S, scheduler_link.HEARTBEAT_S) == (0.005, 1.0)


async def test_a_heartbeat_has_gauges_of_those_that_are_awake() -> None:
    async with a_line() as line:
        frozen = await line.world.frozen()
        awake = await line.world.running()
        both = {frozen.uid, awake.uid}
        message = await line.scheduler.until_heard(
            lambda m: m.load.state and {one.uid for one in m.load.instances} == {awake.uid}
        )
        assert both.isdisjoint(one.uid for one in line.scheduler.heard[0].load.instances)
        assert message.load.instances[0].vram_limit_bytes == 1 << 30
