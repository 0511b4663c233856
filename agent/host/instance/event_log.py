"""The node's events: the newest are kept in memory, all go to the log."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from agent.log import get_logger, timestamp
from agent.ports import Clock


@dataclass(frozen=True, slots=True)
class NodeEvent:
    """One event. `sequence` grows by one with each event; `name` is dotted and never changes."""

    sequence: int
    wall_ns: int
    instance_uid: str
    name: str
    message: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)


LOG_AFTER_S = 0.02
"""Delay of log lines: writing one costs a wake up to 0.3 ms, and a request waits for every wake."""
MAX_UNLOGGED = 1000


class EventLog:
    """Keeps the last `capacity` events, and logs each once, within `LOG_AFTER_S` but with the time it was added. Call
    `flush` at the end."""

    def __init__(self, clock: Clock, capacity: int = 5000) -> None:
        self._clock = clock
        self._events: deque[NodeEvent] = deque(maxlen=capacity)
        self._unlogged: list[NodeEvent] = []
        self._sequence = 0
        self._log = get_logger()

    def add(self, instance_uid: str, name: str, message: str = "", **attributes: str | int) -> None:
        """Record one event; it is logged soon. Never pass secrets. Call it on the loop's thread."""
        self._sequence += 1
        texts = {key: str(value) for key, value in attributes.items()}
        event = NodeEvent(self._sequence, self._clock.wall_ns(), instance_uid, name, message, texts)
        self._events.append(event)
        self._unlogged.append(event)
        if len(self._unlogged) == 1:
            asyncio.get_running_loop().call_later(LOG_AFTER_S, self.flush)
        elif len(self._unlogged) >= MAX_UNLOGGED:
            self.flush()

    def flush(self) -> None:
        """Log the events that have not been logged yet."""
        events, self._unlogged = self._unlogged, []
        for event in events:
            extra = {"message": event.message} if event.message else {}
            at = timestamp(event.wall_ns)
            self._log.info(event.name, timestamp=at, instance=event.instance_uid, **extra, **event.attributes)

    def read(self, *, after: int = 0, instance_uid: str = "", since_wall_ns: int = 0) -> list[NodeEvent]:
        """Events after sequence number `after` that match the other filters ("" and 0 match all), oldest first."""
        return [
            event
            for event in self._events
            if event.sequence > after and event.wall_ns >= since_wall_ns and instance_uid in ("", event.instance_uid)
        ]
