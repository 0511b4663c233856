"""The agent's API as `tests.fakes.daemon` serves it: what an instance is called says how it behaves.

`tests/contract/test_agent_api.py` holds it to what a real agent does.
"""

# ruff: noqa: N802 - the names of servicers' methods come from the protos

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from google.protobuf.message import Message

from agent.core.errors import ConflictError, InstanceError, InvalidArgumentError, NotFoundError, PreconditionError
from agent.core.function_rules import check_function
from agent.host.instance.waking import MAX_HOLD_NS
from agent.v1 import instance_service_pb2 as inst
from agent.v1 import instance_service_pb2_grpc as inst_grpc
from agent.v1 import node_service_pb2 as node
from agent.v1 import node_service_pb2_grpc as node_grpc
from agent.v1 import types_pb2
from agent.wire.convert_function import function_from_proto, function_to_proto
from tests.fakes.exec_story import exec_story
from tests.fakes.fleet_story import CREATED, ENDED, GIB, INSTANCES, NODE, State, instance, page

LOG = b"Loading model\n\xff not UTF-8\n"
MORE_LOG = b"and more\n"
Copied = TypeVar("Copied", bound=Message)
_ENDED = (State.STATE_STOPPED, State.STATE_FAILED)


class Instances(inst_grpc.InstanceServiceServicer):
    """i-run is busy, i-stuck never wakes, i-evil says things that steer terminals; a function called `broken` does not
    start. What was made here prints its environment."""

    def __init__(self) -> None:
        self._living = {one.uid: _copy(one) for one in INSTANCES}
        self._ended = {one.uid: _copy(one) for one in ENDED}
        evil = instance("i-evil", "evil", State.STATE_RUNNING, state_message="\x1b]0;owned\x07\x1b[2J")
        self._hidden = {one.uid: one for one in (evil, instance("i-stuck", "ocr", State.STATE_FROZEN))}
        self._made: dict[str, tuple[str, types_pb2.FunctionSpec]] = {}
        self._events: list[types_pb2.Event] = []
        for name in ("instance.created", "instance.running", "instance.frozen"):
            self._event("i-cold", name, driver_ns="12")

    async def ListInstances(self, request: inst.ListInstancesRequest, context: Any) -> inst.ListInstancesResponse:
        known = [*self._living.values(), *(self._ended.values() if request.include_ended else ())]
        found = [one for one in known if request.function in ("", one.function)]
        items, token = page(found, request)
        return inst.ListInstancesResponse(instances=items, next_page_token=token)

    async def GetInstance(self, request: inst.GetInstanceRequest, context: Any) -> inst.GetInstanceResponse:
        return inst.GetInstanceResponse(instance=self._find(request.uid))

    async def FreezeInstance(self, request: inst.FreezeInstanceRequest, context: Any) -> inst.FreezeInstanceResponse:
        found = self._find(request.uid)
        if found.in_flight:
            raise PreconditionError("NOT_IDLE", f"instance {found.uid} was not frozen: it is in use")
        _raise_if_failed(found)
        found.state = State.STATE_FROZEN
        return inst.FreezeInstanceResponse(instance=found)

    async def WakeInstance(self, request: inst.WakeInstanceRequest, context: Any) -> inst.WakeInstanceResponse:
        found = self._find(request.uid)
        if not (0 <= request.hold_ns <= MAX_HOLD_NS and request.timeout_ns >= 0):
            raise InvalidArgumentError("HOLD_INVALID", "hold must be between 0 and 600 s, timeout not negative")
        _raise_if_failed(found)
        if found.uid == "i-stuck":
            await asyncio.Event().wait()
        found.state = State.STATE_RUNNING
        free = max(0, max(1, found.spec.instance_concurrency) - found.in_flight - found.waiting)
        return inst.WakeInstanceResponse(instance=found, free_slots=free)

    async def StopInstance(self, request: inst.StopInstanceRequest, context: Any) -> inst.StopInstanceResponse:
        found = self._find(request.uid)
        if request.grace_ns < 0:
            raise InvalidArgumentError("GRACE_INVALID", "grace must be between 0 (the default) and a day")
        if found.state not in _ENDED:
            found.state = State.STATE_STOPPED
            self._ended[found.uid] = self._living.pop(found.uid)
        return inst.StopInstanceResponse(instance=found)

    async def CreateInstance(self, request: inst.CreateInstanceRequest, context: Any) -> inst.CreateInstanceResponse:
        if not 0 < len(request.request_id) <= 200:
            raise InvalidArgumentError("REQUEST_ID_INVALID", "request_id must have 1 to 200 characters")
        function = function_from_proto(request.spec)
        check_function(function)
        uid, spec = self._made.get(request.request_id, ("", request.spec))
        if spec != request.spec:
            raise ConflictError("REQUEST_ID_REUSED", f"request id {request.request_id!r} made instance {uid}")
        if not uid:
            uid = f"i-new{len(self._made) or ''}"
            self._made[request.request_id] = uid, _copy(request.spec)
            made = instance(uid, function.name, State.STATE_STARTING)
            made.spec.CopyFrom(function_to_proto(function))
            made.request_id = request.request_id
            self._living[uid] = made
            self._event(uid, "instance.created")
        found = self._find(uid)
        answer = inst.CreateInstanceResponse(instance=found)
        if found.state == State.STATE_STARTING:  # it is through by the next call
            self._start(found)
        if request.wait:
            _raise_if_failed(found)
            answer.instance.CopyFrom(found)
        return answer

    def _start(self, made: types_pb2.Instance) -> None:
        made.state = State.STATE_RUNNING
        if made.function == "broken":
            made.state, made.state_reason = State.STATE_FAILED, "FUNCTION_NOT_STARTED"
            made.state_message = "port 9000 never answered"
            self._ended[made.uid] = self._living.pop(made.uid)

    async def GetInstanceLogs(
        self, request: inst.GetInstanceLogsRequest, context: Any
    ) -> AsyncIterator[inst.GetInstanceLogsResponse]:
        found = self._find(request.uid)
        log = next((_printed(spec) for uid, spec in self._made.values() if uid == found.uid), LOG)
        shown = log[-request.tail_bytes :] if request.tail_bytes > 0 else log
        if request.HasField("tail_lines"):
            shown = b"".join(shown.splitlines(keepends=True)[-request.tail_lines :]) if request.tail_lines else b""
        if shown:
            yield inst.GetInstanceLogsResponse(data=shown)
        if request.follow and found.state not in _ENDED:
            yield inst.GetInstanceLogsResponse(data=MORE_LOG)
            await asyncio.Event().wait()

    async def ExecInstance(
        self, request_iterator: AsyncIterator[inst.ExecInstanceRequest], context: Any
    ) -> AsyncIterator[inst.ExecInstanceResponse]:
        async for answer in exec_story(request_iterator, self._enter):
            yield answer

    def _enter(self, start: inst.ExecInstanceRequest.Start) -> None:
        """As the agent lets a command into an instance. Raises where it does not."""
        found = self._find(start.uid)
        if found.state in _ENDED:
            raise PreconditionError("NOT_RUNNING", f"instance {found.uid} has ended; nothing can be run inside")
        if found.state == State.STATE_FROZEN and not start.wake:
            text = f"instance {found.uid} is frozen (FROZEN); add --wake to wake it first, which may take a GPU"
            raise PreconditionError("INSTANCE_FROZEN", text)
        found.state = State.STATE_RUNNING
        self._event(found.uid, "instance.exec", program=start.command[0])

    async def ListEvents(self, request: inst.ListEventsRequest, context: Any) -> inst.ListEventsResponse:
        uid = self._find(request.instance_uid).uid if request.instance_uid else ""
        since = request.since.ToNanoseconds() if request.HasField("since") else 0
        found = [
            event for event in self._events if uid in ("", event.instance_uid) and event.time.ToNanoseconds() >= since
        ]
        items, token = page(found, request)
        return inst.ListEventsResponse(events=items, next_page_token=token)

    def _event(self, uid: str, name: str, **attributes: str) -> None:
        event = types_pb2.Event(time=CREATED, first_time=CREATED, instance_uid=uid, name=name, attributes=attributes)
        event.level, event.count = types_pb2.Event.LEVEL_INFO, 1
        self._events.append(event)

    def _find(self, uid: str) -> types_pb2.Instance:
        known: dict[str, types_pb2.Instance] = {**self._hidden, **self._ended, **self._living}
        matches = [key for key in known if uid and key.startswith(uid)]
        if uid not in known and len(matches) != 1:
            many = f"{len(matches)} instances begin with" if matches else "no instance is called"
            raise NotFoundError("INSTANCE_NOT_FOUND", f"{many} {uid!r} on this node; `hibernode ps` lists them")
        return known[uid if uid in known else matches[0]]


