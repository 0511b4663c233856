"""The nodes and instances that `tests.fakes.daemon` tells of, and its scheduler's view of them."""

# ruff: noqa: N802 - the names of servicers' methods come from the protos

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from agent.api import paging
from agent.core.errors import NotFoundError
from agent.v1 import scheduler_service_pb2 as sched
from agent.v1 import scheduler_service_pb2_grpc as sched_grpc
from agent.v1 import types_pb2
from agent.wire.convert_enums import scheduling_from_proto

PAGE = 2
GIB = 1 << 30
CREATED = Timestamp(seconds=1_767_225_600, nanos=5_000_000)  # 2026-01-01 UTC

State = types_pb2.Instance
LEVEL = types_pb2.Event
Item = TypeVar("Item")


class Paged(Protocol):
    """What every request for a list has."""

    page_size: int
    page_token: str


def page(items: Sequence[Item], request: Paged) -> tuple[Sequence[Item], str]:
    """At most two items, and where to go on."""
    return paging.page(items, min(request.page_size or PAGE, PAGE), request.page_token)


def instance(uid: str, function: str, state: types_pb2.Instance.State.ValueType, **more: Any) -> types_pb2.Instance:
    spec = types_pb2.FunctionSpec(name=function, image="host", entrypoint=["serve"], environment={"KEY": "***"})
    return types_pb2.Instance(
        uid=uid,
        node="gpu-host-1",
        function=function,
        revision="1",
        state=state,
        spec=spec,
        healthy=True,
        create_time=CREATED,
        state_time=CREATED,
        **{"request_id": f"{function}/1/0/1", **more},
    )


WAKE = types_pb2.Instance.WakeTiming(total_ns=850_000_000, driver_ns=800_000_000)
INSTANCES = [
    instance("i-run", "ocr", State.STATE_RUNNING, in_flight=1, waiting=2, vram_bytes=5 * GIB, gpu_uuids=["GPU-aaaa"]),
    instance("i-cold", "ocr", State.STATE_FROZEN, frozen_bytes=5 * GIB, wake_count=7, last_wake=WAKE),
    instance("i-chat", "chat", State.STATE_RUNNING, state_reason="HOST_MEMORY_SHORT"),
]
for age, one in enumerate(INSTANCES):  # lists are in this order
    one.create_time.seconds += age
ENDED = [instance("i-dead", "ocr", State.STATE_FAILED, state_reason="INSTANCE_CRASHED", state_message="exit code 3")]


NODE = types_pb2.Node(
    name="gpu-host-1",
    agent_version="0.1.0",
    driver_version="580.65.06",
    cuda_version="13.0",
    state=types_pb2.Node.STATE_READY,
    gpus=[
        types_pb2.Gpu(
            uuid="GPU-aaaa",
            model="Emulated T4",
            memory_total_bytes=16 * GIB,
            memory_used_bytes=0,
            sm_percent=37,
            power_milliwatts=61_500,
            holder_uids=["i-run"],
        ),
        types_pb2.Gpu(
            index=1,
            uuid="GPU-bbbb",
            model="Emulated T4",
            health=types_pb2.Gpu.HEALTH_CORDONED,
            cordoned_reason="XID_79: the GPU has fallen off the bus",
        ),
    ],
    host_memory=types_pb2.HostMemory(total_bytes=64 * GIB, available_bytes=40 * GIB, reserved_bytes=5 * GIB),
    capabilities=[
        types_pb2.Capability(name="driver", level=types_pb2.Capability.LEVEL_OK, reason="driver 580.65.06, 2 GPUs"),
        types_pb2.Capability(
            name="mig", level=types_pb2.Capability.LEVEL_FAIL, reason="GPU 1 is in MIG mode", fix="nvidia-smi -mig 0"
        ),
    ],
    runtimes=["process"],
    instances_per_gpu=2,
    instance_count=3,
    start_time=CREATED,
)


