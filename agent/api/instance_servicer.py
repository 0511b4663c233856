"""InstanceService of the agent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

from agent.api.instance_exec import exec_instance
from agent.api.instance_logs import InstanceLogs
from agent.api.paging import page, page_bounds, page_of_events
from agent.core.errors import InstanceError, InvalidArgumentError, PreconditionError
from agent.core.function_rules import check_function
from agent.core.lifecycle.events import FreezeAsked, StopAsked
from agent.core.types import SECOND_NS, InstanceState, StopCause
from agent.event_log import EventLog
from agent.host.instance.actor import Actor
from agent.host.instance.waking import raise_if_failed, wake_up
from agent.host.node.exec_sessions import ExecSessions
from agent.host.node.node import Node
from agent.host.node.observer import Observer
from agent.host.node.pauses import paused_by_others
from agent.ports import Clock
from agent.v1 import instance_service_pb2 as pb
from agent.v1 import instance_service_pb2_grpc, types_pb2
from agent.wire.convert_enums import stop_cause_from_proto
from agent.wire.convert_event import event_to_proto
from agent.wire.convert_function import function_from_proto
from agent.wire.convert_snapshot import instance_to_proto
from agent.wire.convert_time import time_from_proto
from agent.wire.tokens import caller

DEFAULT_WAKE_TIMEOUT_NS = 60 * SECOND_NS
MAX_WAIT_S = 600.0
DEFAULT_GRACE_NS = 30 * SECOND_NS
MAX_GRACE_NS = 86_400 * SECOND_NS
_STOPPED = {
    StopCause.ASKED: "stopped through the API",
    StopCause.REPLACED: "an instance of a newer revision took its place",
    StopCause.SCALED_IN: "its function had more instances than its target",
    StopCause.FUNCTION_DELETED: "its function was deleted",
    StopCause.NODE_DRAINED: "its node is drained",
}


class InstanceServicer(instance_service_pb2_grpc.InstanceServiceServicer):
    """Delegates to the node; `wire.interceptors` turns errors into statuses."""

    def __init__(
        self,
        node: Node,
        observer: Observer,
        events: EventLog,
        clock: Clock,
        *,
        logs: InstanceLogs,
        execs: ExecSessions,
        queue_timeout_ns: int = DEFAULT_WAKE_TIMEOUT_NS,
    ) -> None:
        """`queue_timeout_ns`: for functions without one of their own."""
        self._node = node
        self._observer = observer
        self._events = events
        self._logs = logs
        self._execs = execs
        self._clock = clock
        self._queue_timeout_ns = queue_timeout_ns

    async def CreateInstance(self, request: pb.CreateInstanceRequest, context: object) -> pb.CreateInstanceResponse:
        """Creates an instance; with `wait`, returns once it runs, or raises why it does not."""
        self._require_ready()
        if not request.request_id or len(request.request_id) > 200:
            raise InvalidArgumentError("REQUEST_ID_INVALID", "request_id must have 1 to 200 characters")
        if not request.spec.HasField("queue_timeout_ns"):
            request.spec.queue_timeout_ns = self._queue_timeout_ns
        function = function_from_proto(request.spec)
        check_function(function)
        actor = await self._node.create(request.request_id, function)
        if request.wait:
            await actor.wait_until(lambda i: i.state is not InstanceState.STARTING, MAX_WAIT_S, "START")
            raise_if_failed(actor)
        return pb.CreateInstanceResponse(instance=self._show(actor))

    async def GetInstance(self, request: pb.GetInstanceRequest, context: object) -> pb.GetInstanceResponse:
        """One instance, even one that ended recently."""
        return pb.GetInstanceResponse(instance=self._show(self._node.get(request.uid)))

    async def ListInstances(self, request: pb.ListInstancesRequest, context: object) -> pb.ListInstancesResponse:
        """Instances of this node, oldest first."""
        found = [
            snapshot
            for snapshot in self._observer.instances(include_ended=request.include_ended)
            if request.function in ("", snapshot.function.name)
        ]
        shown, token = page(found, request.page_size, request.page_token)
        name = self._observer.identity.name
        return pb.ListInstancesResponse(
            instances=[instance_to_proto(snapshot, name) for snapshot in shown], next_page_token=token
        )

    async def FreezeInstance(self, request: pb.FreezeInstanceRequest, context: object) -> pb.FreezeInstanceResponse:
        """Freezes an idle instance now; returns once it is frozen, or raises why it is not."""
        self._require_ready()
        actor = self._node.get(request.uid)
        actor.handle(FreezeAsked())
        began = actor.instance
        if began.state is InstanceState.RUNNING:
            if began.paused:
                raise paused_by_others(actor.uid)
            inside = "a command runs inside (`hibernode exec`)" if began.exec_active else "idle mode is off for it"
            why = "it is in use" if began.busy else inside
            raise PreconditionError("NOT_IDLE", f"instance {actor.uid} was not frozen: {why}")
        await actor.wait_until(lambda i: i.state is not InstanceState.FREEZING, MAX_WAIT_S, "FREEZE")
        raise_if_failed(actor)
        now = actor.instance
        if now.state is InstanceState.STARTING:
            raise PreconditionError("NOT_RUNNING", f"instance {actor.uid} is still starting")
        if now.state is not InstanceState.FROZEN:
            refused = now.state is InstanceState.RUNNING and now.refusals > began.refusals
            why = f"the freeze was refused ({now.refusal})" if refused else f"it is {now.state.value}, not frozen"
            raise PreconditionError("FREEZE_REFUSED", f"{why}; `hibernode events {actor.uid}` says more")
        return pb.FreezeInstanceResponse(instance=self._show(actor))

    async def WakeInstance(self, request: pb.WakeInstanceRequest, context: object) -> pb.WakeInstanceResponse:
        """Wakes the instance, which then stays awake for `hold_ns` or until its first request."""
        self._require_ready()
        actor = self._node.get(request.uid)
        timeout_ns = request.timeout_ns or DEFAULT_WAKE_TIMEOUT_NS
        free = await wake_up(actor, self._clock.monotonic_ns(), request.hold_ns, timeout_ns)
        return pb.WakeInstanceResponse(instance=self._show(actor), free_slots=free)

    async def StopInstance(self, request: pb.StopInstanceRequest, context: object) -> pb.StopInstanceResponse:
        """Drains, calls /pre-stop, sends TERM, then KILL; returns once the instance has ended. A frozen one is killed
        without a wake."""
        self._require_ready()
        actor = self._node.get(request.uid)
        grace_ns = request.grace_ns or DEFAULT_GRACE_NS
        if not 0 < grace_ns <= MAX_GRACE_NS:
            raise InvalidArgumentError("GRACE_INVALID", "grace must be between 0 (the default) and a day")
        cause = stop_cause_from_proto(request.cause)
        actor.handle(StopAsked(grace_ns, request.force, cause.value, _STOPPED[cause]))
        try:
            async with asyncio.timeout(MAX_WAIT_S):
                await actor.ended.wait()
        except TimeoutError:
            raise InstanceError("STOP_TIMEOUT", f"{actor.uid} did not end; `rm --force` kills it") from None
        return pb.StopInstanceResponse(instance=self._show(actor))

    async def GetInstanceLogs(
        self, request: pb.GetInstanceLogsRequest, context: object
    ) -> AsyncIterator[pb.GetInstanceLogsResponse]:
        """The end of the instance's standard output and error; with `follow` also further output until it has ended."""
        actor = self._node.get(request.uid)
        read = self._logs.follow if request.follow else self._logs.read
        lines = request.tail_lines if request.HasField("tail_lines") else None
        async with aclosing(read(actor, request.tail_bytes, lines)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def ExecInstance(
        self, request_iterator: AsyncIterator[pb.ExecInstanceRequest], context: object
    ) -> AsyncIterator[pb.ExecInstanceResponse]:
        """Runs a command inside an awake instance, which stays awake until the command has ended."""
        self._require_ready()
        async with aclosing(exec_instance(self._execs, request_iterator, caller().name)) as answers:
            async for answer in answers:
                yield answer

    async def ListEvents(self, request: pb.ListEventsRequest, context: object) -> pb.ListEventsResponse:
        """Events, oldest first."""
        uid = self._node.get(request.instance_uid).uid if request.instance_uid else ""
        since = time_from_proto(request.since) if request.HasField("since") else 0
        after, size = page_bounds(request.page_size, request.page_token)
        found = self._events.read(after=after, instance_uid=uid, since_wall_ns=since)
        shown, token = page_of_events(found, size)
        return pb.ListEventsResponse(events=map(event_to_proto, shown), next_page_token=token)

    def _show(self, actor: Actor) -> types_pb2.Instance:
        return instance_to_proto(self._observer.instance(actor), self._observer.identity.name)

    def _require_ready(self) -> None:
        if not self._observer.ready:
            raise PreconditionError("NODE_RECOVERING", "this node is recovering its instances; try again in a moment")
