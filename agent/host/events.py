"""The node's event history: bounded, newest kept, in memory (the log has them all)."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from agent.log import get_logger
from agent.ports import Clock


@dataclass(frozen=True, slots=True)
class NodeEvent:
    """One thing that happened. `sequence` grows by one; `name` is dotted and never changes its meaning."""

    sequence: int
    wall_ns: int
    instance_uid: str
    name: str
    message: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)


class EventLog:
    """Keeps the last `capacity` events and logs each once."""

    def __init__(self, clock: Clock, capacity: int = 5000) -> None:
        self._clock = clock
        self._events: deque[NodeEvent] = deque(maxlen=capacity)
        self._sequence = 0
        self._log = get_logger()

    def add(self, instance_uid: str, name: str, message: str = "", **attributes: str | int) -> None:
        """Record and log one event. Never pass secrets."""
        self._sequence += 1
        texts = {key: str(value) for key, value in attributes.items()}
        self._events.append(NodeEvent(self._sequence, self._clock.wall_ns(), instance_uid, name, message, texts))
        extra = {"message": message} if message else {}
        self._log.info(name, instance=instance_uid, **extra, **texts)

    def read(self, *, after: int = 0, instance_uid: str = "", since_wall_ns: int = 0) -> list[NodeEvent]:
        """Events after sequence number `after`, oldest first."""
        return [
            event
            for event in self._events
            if event.sequence > after and event.wall_ns >= since_wall_ns and instance_uid in ("", event.instance_uid)
        ]