class Fleet(sched_grpc.SchedulerServiceServicer):
    """`gpu-host-2` is lost. Of `gpu-host-1` one instance goes with every look after a drain; but for that of `cramped`,
    which has no room elsewhere, and one made by hand. A drain of `gpu-host-3` is taken back at once."""

    def __init__(self) -> None:
        self._scheduling: dict[str, types_pb2.Node.Scheduling.ValueType] = {}
        self._gone = 0
        self._events: list[types_pb2.Event] = []
        self.event("fleet.node_lost", LEVEL.LEVEL_WARNING, node="gpu-host-2", silent_ms="10000")
        self.event("fleet.node_registered", node=NODE.name, epoch="1", ingress="127.0.0.1:1", gpus="2")
        self.event("fleet.node_heard", node=NODE.name, standing="READY")

    async def ListNodes(self, request: sched.ListNodesRequest, context: Any) -> sched.ListNodesResponse:
        names = ["gpu-host-1", "gpu-host-2", *(["gpu-host-3"] if "gpu-host-3" in self._scheduling else [])]
        items, token = page(names, request)
        if not token:
            self._scheduling.pop("gpu-host-3", None)
        return sched.ListNodesResponse(nodes=map(self._node, items), next_page_token=token)

    async def SetNodeScheduling(
        self, request: sched.SetNodeSchedulingRequest, context: Any
    ) -> sched.SetNodeSchedulingResponse:
        scheduling_from_proto(request.scheduling)
        if request.name not in ("gpu-host-1", "gpu-host-2", "gpu-host-3"):
            raise NotFoundError("NODE_NOT_FOUND", f"no node {request.name!r} has ever registered here")
        self._scheduling[request.name], self._gone = request.scheduling, 0
        self.event("node.scheduling", node=request.name, scheduling=scheduling_from_proto(request.scheduling).value)
        return sched.SetNodeSchedulingResponse(node=self._node(request.name))

    def _node(self, name: str) -> types_pb2.Node:
        found = types_pb2.Node()
        if name == NODE.name:
            found.CopyFrom(NODE)
        else:
            found.name, found.state = name, types_pb2.Node.STATE_LOST
            found.report_time.CopyFrom(CREATED)
        found.scheduling = self._scheduling.get(name, types_pb2.Node.SCHEDULING_NORMAL)
        return found

    async def ListFleetInstances(
        self, request: sched.ListFleetInstancesRequest, context: Any
    ) -> sched.ListFleetInstancesResponse:
        here = self._left() if request.node in ("", NODE.name) else []
        found = [one for one in here if request.function in ("", one.function)]
        items, token = page(found, request)
        if not token:
            self._gone += 1
        return sched.ListFleetInstancesResponse(instances=items, next_page_token=token)

    async def ListFleetEvents(
        self, request: sched.ListFleetEventsRequest, context: Any
    ) -> sched.ListFleetEventsResponse:
        since = request.since.ToNanoseconds() if request.HasField("since") else 0
        found = [
            one
            for one in self._events
            if request.function in ("", one.attributes.get("function"))
            and request.node in ("", one.attributes.get("node"))
            and one.time.ToNanoseconds() >= since
        ]
        items, token = page(found, request)
        return sched.ListFleetEventsResponse(events=items, next_page_token=token)

    def event(
        self, name: str, level: types_pb2.Event.Level.ValueType = LEVEL.LEVEL_INFO, message: str = "", **attributes: str
    ) -> None:
        self._events.append(
            types_pb2.Event(
                time=CREATED,
                first_time=CREATED,
                name=name,
                message=message,
                attributes=attributes,
                level=level,
                count=1,
            )
        )

    def _left(self) -> list[types_pb2.Instance]:
        asked = self._scheduling.get(NODE.name, types_pb2.Node.SCHEDULING_NORMAL)
        if asked == types_pb2.Node.SCHEDULING_DRAINED:
            return [*DRAINING[min(self._gone, 2) :], BY_HAND]
        if asked == types_pb2.Node.SCHEDULING_EMPTIED:
            return [*DRAINING[self._gone :], BY_HAND]
        return INSTANCES


DRAINING = [
    instance("i-one", "movable", State.STATE_STOPPING, request_id="movable/1/0/1"),
    instance("i-two", "movable", State.STATE_RUNNING, request_id="movable/1/1/1"),
    instance("i-cramped", "cramped", State.STATE_RUNNING, request_id="cramped/1/0/1"),
]
BY_HAND = instance("i-hand", "movable", State.STATE_RUNNING, request_id="made by hand")
