"""SchedulerService of the scheduler: the agents' load streams, the fleet as they report it, the scheduler's events."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

from agent.api.paging import page, page_bounds, page_of_events
from agent.core.dispatch.model import NodeStanding
from agent.core.errors import DeadlineError, ExhaustedError
from agent.core.natural_order import natural_key
from agent.core.provisioning.model import Scheduling
from agent.event_log import EventLog
from agent.scheduler.fleet.fleet import ENDED, Fleet, NodeRecord
from agent.scheduler.fleet.node_scheduling import NodeScheduling
from agent.v1 import scheduler_service_pb2 as pb
from agent.v1 import scheduler_service_pb2_grpc, types_pb2
from agent.wire.addresses import peer_host
from agent.wire.convert_enums import scheduling_from_proto, scheduling_to_proto
from agent.wire.convert_event import event_to_proto
from agent.wire.convert_load import instance_of_load
from agent.wire.convert_time import time_from_proto, time_to_proto
from agent.wire.interceptors import CallContext
from agent.wire.tokens import calling_node

MAX_STREAMS = 4
"""Per node: the current stream, and replaced ones that have not ended yet."""
_STATES = {
    NodeStanding.READY: types_pb2.Node.STATE_READY,
    NodeStanding.DRAINING: types_pb2.Node.STATE_DRAINING,
    NodeStanding.SUSPECT: types_pb2.Node.STATE_SUSPECT,
    NodeStanding.LOST: types_pb2.Node.STATE_LOST,
}


class SchedulerServicer(scheduler_service_pb2_grpc.SchedulerServiceServicer):
    """Delegates to the fleet; `wire.interceptors` turns errors into statuses."""

    def __init__(self, fleet: Fleet, scheduling: NodeScheduling, events: EventLog, silence_s: float = 10.0) -> None:
        """`silence_s`: a stream without a message for so long is ended; an agent sends one a second."""
        self._fleet = fleet
        self._scheduling = scheduling
        self._events = events
        self._silence_s = silence_s
        self._open: Counter[str] = Counter()

    async def ReportLoad(  # type: ignore[override]  # writes its answers itself, which the stubs do not allow
        self, request_iterator: AsyncIterator[pb.ReportLoadRequest], context: CallContext
    ) -> None:
        """Serves one node's load stream; any end of it makes the node suspect at once.

        Raises ExhaustedError TOO_MANY_STREAMS, DeadlineError STREAM_SILENT.
        """
        node = calling_node()
        if self._open[node] >= MAX_STREAMS:
            raise ExhaustedError("TOO_MANY_STREAMS", f"node {node} has {MAX_STREAMS} load streams already", node=node)
        self._open[node] += 1
        stream = self._fleet.stream_opened(node, peer_host(context.peer()))
        try:
            await self._receive_all(node, stream, request_iterator, context)
        except TimeoutError:
            text = f"no message for {self._silence_s:g} s; open the load stream again"
            raise DeadlineError("STREAM_SILENT", text) from None
        finally:
            self._open[node] -= 1
            self._fleet.stream_closed(node, stream)

    async def _receive_all(
        self, node: str, stream: int, messages: AsyncIterator[pb.ReportLoadRequest], context: CallContext
    ) -> None:
        """Passes messages to the fleet, thousands a second: one timer serves the stream, few messages are answered."""
        now = asyncio.get_running_loop().time
        async with asyncio.timeout(self._silence_s) as silence:
            async for message in messages:
                silence.reschedule(now() + self._silence_s)
                answer = self._fleet.receive(node, stream, message)
                if answer is not None:
                    await context.write(answer)

    async def ListNodes(self, request: pb.ListNodesRequest, context: object) -> pb.ListNodesResponse:
        """Nodes by name, as last reported."""
        shown, token = page(self._fleet.nodes(), request.page_size, request.page_token)
        return pb.ListNodesResponse(nodes=[self._show(node) for node in shown], next_page_token=token)

    async def SetNodeScheduling(
        self, request: pb.SetNodeSchedulingRequest, context: object
    ) -> pb.SetNodeSchedulingResponse:
        """Answers once the setting is stored and in effect, not once the node is drained."""
        await self._scheduling.put(request.name, scheduling_from_proto(request.scheduling))
        node = self._fleet.node(request.name)
        assert node is not None, "nodes are never forgotten"
        return pb.SetNodeSchedulingResponse(node=self._show(node))

    async def ListFleetInstances(
        self, request: pb.ListFleetInstancesRequest, context: object
    ) -> pb.ListFleetInstancesResponse:
        """Instances by node and age."""
        found = sorted(
            (
                (natural_key(node.name), load.create_time.seconds, load.create_time.nanos, load.uid, node, load)
                for node, load in self._fleet.instances()
                if request.function in ("", load.function) and request.node in ("", node.name)
            ),
            key=lambda entry: entry[:4],
        )
        shown, token = page(found, request.page_size, request.page_token)
        return pb.ListFleetInstancesResponse(
            instances=[_instance(node, load) for *_, node, load in shown], next_page_token=token
        )

    async def ListFleetEvents(self, request: pb.ListFleetEventsRequest, context: object) -> pb.ListFleetEventsResponse:
        """The scheduler's events, oldest first."""
        since = time_from_proto(request.since) if request.HasField("since") else 0
        after, size = page_bounds(request.page_size, request.page_token)
        found = self._events.read(after=after, since_wall_ns=since, function=request.function, node=request.node)
        shown, token = page_of_events(found, size)
        return pb.ListFleetEventsResponse(events=map(event_to_proto, shown), next_page_token=token)

    def _show(self, node: NodeRecord) -> types_pb2.Node:
        return node_of_record(node, self._fleet.scheduling(node.name))


