"""Usage windows to and from the wire, field by field: two windows are the same only if every field is.

A state of another version is carried as its number, `STATE_12`: the amounts of the window count whatever it is called.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, cast

from agent.core.billing.window import UsageWindow
from agent.core.errors import InvalidArgumentError
from agent.core.types import InstanceState
from agent.v1 import types_pb2
from agent.wire.convert_enums import state_from_proto, state_to_proto

_OTHER = "STATE_"
_SAME_ON_BOTH_SIDES = tuple(field.name for field in fields(UsageWindow) if field.name not in ("state", "gpu_uuids"))


def window_to_proto(window: UsageWindow) -> types_pb2.UsageWindow:
    """Raises InvalidArgumentError for a number that its field cannot hold."""
    values: dict[str, Any] = {name: getattr(window, name) for name in _SAME_ON_BOTH_SIDES}
    try:
        return types_pb2.UsageWindow(state=_state_number(window.state), gpu_uuids=window.gpu_uuids, **values)
    except ValueError as error:
        message = f"window {window.instance_uid}/{window.seq} does not fit the wire: {error}"
        raise InvalidArgumentError("VALUE_OUT_OF_RANGE", message, instance=window.instance_uid) from error


def window_from_proto(message: types_pb2.UsageWindow) -> UsageWindow:
    """Raises InvalidArgumentError for sums that contradict the window's length."""
    length = message.end_mono_ns - message.start_mono_ns
    if message.active_ns + message.idle_ns + message.unbilled_ns != length or length < 0:
        text = f"window {message.instance_uid}/{message.seq} lasts {length} ns, but its sums say otherwise"
        raise InvalidArgumentError("WINDOW_INCONSISTENT", text, instance=message.instance_uid, seq=message.seq)
    values: dict[str, Any] = {name: getattr(message, name) for name in _SAME_ON_BOTH_SIDES}
    return UsageWindow(state=_state_text(message.state), gpu_uuids=tuple(message.gpu_uuids), **values)


def _state_number(text: str) -> types_pb2.Instance.State.ValueType:
    if text in InstanceState.__members__:
        return state_to_proto(InstanceState(text))
    number = text.removeprefix(_OTHER)
    known = text.startswith(_OTHER) and number.isdecimal() and len(number) < 9
    return cast(types_pb2.Instance.State.ValueType, int(number) if known else 0)


def _state_text(number: types_pb2.Instance.State.ValueType) -> str:
    try:
        return state_from_proto(number).value
    except InvalidArgumentError:
        return f"{_OTHER}{number}"
