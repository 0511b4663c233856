"""Usage windows, both ways: every field exactly as it is, for the payload decides whether two windows are the same."""

from __future__ import annotations

from agent.core.billing.window import UsageWindow
from agent.core.errors import InvalidArgumentError
from agent.core.types import InstanceState
from agent.v1 import types_pb2
from agent.wire.convert_enums import state_from_proto, state_to_proto


def window_to_proto(window: UsageWindow) -> types_pb2.UsageWindow:
    """The window on the wire. Raises InvalidArgumentError for a state or number the wire has no room for."""
    try:
        return types_pb2.UsageWindow(
            instance_uid=window.instance_uid,
            seq=window.seq,
            node=window.node,
            boot_id=window.boot_id,
            function=window.function,
            state=state_to_proto(InstanceState(window.state)),
            gpu_model=window.gpu_model,
            gpu_uuids=window.gpu_uuids,
            gpu_count=window.gpu_count,
            gpu_memory_bytes=window.gpu_memory_bytes,
            vcpu_millis=window.vcpu_millis,
            memory_bytes=window.memory_bytes,
            disk_bytes=window.disk_bytes,
            start_mono_ns=window.start_mono_ns,
            end_mono_ns=window.end_mono_ns,
            start_wall_ns=window.start_wall_ns,
            active_ns=window.active_ns,
            idle_ns=window.idle_ns,
            unbilled_ns=window.unbilled_ns,
            invocations=window.invocations,
            estimated=window.estimated,
            sealed=window.sealed,
        )
    except ValueError as error:
        message = f"window {window.instance_uid}/{window.seq} does not fit the wire: {error}"
        raise InvalidArgumentError("VALUE_OUT_OF_RANGE", message, instance=window.instance_uid) from error


def window_from_proto(message: types_pb2.UsageWindow) -> UsageWindow:
    """The window. Raises InvalidArgumentError for a state of another version, or sums that contradict its length."""
    length = message.end_mono_ns - message.start_mono_ns
    if message.active_ns + message.idle_ns + message.unbilled_ns != length or length < 0:
        text = f"window {message.instance_uid}/{message.seq} lasts {length} ns, but its sums say otherwise"
        raise InvalidArgumentError("WINDOW_INCONSISTENT", text, instance=message.instance_uid, seq=message.seq)
    return UsageWindow(
        instance_uid=message.instance_uid,
        seq=message.seq,
        node=message.node,
        boot_id=message.boot_id,
        function=message.function,
        state=state_from_proto(message.state).value,
        gpu_model=message.gpu_model,
        gpu_uuids=tuple(message.gpu_uuids),
        gpu_count=message.gpu_count,
        gpu_memory_bytes=message.gpu_memory_bytes,
        vcpu_millis=message.vcpu_millis,
        memory_bytes=message.memory_bytes,
        disk_bytes=message.disk_bytes,
        start_mono_ns=message.start_mono_ns,
        end_mono_ns=message.end_mono_ns,
        start_wall_ns=message.start_wall_ns,
        active_ns=message.active_ns,
        idle_ns=message.idle_ns,
        unbilled_ns=message.unbilled_ns,
        invocations=message.invocations,
        estimated=message.estimated,
        sealed=message.sealed,
    )
