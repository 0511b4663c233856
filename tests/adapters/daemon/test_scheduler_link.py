"""Tests the link to the scheduler on a real gRPC server in its place: reports, resync, outages, uploads."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from agent.adapters.daemon import scheduler_link, usage_upload
from agent.adapters.daemon.scheduler_link import BACK_OFF_REFUSED_S, SchedulerLink
from agent.core.errors import ConfigError, UnavailableError
from agent.core.types import SECOND_NS, Hook, Hooks, InstanceState
from agent.v1 import scheduler_service_pb2_grpc, usage_service_pb2, usage_service_pb2_grpc
from agent.v1.scheduler_service_pb2 import ReportLoadRequest, ReportLoadResponse
from agent.v1.types_pb2 import Instance
from agent.wire.clients import DaemonChannel
from agent.wire.interceptors import accept_stream
from agent.wire.server import GrpcServer, Services
from agent.wire.tokens import Principal, Role, TokenTable
from tests.api.test_instance_servicer import observer_of
from tests.contract.test_stores import window
from tests.host.rig import OCR, NodeRig, eventually, hangs, node_rig, until

TOKEN = "node-credential-0123456789"


@dataclass
class Scheduler(scheduler_service_pb2_grpc.SchedulerServiceServicer, usage_service_pb2_grpc.UsageServiceServicer):
    """Records what it receives. At the sequence number `resync_at` it asks for everything again, once."""

    received: list[ReportLoadRequest] = field(default_factory=list)
    news: asyncio.Condition = field(default_factory=asyncio.Condition)
    resync_at: int = 0
    end_after: int = 0
    refuse_uploads: bool = False
    uploads: list[list[tuple[str, int]]] = field(default_factory=list)
    acknowledge: int = 1 << 30
    refuses: str = ""
    nodes: set[str] = field(default_factory=set)

    async def ReportLoad(  # noqa: N802
        self, request_iterator: AsyncIterator[ReportLoadRequest], context: Any
    ) -> AsyncIterator[ReportLoadResponse]:
        await accept_stream(context)
        async for message in request_iterator:
            async with self.news:
                self.received.append(message)
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

    async def until_received(self, what: object, deadline_s: float = 10.0) -> ReportLoadRequest:
        """The first message for which `what` is true."""
        assert callable(what)
        async with asyncio.timeout(deadline_s), self.news:
            await self.news.wait_for(lambda: any(what(message) for message in self.received))
        return next(message for message in self.received if what(message))


@dataclass
class LinkRig:
    world: NodeRig
    link: SchedulerLink
    scheduler: Scheduler


@asynccontextmanager
async def link_rig(*, credential: str = TOKEN, **knobs: object) -> AsyncIterator[LinkRig]:
    scheduler = Scheduler(**knobs)  # type: ignore[abstract, arg-type]  # the rest of them is not called
    tokens = TokenTable([(TOKEN, Principal("n1", Role.NODE))])
    server = GrpcServer(Services(scheduler=scheduler, usage=scheduler), tokens)
    port = server.bind_tcp("127.0.0.1", 0)
    await server.start()
    async with node_rig() as world, DaemonChannel(f"127.0.0.1:{port}", credential) as channel:
        link = SchedulerLink(channel, observer_of(world), world.node.actors, world.store, 0.01)
        world.node.listeners.append(link)
        running = asyncio.create_task(link.run())
        try:
            yield LinkRig(world, link, scheduler)
            assert not running.done(), "it goes on through everything"
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            await server.stop(0)


def counted(channel: DaemonChannel, method: str) -> list[None]:
    """Counts the calls of the method from now on, one entry each."""
    real, calls = getattr(channel, method), list[None]()

    def call() -> object:
        calls.append(None)
        return real()

    setattr(channel, method, call)
    return calls


def shows(uid: str, state: Instance.State.ValueType) -> object:
    return lambda message: any(one.uid == uid and one.state == state for one in message.instances)


async def test_link_registers_and_reports_changes_at_once() -> None:
    async with link_rig() as rig:
        first = await rig.scheduler.until_received(lambda message: True)
        assert (first.sequence, first.snapshot) == (1, True)
        assert len(first.registration.gpus) == 2
        actor = await rig.world.running()
        change = await rig.scheduler.until_received(shows(actor.uid, Instance.STATE_RUNNING))
        assert not change.snapshot
        numbers = [message.sequence for message in rig.scheduler.received]
        assert numbers == list(range(1, len(numbers) + 1))
        assert rig.link.connected


async def test_wake_is_reported_when_done_or_after_a_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request waits for the wake on the same loop; a wake that takes seconds is still reported."""
    monkeypatch.setattr(scheduler_link, "HEARTBEAT_S", 60.0)
    async with link_rig() as rig:
        actor = await rig.world.frozen()
        await rig.scheduler.until_received(shows(actor.uid, Instance.STATE_FROZEN))
        rig.world.freezer.hold("wake")
        began = asyncio.get_running_loop().time()
        actor.wake(0, rig.world.clock.monotonic_ns() + SECOND_NS)
        await rig.scheduler.until_received(shows(actor.uid, Instance.STATE_RESTORING))
        assert asyncio.get_running_loop().time() - began >= scheduler_link.WAKE_REPORT_DELAY_S
        rig.world.freezer.release("wake")
        rig.scheduler.received.clear()
        await rig.scheduler.until_received(shows(actor.uid, Instance.STATE_RUNNING))


