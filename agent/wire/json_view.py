"""JSON view of messages for the CLI: the proto's snake_case names, numbers as numbers, enums without their prefix.

protobuf's own mapping writes 64-bit integers as strings; `jq` and Python read the numbers written here exactly.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp


def to_json(message: Message) -> dict[str, Any]:
    """All fields of the message in the proto's order, as plain JSON types; an absent field is None."""
    return {field.name: _field(message, field) for field in message.DESCRIPTOR.fields}


def short_name(enum: Any, number: int) -> str:
    """`RUNNING` for STATE_RUNNING, `UNSPECIFIED` for an unset one, the number for a value of a newer version."""
    value = enum.values_by_number.get(number)
    if value is None:
        return str(number)
    name: str = value.name
    common: str = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return name.removeprefix(common)


def _field(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        of = field.message_type.fields_by_name["value"]
        return {str(key): _value(of, value[key]) for key in sorted(value)}
    if field.is_repeated:
        return [_value(field, item) for item in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _value(field, value)


def _value(field: Any, value: Any) -> Any:
    if isinstance(value, Timestamp):
        return value.ToJsonString()
    if isinstance(value, Message):
        return to_json(value)
    if field.enum_type is not None:
        return short_name(field.enum_type, value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value