def _instance(node: NodeRecord, load: pb.InstanceLoad) -> types_pb2.Instance:
    """The instance as last reported; UNKNOWN since that time if its node is lost."""
    shown = instance_of_load(load, node.name)
    if node.standing is NodeStanding.LOST and load.state not in ENDED:
        before = types_pb2.Instance.State.Name(load.state).removeprefix("STATE_")
        shown.state, shown.state_reason = types_pb2.Instance.STATE_UNKNOWN, "NODE_LOST"
        shown.state_message = f"it was {before} when {node.name} was last heard"
        shown.state_time.CopyFrom(time_to_proto(node.last_heard_wall_ns))
    return shown


def node_of_record(record: NodeRecord, scheduling: Scheduling) -> types_pb2.Node:
    """The node on the wire: its registration, its last heartbeat, and its standing with the scheduler."""
    registration, load = record.registration, record.load
    state = _STATES[record.standing]
    if record.standing is NodeStanding.DRAINING and record.recovering:
        state = types_pb2.Node.STATE_RECOVERING
    elif record.standing is NodeStanding.SUSPECT and not record.last_heard_wall_ns:
        state = types_pb2.Node.STATE_EXPECTED
    node = types_pb2.Node(
        name=record.name,
        boot_id=registration.boot_id,
        agent_version=registration.agent_version,
        epoch=record.epoch,
        driver_version=registration.driver_version,
        cuda_version=registration.cuda_version,
        gpus=record.gpus,
        host_memory=load.host_memory if load.HasField("host_memory") else registration.host_memory,
        capabilities=registration.capabilities,
        state=state,
        ingress_address=registration.ingress_address,
        grpc_address=registration.grpc_address,
        labels=registration.labels,
        instances_per_gpu=registration.instances_per_gpu,
        runtimes=registration.runtimes,
        scheduling=scheduling_to_proto(scheduling),
        instance_count=sum(one.state not in ENDED for one in record.instances.values()),
    )
    if registration.HasField("start_time"):
        node.start_time.CopyFrom(registration.start_time)
    if record.last_heard_wall_ns:
        node.report_time.CopyFrom(time_to_proto(record.last_heard_wall_ns))
    return node