async def test_slowly_starting_instance_is_reported_at_once() -> None:
    """The scheduler gives up an instance that is not reported within 15 s; models load longer."""
    async with link_rig() as rig:
        await rig.scheduler.until_received(lambda message: message.snapshot)
        rig.world.app.answers["/initialize"] = hangs
        actor = await rig.world.create(replace(OCR, hooks=Hooks(initializer=Hook(timeout_ns=300 * SECOND_NS))))
        first = await rig.scheduler.until_received(lambda message: any(x.uid == actor.uid for x in message.instances))
        assert first.instances[0].state == Instance.STATE_STARTING
        assert actor.state is InstanceState.STARTING


async def test_heartbeat_reports_changed_request_counts() -> None:
    """Only the first and the last of several requests trigger a report; the heartbeat corrects the count between."""
    async with link_rig() as rig:
        actor = await rig.world.running(replace(OCR, instance_concurrency=4))
        assert [actor.gate.try_enter() for _ in range(3)] == [None] * 3

        def reports(count: int) -> object:
            return lambda message: any((one.uid, one.in_flight) == (actor.uid, count) for one in message.instances)

        await rig.scheduler.until_received(reports(3))
        actor.gate.leave()
        await rig.scheduler.until_received(reports(2))
        for _ in range(2):
            actor.gate.leave()
        await rig.scheduler.until_received(reports(0))


async def test_gone_instance_is_reported() -> None:
    from agent.core.lifecycle.events import StopAsked

    async with link_rig() as rig:
        actor = await rig.world.running()
        await rig.scheduler.until_received(shows(actor.uid, Instance.STATE_RUNNING))
        actor.handle(StopAsked(SECOND_NS))
        await rig.scheduler.until_received(lambda message: actor.uid in message.removed_uids)


async def test_resync_sends_everything_again() -> None:
    async with link_rig(resync_at=2) as rig:
        actor = await rig.world.running()
        again = await rig.scheduler.until_received(lambda message: message.snapshot and message.sequence > 1)
        assert [one.uid for one in again.instances] == [actor.uid]


async def test_ended_stream_is_reopened_with_everything() -> None:
    async with link_rig(end_after=1) as rig:
        actor = await rig.world.running()

        def fresh(message: ReportLoadRequest) -> bool:
            return message.sequence == 1 and bool(message.instances)

        again = await rig.scheduler.until_received(fresh)
        assert again.registration.gpus
        assert again.instances[0].uid == actor.uid


