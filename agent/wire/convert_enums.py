"""Enums of core to and from the wire. The `_from_proto` functions raise InvalidArgumentError for an unknown value."""

from __future__ import annotations

from typing import TypeVar

from agent.core.errors import InvalidArgumentError
from agent.core.provisioning.model import Scheduling
from agent.core.types import DispatchPolicy, IdleMode, InstanceState, StopCause, VisibleDevices
from agent.v1 import types_pb2
from agent.v1.instance_service_pb2 import StopInstanceRequest

_Core = TypeVar("_Core", InstanceState, IdleMode, DispatchPolicy, VisibleDevices, Scheduling, StopCause)

_STATES: dict[InstanceState, types_pb2.Instance.State.ValueType] = {
    InstanceState.STARTING: types_pb2.Instance.STATE_STARTING,
    InstanceState.RUNNING: types_pb2.Instance.STATE_RUNNING,
    InstanceState.FREEZING: types_pb2.Instance.STATE_FREEZING,
    InstanceState.FROZEN: types_pb2.Instance.STATE_FROZEN,
    InstanceState.WAITING_GPU: types_pb2.Instance.STATE_WAITING_GPU,
    InstanceState.RESTORING: types_pb2.Instance.STATE_RESTORING,
    InstanceState.STOPPING: types_pb2.Instance.STATE_STOPPING,
    InstanceState.STOPPED: types_pb2.Instance.STATE_STOPPED,
    InstanceState.FAILED: types_pb2.Instance.STATE_FAILED,
}
_IDLE_MODES: dict[IdleMode, types_pb2.IdlePolicy.Mode.ValueType] = {
    IdleMode.REQUIRE: types_pb2.IdlePolicy.MODE_REQUIRE,
    IdleMode.PREFER: types_pb2.IdlePolicy.MODE_PREFER,
    IdleMode.NEVER: types_pb2.IdlePolicy.MODE_NEVER,
}
_DISPATCH: dict[DispatchPolicy, types_pb2.FunctionSpec.Dispatch.ValueType] = {
    DispatchPolicy.PACK: types_pb2.FunctionSpec.DISPATCH_PACK,
    DispatchPolicy.SPREAD: types_pb2.FunctionSpec.DISPATCH_SPREAD,
}
_VISIBLE_DEVICES: dict[VisibleDevices, types_pb2.GpuRequirement.VisibleDevices.ValueType] = {
    VisibleDevices.INDEX: types_pb2.GpuRequirement.VISIBLE_DEVICES_INDEX,
    VisibleDevices.UUID: types_pb2.GpuRequirement.VISIBLE_DEVICES_UUID,
}
_SCHEDULING: dict[Scheduling, types_pb2.Node.Scheduling.ValueType] = {
    Scheduling.NORMAL: types_pb2.Node.SCHEDULING_NORMAL,
    Scheduling.CORDONED: types_pb2.Node.SCHEDULING_CORDONED,
    Scheduling.DRAINED: types_pb2.Node.SCHEDULING_DRAINED,
    Scheduling.EMPTIED: types_pb2.Node.SCHEDULING_EMPTIED,
}
_CAUSES: dict[StopCause, StopInstanceRequest.Cause.ValueType] = {
    StopCause.ASKED: StopInstanceRequest.CAUSE_UNSPECIFIED,
    StopCause.REPLACED: StopInstanceRequest.CAUSE_REPLACED,
    StopCause.SCALED_IN: StopInstanceRequest.CAUSE_SCALED_IN,
    StopCause.FUNCTION_DELETED: StopInstanceRequest.CAUSE_FUNCTION_DELETED,
    StopCause.NODE_DRAINED: StopInstanceRequest.CAUSE_NODE_DRAINED,
}
_STATE_OF = {wire: core for core, wire in _STATES.items()}
_IDLE_MODE_OF = {wire: core for core, wire in _IDLE_MODES.items()}
_DISPATCH_OF = {wire: core for core, wire in _DISPATCH.items()}
_VISIBLE_DEVICES_OF = {wire: core for core, wire in _VISIBLE_DEVICES.items()}
_SCHEDULING_OF = {wire: core for core, wire in _SCHEDULING.items()}
_CAUSE_OF = {wire: core for core, wire in _CAUSES.items()}


def state_to_proto(state: InstanceState) -> types_pb2.Instance.State.ValueType:
    return _STATES[state]


def state_from_proto(value: types_pb2.Instance.State.ValueType) -> InstanceState:
    return _known(_STATE_OF.get(value), "state", value)


def scheduling_to_proto(scheduling: Scheduling) -> types_pb2.Node.Scheduling.ValueType:
    return _SCHEDULING[scheduling]


def scheduling_from_proto(value: types_pb2.Node.Scheduling.ValueType) -> Scheduling:
    return _known(_SCHEDULING_OF.get(value), "scheduling", value)


def stop_cause_to_proto(cause: StopCause) -> StopInstanceRequest.Cause.ValueType:
    return _CAUSES[cause]


def stop_cause_from_proto(value: StopInstanceRequest.Cause.ValueType) -> StopCause:
    return _known(_CAUSE_OF.get(value), "cause", value)


def idle_mode_to_proto(mode: IdleMode) -> types_pb2.IdlePolicy.Mode.ValueType:
    return _IDLE_MODES[mode]


def idle_mode_from_proto(value: types_pb2.IdlePolicy.Mode.ValueType, unspecified: IdleMode) -> IdleMode:
    """The idle mode; `unspecified` for UNSPECIFIED."""
    if value == types_pb2.IdlePolicy.MODE_UNSPECIFIED:
        return unspecified
    return _known(_IDLE_MODE_OF.get(value), "idle_policy.mode", value)


def dispatch_to_proto(policy: DispatchPolicy) -> types_pb2.FunctionSpec.Dispatch.ValueType:
    return _DISPATCH[policy]


def dispatch_from_proto(
    value: types_pb2.FunctionSpec.Dispatch.ValueType, unspecified: DispatchPolicy
) -> DispatchPolicy:
    """The dispatch policy; `unspecified` for UNSPECIFIED."""
    if value == types_pb2.FunctionSpec.DISPATCH_UNSPECIFIED:
        return unspecified
    return _known(_DISPATCH_OF.get(value), "dispatch", value)


def visible_devices_to_proto(names: VisibleDevices) -> types_pb2.GpuRequirement.VisibleDevices.ValueType:
    return _VISIBLE_DEVICES[names]


def visible_devices_from_proto(value: types_pb2.GpuRequirement.VisibleDevices.ValueType) -> VisibleDevices:
    """How CUDA_VISIBLE_DEVICES names GPUs; INDEX for UNSPECIFIED."""
    if value == types_pb2.GpuRequirement.VISIBLE_DEVICES_UNSPECIFIED:
        return VisibleDevices.INDEX
    return _known(_VISIBLE_DEVICES_OF.get(value), "gpu.visible_devices", value)


def _known(found: _Core | None, field: str, value: int) -> _Core:
    if found is None:
        message = f"{field} {value} is unknown to this version; send a value of its protos"
        raise InvalidArgumentError("UNKNOWN_ENUM_VALUE", message, field=field, value=value)
    return found
