"""Converts snapshots of nodes and instances to protobuf. There is no way back: no component sends snapshots."""

from __future__ import annotations

from collections.abc import Iterable

from agent.core.snapshots import GpuSnapshot, InstanceSnapshot, NodeSnapshot
from agent.core.types import GpuSample
from agent.v1 import types_pb2
from agent.v1.scheduler_service_pb2 import InstanceLoad, NodeLoad, Registration
from agent.wire.convert_enums import state_to_proto
from agent.wire.convert_function import function_to_proto
from agent.wire.convert_load import gpu_to_proto, load_of_instance
from agent.wire.convert_time import time_to_proto

_LEVELS = {
    "OK": types_pb2.Capability.LEVEL_OK,
    "WARN": types_pb2.Capability.LEVEL_WARN,
    "FAIL": types_pb2.Capability.LEVEL_FAIL,
}

_SAMPLE_FIELDS = (
    *("memory_used_bytes", "sm_percent", "memory_percent", "encoder_percent", "decoder_percent"),
    *("temperature_celsius", "power_milliwatts"),
)


def instance_to_proto(snapshot: InstanceSnapshot, node: str, *, with_spec: bool = True) -> types_pb2.Instance:
    """The instance as the API shows it, with the spec's secrets masked."""
    message = types_pb2.Instance(
        uid=snapshot.uid,
        node=node,
        function=snapshot.function.name,
        revision=snapshot.function.revision,
        request_id=snapshot.request_id,
        state=state_to_proto(snapshot.state),
        state_reason=snapshot.reason,
        state_message=snapshot.message,
        gpu_uuids=snapshot.gpu_uuids,
        in_flight=snapshot.in_flight,
        waiting=snapshot.waiting,
        vram_bytes=snapshot.vram_bytes,
        frozen_bytes=snapshot.frozen_bytes,
        pid=snapshot.pid,
        address=snapshot.address,
        create_time=time_to_proto(snapshot.create_wall_ns),
        state_time=time_to_proto(snapshot.state_wall_ns),
        wake_count=snapshot.wakes,
        freeze_count=snapshot.freezes,
        active_ns=snapshot.active_ns,
        idle_ns=snapshot.idle_ns,
        unbilled_ns=snapshot.unbilled_ns,
        healthy=snapshot.healthy,
        container_id=snapshot.container_id,
        progress=snapshot.progress,
    )
    if snapshot.wakes:
        message.last_wake.total_ns = snapshot.last_wake_ns
        message.last_wake.driver_ns = snapshot.last_wake_driver_ns
    if with_spec:
        message.spec.CopyFrom(function_to_proto(snapshot.function))
    return message


def instance_load(snapshot: InstanceSnapshot) -> InstanceLoad:
    """The instance as the load stream reports it."""
    return load_of_instance(
        instance_to_proto(snapshot, "", with_spec=False),
        snapshot.function.instance_concurrency,
        snapshot.wake_estimate_ns,
        snapshot.idle_for_ns,
        snapshot.freeze_cancellable,
    )


def gpu_snapshot_to_proto(snapshot: GpuSnapshot) -> types_pb2.Gpu:
    """The GPU with its samples, and its holder, waiters and health from the node's GPU allocator."""
    message = gpu_to_proto(snapshot.gpu)
    if snapshot.figures is not None:
        _add_sample(message, snapshot.figures)
    if snapshot.holder:
        message.holder_uids.append(snapshot.holder)
    message.waiter_uids.extend(snapshot.waiters)
    if snapshot.cordoned:
        message.health = types_pb2.Gpu.HEALTH_CORDONED
        message.cordoned_reason = snapshot.cordoned
    if snapshot.figures is not None and snapshot.figures.lost:
        message.health = types_pb2.Gpu.HEALTH_LOST
    return message


def _add_sample(message: types_pb2.Gpu, figures: GpuSample) -> None:
    """Unknown values stay absent."""
    for name in _SAMPLE_FIELDS:
        value = getattr(figures, name)
        if value is not None:
            setattr(message, name, value)


