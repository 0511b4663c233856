"""InstanceService on a node of fakes, called without the wire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from agent.api.instance_logs import InstanceLogs
from agent.api.instance_servicer import InstanceServicer
from agent.core.errors import HibernodeError, InstanceError, InvalidArgumentError, NotFoundError, PreconditionError
from agent.core.types import SECOND_NS, InstanceState, StopCause
from agent.host.node.exec_sessions import ExecSessions
from agent.host.node.observer import NodeIdentity, Observer
from agent.v1 import instance_service_pb2 as pb
from agent.v1 import types_pb2
from agent.v1.types_pb2 import FunctionSpec, Instance
from agent.wire.convert_enums import stop_cause_to_proto
from agent.wire.convert_function import function_to_proto
from tests.host.rig import OCR, PATIENCE_S, NodeRig, enter, eventually, node_rig, until

S = InstanceState


def observer_of(world: NodeRig) -> Observer:
    identity = NodeIdentity("n1", "boot", "0.1", 1, None, (), ("process",), 1, 0, 64 << 30)
    observer = Observer(world.node, identity, world.clock, totals=world.billing.totals)
    observer.ready = True
    return observer


@dataclass
class Api:
    """The servicer, and the fake node behind it."""

    world: NodeRig
    observer: Observer
    servicer: InstanceServicer

    async def create(self, request_id: str = "fn/1/0/0", *, wait: bool = True) -> Instance:
        request = pb.CreateInstanceRequest(request_id=request_id, spec=spec(), wait=wait)
        return (await asyncio.wait_for(self.servicer.CreateInstance(request, None), PATIENCE_S)).instance


def spec() -> FunctionSpec:
    return function_to_proto(OCR)


@asynccontextmanager
async def an_api(**knobs: object) -> AsyncIterator[Api]:
    async with node_rig(**knobs) as world:
        observer = observer_of(world)
        servicer = InstanceServicer(
            world.node,
            observer,
            world.events,
            world.clock,
            logs=InstanceLogs(world.runtime),
            execs=ExecSessions(world.node, world.runtime, world.events, world.clock),
            queue_timeout_ns=7 * SECOND_NS,
        )
        yield Api(world, observer, servicer)


async def refusal(call: object) -> str:
    with pytest.raises(HibernodeError) as caught:
        await asyncio.wait_for(call, PATIENCE_S)  # type: ignore[arg-type]
    return caught.value.reason


async def test_create_waits_until_it_runs_and_shows_it() -> None:
    async with an_api() as api:
        shown = await api.create()
        assert shown.state == Instance.STATE_RUNNING
        assert shown.gpu_uuids == [api.world.gpus.gpus[0].uuid]
        assert (await api.create()).uid == shown.uid


async def test_create_reports_why_the_instance_does_not_run() -> None:
    async with an_api(ready_timeout_s=0.02) as api:
        api.world.runtime.port_of = lambda _: 1
        with pytest.raises(InstanceError) as caught:
            await api.create()
        assert caught.value.reason == "FUNCTION_NOT_STARTED"


@pytest.mark.parametrize("request_id", ["", "x" * 201])
async def test_create_needs_a_request_id(request_id: str) -> None:
    async with an_api() as api:
        with pytest.raises(InvalidArgumentError, match="REQUEST_ID_INVALID"):
            await api.create(request_id)


async def test_create_refuses_an_invalid_function() -> None:
    async with an_api() as api:
        wrong = spec()
        wrong.port = 0
        with pytest.raises(InvalidArgumentError) as caught:
            await api.servicer.CreateInstance(pb.CreateInstanceRequest(request_id="a/1/0/0", spec=wrong), None)
        assert (caught.value.reason, caught.value.metadata["field"]) == ("SPEC_INVALID", "port")
        assert not api.world.node.actors


async def test_nodes_queue_timeout_is_the_default() -> None:
    async with an_api() as api:
        silent = spec()
        silent.ClearField("queue_timeout_ns")
        for request_id, asked in (("a/1/0/0", silent), ("b/1/0/0", spec())):
            await api.servicer.CreateInstance(pb.CreateInstanceRequest(request_id=request_id, spec=asked), None)
        timeouts = [actor.function.queue_timeout_ns for actor in api.world.node.actors.values()]
        assert timeouts == [7 * SECOND_NS, OCR.queue_timeout_ns]


async def test_nothing_is_changed_before_recovery_is_done() -> None:
    async with an_api() as api:
        api.observer.ready = False
        assert await refusal(api.create()) == "NODE_RECOVERING"


async def test_freeze_and_wake_by_hand() -> None:
    async with an_api() as api:
        uid = (await api.create()).uid
        frozen = (await api.servicer.FreezeInstance(pb.FreezeInstanceRequest(uid=uid), None)).instance
        assert (frozen.state, frozen.freeze_count) == (Instance.STATE_FROZEN, 1)
        woken = await api.servicer.WakeInstance(pb.WakeInstanceRequest(uid=uid, hold_ns=2 * SECOND_NS), None)
        assert (woken.instance.state, woken.free_slots) == (Instance.STATE_RUNNING, 1)
        api.world.clock.advance(2 * SECOND_NS)
        assert api.world.node.actors[uid].state is S.RUNNING, "freezeAfter is longer than the hold"


async def test_refused_freeze_says_why() -> None:
    async with an_api() as api:
        uid = (await api.create()).uid
        actor = api.world.node.actors[uid]
        await enter(actor)
        freeze = pb.FreezeInstanceRequest(uid=uid)
        assert await refusal(api.servicer.FreezeInstance(freeze, None)) == "NOT_IDLE"
        actor.gate.leave()
        api.world.memory.available = 0
        with pytest.raises(PreconditionError, match="HOST_MEMORY_SHORT"):
            await api.servicer.FreezeInstance(freeze, None)
        shown = (await api.servicer.GetInstance(pb.GetInstanceRequest(uid=uid), None)).instance
        assert shown.state_reason == "HOST_MEMORY_SHORT", "visible everywhere"


async def test_freeze_cancelled_by_a_request_fails() -> None:
    async with an_api() as api:
        uid = (await api.create()).uid
        api.world.freezer.hold("checkpoint")
        freezing = asyncio.create_task(api.servicer.FreezeInstance(pb.FreezeInstanceRequest(uid=uid), None))
        await api.world.freezer.entered("checkpoint")
        entering = asyncio.create_task(enter(api.world.node.actors[uid]))
        await asyncio.sleep(0)
        api.world.freezer.release("checkpoint")
        assert await refusal(freezing) == "FREEZE_REFUSED"
        await entering


async def test_slow_wake_times_out_and_is_forgotten() -> None:
    async with an_api() as api:
        uid = (await api.create()).uid
        await api.servicer.FreezeInstance(pb.FreezeInstanceRequest(uid=uid), None)
        api.world.freezer.hold("wake")
        wake = pb.WakeInstanceRequest(uid=uid, timeout_ns=10_000_000)
        assert await refusal(api.servicer.WakeInstance(wake, None)) == "WAKE_TIMEOUT"
        api.world.freezer.release("wake")


@pytest.mark.parametrize(("hold", "limit"), [(-1, 0), (0, -1), (601 * SECOND_NS, 0)])
async def test_wake_with_invalid_arguments_is_refused(hold: int, limit: int) -> None:
    async with an_api() as api:
        uid = (await api.create()).uid
        wake = pb.WakeInstanceRequest(uid=uid, hold_ns=hold, timeout_ns=limit)
        assert await refusal(api.servicer.WakeInstance(wake, None)) == "HOLD_INVALID"


async def test_stop_returns_at_the_end_and_the_instance_stays_visible() -> None:
    async with an_api() as api:
        uid = (await api.create()).uid
        stopped = (await api.servicer.StopInstance(pb.StopInstanceRequest(uid=uid), None)).instance
        assert (stopped.state, stopped.state_reason) == (Instance.STATE_STOPPED, "STOPPED_BY_USER")
        await eventually(lambda: uid in api.world.node.ended)
        assert (await api.servicer.GetInstance(pb.GetInstanceRequest(uid=uid), None)).instance.uid == uid
        listed = await api.servicer.ListInstances(pb.ListInstancesRequest(), None)
        assert list(listed.instances) == []
        listed = await api.servicer.ListInstances(pb.ListInstancesRequest(include_ended=True), None)
        assert [one.uid for one in listed.instances] == [uid]
        assert await refusal(
            api.servicer.StopInstance(pb.StopInstanceRequest(uid=uid, grace_ns=-1), None)
        ) == "GRACE_INVALID"  # fmt: skip


@pytest.mark.parametrize("cause", [one for one in StopCause if one is not StopCause.ASKED])
async def test_a_stopped_instance_says_what_it_was_stopped_for(cause: StopCause) -> None:
    async with an_api() as api:
        request = pb.StopInstanceRequest(uid=(await api.create()).uid, cause=stop_cause_to_proto(cause))
        stopped = (await api.servicer.StopInstance(request, None)).instance
        assert (stopped.state, stopped.state_reason) == (Instance.STATE_STOPPED, cause.value)
        assert stopped.state_message


async def test_an_unknown_or_ambiguous_uid_is_not_found() -> None:
    async with an_api() as api:
        await api.create("a/1/0/0")
        await api.create("b/1/0/0")
        for uid in ("", "i-", "nobody"):
            assert await refusal(api.servicer.GetInstance(pb.GetInstanceRequest(uid=uid), None)) == "INSTANCE_NOT_FOUND"


async def test_log_tail_comes_in_chunks() -> None:
    async with an_api() as api:
        uid = (await api.create()).uid
        api.world.runtime.print(uid, b"a" * 100 + b"b" * 70_000)
        request = pb.GetInstanceLogsRequest(uid=uid, tail_bytes=70_000)
        pieces = [piece.data async for piece in api.servicer.GetInstanceLogs(request, None)]
        assert [len(piece) for piece in pieces] == [65_536, 70_000 - 65_536]
        assert set(b"".join(pieces)) == set(b"b")


async def test_missing_log_is_not_found() -> None:
    async with an_api() as api:
        uid = (await api.create()).uid

        async def gone(handle: object, tail_bytes: int) -> bytes:
            raise FileNotFoundError(2, "No such file or directory")

        api.world.runtime.read_log = gone  # type: ignore[method-assign]
        with pytest.raises(NotFoundError, match="LOG_NOT_FOUND"):
            [piece async for piece in api.servicer.GetInstanceLogs(pb.GetInstanceLogsRequest(uid=uid), None)]


async def test_event_pages_skip_nothing_when_old_events_are_dropped() -> None:
    async with an_api() as api:
        for n in range(7):
            api.world.events.add("", f"story.{n}")
        names, token = [], ""
        while True:
            request = pb.ListEventsRequest(page_size=3, page_token=token)
            answer = await api.servicer.ListEvents(request, None)
            names += [event.name for event in answer.events]
            api.world.events._events.popitem(
                last=False
            )  # history is bounded: the oldest event is dropped between two pages
            token = answer.next_page_token
            if not token:
                break
        assert names == [f"story.{n}" for n in range(7)]


async def test_secrets_are_not_shown() -> None:
    async with an_api() as api:
        asked = spec()
        asked.environment["DB_PASSWORD"] = "hunter2"
        request = pb.CreateInstanceRequest(request_id="s/1/0/0", spec=asked, wait=True)
        answer = await api.servicer.CreateInstance(request, None)
        assert isinstance(answer.instance, types_pb2.Instance)
        assert "hunter2" not in str(answer)
        assert "hunter2" not in str(api.world.events.read())


async def test_idle_for_counts_from_the_last_request() -> None:
    async with an_api() as api:
        uid = (await api.create()).uid
        actor = api.world.node.actors[uid]
        await until(actor, S.RUNNING)
        api.world.clock.advance(5 * SECOND_NS)
        await enter(actor)
        assert api.observer.instance(actor).idle_for_ns == 0
        api.world.clock.advance(SECOND_NS)
        actor.gate.leave()
        api.world.clock.advance(3 * SECOND_NS)
        assert api.observer.instance(actor).idle_for_ns == 3 * SECOND_NS
