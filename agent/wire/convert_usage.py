"""Usage windows to and from the wire, field by field: two windows are the same only if every field is."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from agent.core.billing.window import UsageWindow
from agent.core.errors import InvalidArgumentError
from agent.core.types import InstanceState
from agent.v1 import types_pb2
from agent.wire.convert_enums import state_from_proto, state_to_proto

_SAME_ON_BOTH_SIDES = tuple(field.name for field in fields(UsageWindow) if field.name not in ("state", "gpu_uuids"))


def window_to_proto(window: UsageWindow) -> types_pb2.UsageWindow:
    """Raises InvalidArgumentError for an unknown state, or a number that its field cannot hold."""
    values: dict[str, Any] = {name: getattr(window, name) for name in _SAME_ON_BOTH_SIDES}
    try:
        state = state_to_proto(InstanceState(window.state))
        return types_pb2.UsageWindow(state=state, gpu_uuids=window.gpu_uuids, **values)
    except ValueError as error:
        message = f"window {window.instance_uid}/{window.seq} does not fit the wire: {error}"
        raise InvalidArgumentError("VALUE_OUT_OF_RANGE", message, instance=window.instance_uid) from error


def window_from_proto(message: types_pb2.UsageWindow) -> UsageWindow:
    """Raises InvalidArgumentError for a state of another version, or sums that contradict the window's length."""
    length = message.end_mono_ns - message.start_mono_ns
    if message.active_ns + message.idle_ns + message.unbilled_ns != length or length < 0:
        text = f"window {message.instance_uid}/{message.seq} lasts {length} ns, but its sums say otherwise"
        raise InvalidArgumentError("WINDOW_INCONSISTENT", text, instance=message.instance_uid, seq=message.seq)
    values: dict[str, Any] = {name: getattr(message, name) for name in _SAME_ON_BOTH_SIDES}
    state = state_from_proto(message.state).value
    return UsageWindow(state=state, gpu_uuids=tuple(message.gpu_uuids), **values)
