"""Instances on the wire -> who holds which GPU (core/gpu_holders.py)."""

from __future__ import annotations

from agent.core.gpu_holders import GpuUser
from agent.v1.scheduler_service_pb2 import InstanceLoad
from agent.v1.types_pb2 import Instance
from agent.wire.convert_enums import state_from_proto
from agent.wire.convert_time import time_from_proto

_UNUSED = (Instance.STATE_UNSPECIFIED, Instance.STATE_UNKNOWN)


def gpu_user(shown: Instance | InstanceLoad, node: str) -> GpuUser | None:
    """The instance as a user of its GPUs; None if its state is not known."""
    if shown.state in _UNUSED:
        return None
    since = time_from_proto(shown.state_time)
    state = state_from_proto(shown.state)
    return GpuUser(shown.uid, shown.function, node, state, tuple(shown.gpu_uuids), since)
