"""Converts GPUs to the wire, and reported load to instances and to events of the dispatcher.

`InstanceLoad` has a subset of `Instance`'s fields. `load_of_instance` and `instance_of_load` convert between them, so
that one function describes an instance for both, and the fleet's list has the same type as the node's.
"""

from __future__ import annotations

from collections.abc import Sequence

from agent.core.dispatch.events import InstanceReported, NodeReported
from agent.core.function_rules import MAX_CONCURRENCY
from agent.core.types import Gpu
from agent.v1 import types_pb2
from agent.v1.scheduler_service_pb2 import InstanceLoad, NodeLoad, Registration
from agent.wire.convert_enums import state_from_proto

_SHARED_FIELDS = (
    *("uid", "function", "revision", "request_id", "state", "state_reason", "state_message", "in_flight", "waiting"),
    *("healthy", "vram_bytes", "frozen_bytes", "wake_count", "freeze_count", "pid"),
    *("active_ns", "idle_ns", "unbilled_ns"),
)
_SHARED_MESSAGES = ("last_wake", "create_time", "state_time")


def gpu_to_proto(gpu: Gpu) -> types_pb2.Gpu:
    """The device on the wire: healthy, without holder or waiters, which `gpu_snapshot_to_proto` adds."""
    return types_pb2.Gpu(
        uuid=gpu.uuid,
        index=gpu.index,
        model=gpu.model,
        memory_total_bytes=gpu.memory_bytes,
        persistence=gpu.persistence,
        mig=gpu.mig,
        health=types_pb2.Gpu.HEALTH_OK,
    )


def load_of_instance(
    instance: types_pb2.Instance,
    concurrency: int,
    wake_estimate_ns: int = 0,
    idle_for_ns: int = 0,
    freeze_cancellable: bool = False,
) -> InstanceLoad:
    """The load stream's message for `instance`, with the values that only the dispatcher needs."""
    load = InstanceLoad(
        concurrency=concurrency,
        wake_estimate_ns=wake_estimate_ns,
        idle_for_ns=idle_for_ns,
        freeze_cancellable=freeze_cancellable,
        gpu_uuids=instance.gpu_uuids,
    )
    _copy(instance, load)
    return load


def instance_of_load(load: InstanceLoad, node: str) -> types_pb2.Instance:
    """The instance as the fleet's list shows it, without spec and address."""
    instance = types_pb2.Instance(node=node, gpu_uuids=load.gpu_uuids)
    _copy(load, instance)
    return instance


def reported_of_load(load: InstanceLoad, node: str) -> InstanceReported:
    """The load as an event of the dispatcher. Raises InvalidArgumentError for a state of another version.

    The dispatcher's index has one bit per slot of an instance, so concurrency is limited to MAX_CONCURRENCY.
    """
    return InstanceReported(
        uid=load.uid,
        function=load.function,
        node=node,
        state=state_from_proto(load.state),
        concurrency=min(max(1, load.concurrency), MAX_CONCURRENCY),
        in_flight=max(0, load.in_flight) + max(0, load.waiting),
        cancellable=load.freeze_cancellable,
        healthy=load.healthy,
        wake_estimate_ns=load.wake_estimate_ns,
        gpus=tuple(load.gpu_uuids),
    )


def node_reported(
    node: str, epoch: int, registration: Registration, load: NodeLoad, gpus: Sequence[types_pb2.Gpu]
) -> NodeReported:
    """A node's registration, newest heartbeat and last reported GPUs as an event of the dispatcher.

    A recovering node counts as draining, so that nothing new goes there. Unusable GPUs are not counted.
    """
    usable = sum(gpu.health == types_pb2.Gpu.HEALTH_OK and not gpu.mig for gpu in gpus)
    return NodeReported(
        node=node,
        epoch=epoch,
        gpu_count=usable,
        migrates=registration.gpu_migration,
        draining=load.state != types_pb2.Node.STATE_READY,
    )


def _copy(source: types_pb2.Instance | InstanceLoad, target: types_pb2.Instance | InstanceLoad) -> None:
    for field in _SHARED_FIELDS:
        setattr(target, field, getattr(source, field))
    for field in _SHARED_MESSAGES:
        if source.HasField(field):  # type: ignore[arg-type]  # the stubs list each message's own names
            getattr(target, field).CopyFrom(getattr(source, field))