async def test_unknown_credential_is_logged_once() -> None:
    """A node that never connects must not look like an idle one."""
    with capture_logs() as logs:
        async with link_rig(credential="a-token-of-nobody-0123456789") as rig:
            attempts = counted(rig.link._channel, "report_load")
            await eventually(lambda: len(attempts) >= 3)
            assert not rig.link.connected
    logged = [entry for entry in logs if entry["event"].startswith("scheduler.")]
    assert [(entry["event"], entry["reason"]) for entry in logged] == [("scheduler.not_connected", "TOKEN_UNKNOWN")]


async def test_a_refusal_is_asked_again_more_and_more_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_link, "BACK_OFF_MIN_S", 0.001)
    monkeypatch.setattr(scheduler_link, "BACK_OFF_MAX_S", 0.001)
    pauses: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await real(0)

    monkeypatch.setattr(scheduler_link, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": sleep}))
    async with link_rig(credential="a-token-of-nobody-0123456789"):
        await eventually(lambda: len(pauses) >= 16)
    assert 0.5 * BACK_OFF_REFUSED_S <= max(pauses) <= 1.5 * BACK_OFF_REFUSED_S
    assert pauses[0] < 0.01


async def test_the_cause_of_an_outage_is_logged_once_though_streams_also_just_end() -> None:
    """A scheduler that refuses what is sent may end the stream during a write, which hides why."""
    errors = iter([ConfigError("ADDRESS_REFUSED", "no"), UnavailableError("STREAM_ENDED", "it ended")] * 3)

    class Stream:
        async def send(self, message: object) -> None:
            raise next(errors, UnavailableError("UNREACHABLE", "it is gone"))

        async def receive(self) -> None:
            await asyncio.Event().wait()

        def close(self) -> None: ...

    with capture_logs() as logs:
        async with link_rig() as rig:
            rig.link._channel.report_load = Stream  # type: ignore[method-assign, assignment]
            rig.scheduler.end_after = len(rig.scheduler.received) or 1
            await eventually(lambda: any(entry.get("reason") == "UNREACHABLE" for entry in logs))
    reasons = [entry["reason"] for entry in logs if entry["event"] == "scheduler.not_connected"]
    assert reasons == ["ADDRESS_REFUSED", "UNREACHABLE"]


async def test_bug_in_a_report_does_not_end_the_reports() -> None:
    async with link_rig() as rig:
        await rig.scheduler.until_received(lambda message: True)
        real, failed = rig.link._observer.node, asyncio.Event()

        def broken() -> object:
            failed.set()
            rig.link._observer.node = real  # type: ignore[method-assign]
            raise KeyError("a GPU nobody knows")

        rig.link._observer.node = broken  # type: ignore[assignment, method-assign]
        actor = await rig.world.running()
        await asyncio.wait_for(failed.wait(), 5)
        await rig.scheduler.until_received(shows(actor.uid, Instance.STATE_RUNNING))


async def test_windows_are_uploaded_until_acknowledged() -> None:
    async with link_rig(acknowledge=0) as rig:
        actor = await rig.world.frozen()
        rig.world.clock.advance(SECOND_NS)
        rig.world.billing.changed(actor.uid, InstanceState.FROZEN)
        await rig.world.billing.flush()
        await eventually(lambda: bool(rig.scheduler.uploads) and rig.scheduler.uploads[-1][0][1] > 0)
        rig.scheduler.acknowledge = 1 << 30
        sealed = {(w.instance_uid, w.seq) for w in await rig.world.store.read_windows() if w.sealed}
        await eventually(lambda: rig.world.store._acknowledged >= sealed)
        assert await rig.link.usage.upload_once() is False, "nothing is sent twice"


async def test_windows_carry_the_credentials_name() -> None:
    """node_name is for people; a node with another host name must not lose its bill."""
    async with link_rig() as rig:
        await rig.scheduler.until_received(lambda message: message.snapshot)
        await eventually(lambda: rig.link.connected)
        await rig.world.store.upsert_windows([window("i-new", 0)])
        await eventually(lambda: ("i-new", 0) in rig.world.store._acknowledged)
        assert rig.scheduler.nodes == {"n1"}


async def test_old_windows_wait_for_the_credentials_name() -> None:
    """A restarted agent has windows before it knows its name; under its own name they would be rejected for good."""
    async with link_rig(refuse_uploads=True) as rig:
        await rig.world.store.upsert_windows([window("i-before", 0)])
        rig.scheduler.refuse_uploads = False
        observer = observer_of(rig.world)
        observer.identity = replace(observer.identity, name="a-host-name")
        before_it_connects = SchedulerLink(rig.link._channel, observer, rig.world.node.actors, rig.world.store, 0.01)
        await before_it_connects.usage.upload_once()
        await eventually(lambda: ("i-before", 0) in rig.world.store._acknowledged)
        assert rig.scheduler.nodes == {"n1"}


async def test_rejected_windows_do_not_block_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a node was renamed its old windows come first, and there are more of them than one upload takes."""
    monkeypatch.setattr(usage_upload, "UPLOAD_BATCH", 2)
    old = [window("i-a-old", seq) for seq in range(5)]
    async with link_rig(refuses="i-a-old") as rig:
        await rig.world.store.upsert_windows([*old, window("i-new", 0)])
        await eventually(lambda: ("i-new", 0) in rig.world.store._acknowledged)
        assert await rig.world.store.unacknowledged(10) == []
        sent = [key for batch in rig.scheduler.uploads for key in batch]
        assert len(sent) == len(set(sent)), "none is offered twice"
        kept = await rig.world.store.read_windows("i-a-old")
        assert len(kept) == 5, "they stay in the node's own ledger"


async def test_a_window_that_does_not_fit_the_wire_does_not_block_others() -> None:
    """As a damaged ledger may hold: it stays there, is not marked as acknowledged, and the others go."""
    async with link_rig() as rig:
        await rig.world.store.upsert_windows(
            [window("i-bad", 0), replace(window("i-bad", 1), gpu_count=1 << 40), window("i-bad", 2)]
        )
        await eventually(lambda: rig.world.store._acknowledged >= {("i-bad", 0), ("i-bad", 2)})
        assert ("i-bad", 1) not in rig.world.store._acknowledged
        assert len(await rig.world.store.read_windows("i-bad")) == 3


async def test_failed_upload_is_retried_without_loss() -> None:
    async with link_rig(refuse_uploads=True) as rig:
        actor = await rig.world.running()
        rig.world.clock.advance(SECOND_NS)
        rig.world.billing.changed(actor.uid, InstanceState.RUNNING)
        await rig.world.billing.flush()
        before = await rig.world.store.unacknowledged(10)
        assert before
        rig.scheduler.refuse_uploads = False
        keys = {(w.instance_uid, w.seq) for w in before}
        await eventually(lambda: rig.world.store._acknowledged >= keys)
        assert {key for batch in rig.scheduler.uploads for key in batch} >= keys
        await until(actor, InstanceState.RUNNING)


def test_report_intervals_are_those_of_the_design() -> None:
    assert (scheduler_link.COALESCE_S, scheduler_link.HEARTBEAT_S) == (0.005, 1.0)


async def test_heartbeat_has_gauges_of_awake_instances() -> None:
    async with link_rig() as rig:
        frozen = await rig.world.frozen()
        awake = await rig.world.running()
        both = {frozen.uid, awake.uid}
        message = await rig.scheduler.until_received(
            lambda m: m.load.state and {one.uid for one in m.load.instances} == {awake.uid}
        )
        assert both.isdisjoint(one.uid for one in rig.scheduler.received[0].load.instances)
        assert message.load.instances[0].vram_limit_bytes == 1 << 30
