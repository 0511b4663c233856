"""Events to the wire."""

from __future__ import annotations

from agent.event_log import Level, LoggedEvent
from agent.v1 import types_pb2
from agent.wire.convert_time import time_to_proto

_LEVELS: dict[Level, types_pb2.Event.Level.ValueType] = {
    "info": types_pb2.Event.LEVEL_INFO,
    "warning": types_pb2.Event.LEVEL_WARNING,
    "error": types_pb2.Event.LEVEL_ERROR,
}


def event_to_proto(event: LoggedEvent) -> types_pb2.Event:
    return types_pb2.Event(
        time=time_to_proto(event.wall_ns),
        instance_uid=event.instance_uid,
        name=event.name,
        message=event.message,
        attributes=event.attributes,
        level=_LEVELS[event.level],
        count=event.count,
        first_time=time_to_proto(event.first_wall_ns),
    )