def node_state(snapshot: NodeSnapshot) -> types_pb2.Node.State.ValueType:
    """RECOVERING until the node is ready, then DRAINING or READY."""
    if not snapshot.ready:
        return types_pb2.Node.STATE_RECOVERING
    return types_pb2.Node.STATE_DRAINING if snapshot.draining else types_pb2.Node.STATE_READY


def _host_memory(snapshot: NodeSnapshot) -> types_pb2.HostMemory:
    return types_pb2.HostMemory(
        total_bytes=snapshot.host_total_bytes,
        available_bytes=snapshot.host_available_bytes,
        reserved_bytes=snapshot.host_reserved_bytes,
    )


def _capabilities(snapshot: NodeSnapshot) -> list[types_pb2.Capability]:
    return [
        types_pb2.Capability(name=line.name, level=_LEVELS[line.level], reason=line.reason, fix=line.fix)
        for line in snapshot.capabilities
    ]


def node_to_proto(snapshot: NodeSnapshot) -> types_pb2.Node:
    """The node as its agent's API shows it."""
    return types_pb2.Node(
        name=snapshot.name,
        boot_id=snapshot.boot_id,
        agent_version=snapshot.agent_version,
        epoch=snapshot.epoch,
        driver_version=snapshot.driver_version,
        cuda_version=snapshot.cuda_version,
        gpus=[gpu_snapshot_to_proto(gpu) for gpu in snapshot.gpus],
        host_memory=_host_memory(snapshot),
        capabilities=_capabilities(snapshot),
        state=node_state(snapshot),
        ingress_address=snapshot.ingress_address,
        grpc_address=snapshot.grpc_address,
        labels=snapshot.labels,
        instances_per_gpu=snapshot.instances_per_gpu,
        runtimes=snapshot.runtimes,
        instance_count=snapshot.instance_count,
        start_time=time_to_proto(snapshot.start_wall_ns),
    )


def registration(snapshot: NodeSnapshot) -> Registration:
    """The node as its agent registers it, in the first message of the load stream."""
    return Registration(
        boot_id=snapshot.boot_id,
        agent_version=snapshot.agent_version,
        ingress_address=snapshot.ingress_address,
        grpc_address=snapshot.grpc_address,
        driver_version=snapshot.driver_version,
        cuda_version=snapshot.cuda_version,
        gpus=[gpu_snapshot_to_proto(gpu) for gpu in snapshot.gpus],
        capabilities=_capabilities(snapshot),
        labels=snapshot.labels,
        instances_per_gpu=snapshot.instances_per_gpu,
        runtimes=snapshot.runtimes,
        host_memory=_host_memory(snapshot),
        start_time=time_to_proto(snapshot.start_wall_ns),
        gpu_migration=snapshot.migrates,
        gpu_types=snapshot.gpu_types,
    )


def node_load(snapshot: NodeSnapshot, awake: Iterable[InstanceSnapshot] = ()) -> NodeLoad:
    """The gauges of a heartbeat, with those of instances that are awake."""
    return NodeLoad(
        state=node_state(snapshot),
        host_memory=_host_memory(snapshot),
        gpu_waiting=sum(len(gpu.waiters) for gpu in snapshot.gpus),
        gpus=[gpu_snapshot_to_proto(gpu) for gpu in snapshot.gpus],
        instances=[_gauges(one) for one in awake],
    )


def _gauges(snapshot: InstanceSnapshot) -> NodeLoad.InstanceGauges:
    """Unknown values stay absent, because a 0 would count in averages."""
    usage = snapshot.usage
    return NodeLoad.InstanceGauges(
        uid=snapshot.uid,
        cpu_ns=usage.cpu_ns,
        vram_bytes=snapshot.vram_bytes or None,
        vram_limit_bytes=snapshot.vram_limit_bytes,
        memory_bytes=usage.memory_bytes,
    )
