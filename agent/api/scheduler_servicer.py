"""SchedulerService: the load streams of the agents, and the fleet as they report it."""

from __future__ import annotations

from collections.abc import AsyncIterator

from agent.api.paging import page
from agent.core.leases import Standing
from agent.scheduler.fleet import ENDED, Fleet, NodeRecord
from agent.v1 import scheduler_service_pb2 as pb
from agent.v1 import scheduler_service_pb2_grpc, types_pb2
from agent.wire.addresses import peer_host
from agent.wire.convert_load import instance_of_load
from agent.wire.convert_time import time_to_proto
from agent.wire.interceptors import CallContext
from agent.wire.tokens import calling_node

_STATES = {
    Standing.READY: types_pb2.Node.STATE_READY,
    Standing.DRAINING: types_pb2.Node.STATE_DRAINING,
    Standing.SUSPECT: types_pb2.Node.STATE_SUSPECT,
    Standing.LOST: types_pb2.Node.STATE_LOST,
}


class SchedulerServicer(scheduler_service_pb2_grpc.SchedulerServiceServicer):
    """Translates and hands on; errors become statuses in the wire's call guard."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def ReportLoad(
        self, request_iterator: AsyncIterator[pb.ReportLoadRequest], context: CallContext
    ) -> AsyncIterator[pb.ReportLoadResponse]:
        """One node's stream; its end, however it comes, makes the node suspect at once."""
        node = calling_node()
        stream = self._fleet.opened(node, peer_host(context.peer()))
        try:
            async for message in request_iterator:
                yield self._fleet.took(node, stream, message)
        finally:
            self._fleet.closed(node, stream)

    async def ListNodes(self, request: pb.ListNodesRequest, context: object) -> pb.ListNodesResponse:
        """Nodes by name, as last heard."""
        shown, token = page(self._fleet.nodes(), request.page_size, request.page_token)
        return pb.ListNodesResponse(nodes=[node_of_record(node) for node in shown], next_page_token=token)

    async def ListFleetInstances(
        self, request: pb.ListFleetInstancesRequest, context: object
    ) -> pb.ListFleetInstancesResponse:
        """Instances by node and age."""
        found = sorted(
            (
                (node.name, load.create_time.seconds, load.create_time.nanos, load.uid, load)
                for node, load in self._fleet.instances()
                if request.function in ("", load.function) and request.node in ("", node.name)
            ),
            key=lambda entry: entry[:4],
        )
        shown, token = page(found, request.page_size, request.page_token)
        return pb.ListFleetInstancesResponse(
            instances=[instance_of_load(entry[4], entry[0]) for entry in shown], next_page_token=token
        )


def node_of_record(record: NodeRecord) -> types_pb2.Node:
    """The node on the wire: its registration, its last heartbeat, and what the scheduler thinks of it."""
    registration, load = record.registration, record.load
    state = _STATES[record.standing]
    if record.standing is Standing.DRAINING and record.recovering:
        state = types_pb2.Node.STATE_RECOVERING
    node = types_pb2.Node(
        name=record.name,
        boot_id=registration.boot_id,
        agent_version=registration.agent_version,
        epoch=record.epoch,
        driver_version=registration.driver_version,
        cuda_version=registration.cuda_version,
        gpus=load.gpus or registration.gpus,
        host_memory=load.host_memory if load.HasField("host_memory") else registration.host_memory,
        capabilities=registration.capabilities,
        state=state,
        ingress_address=registration.ingress_address,
        grpc_address=registration.grpc_address,
        labels=registration.labels,
        instances_per_gpu=registration.instances_per_gpu,
        runtimes=registration.runtimes,
        instance_count=sum(one.state not in ENDED for one in record.instances.values()),
    )
    if registration.HasField("start_time"):
        node.start_time.CopyFrom(registration.start_time)
    if record.wall_ns:
        node.report_time.CopyFrom(time_to_proto(record.wall_ns))
    return node