def _copy(message: Copied) -> Copied:
    made = type(message)()
    made.CopyFrom(message)
    return made


def _printed(spec: types_pb2.FunctionSpec) -> bytes:
    return "".join(f"{key}={value}\n" for key, value in sorted(spec.environment.items())).encode()


def _raise_if_failed(found: types_pb2.Instance) -> None:
    if found.state == State.STATE_FAILED:
        raise InstanceError(found.state_reason, found.state_message)


WINDOWS = [
    types_pb2.UsageWindow(
        instance_uid="i-cold",
        seq=seq,
        function="ocr",
        state=State.STATE_RUNNING,
        gpu_count=1,
        gpu_memory_bytes=8 * GIB,
        start_mono_ns=seq * 60_000_000_000,
        end_mono_ns=(seq + 1) * 60_000_000_000,
        active_ns=20_000_000_000,
        idle_ns=40_000_000_000,
        invocations=4,
        sealed=seq < 2,
    )
    for seq in range(3)
]


class Nodes(node_grpc.NodeServiceServicer):
    async def GetNode(self, request: node.GetNodeRequest, context: Any) -> node.GetNodeResponse:
        return node.GetNodeResponse(node=NODE)

    async def ListUsageWindows(
        self, request: node.ListUsageWindowsRequest, context: Any
    ) -> node.ListUsageWindowsResponse:
        found = [
            one
            for one in WINDOWS
            if request.instance_uid in ("", one.instance_uid)
            and request.function in ("", one.function)
            and (one.sealed or request.include_open)
        ]
        items, token = page(found, request)
        return node.ListUsageWindowsResponse(windows=items, next_page_token=token)
