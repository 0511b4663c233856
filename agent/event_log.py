"""A daemon's events: the newest are kept in memory, all go to the log."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from agent.core.types import SECOND_NS
from agent.log import MAX_VALUE_CHARS, get_logger, timestamp
from agent.ports import Clock

Level = Literal["info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """One event, or the same one `count` times: first at `first_wall_ns`, last at `wall_ns`. `sequence` grows with each
    event; `name` is dotted and never changes. `instance_uid`: "" if it is of no instance."""

    sequence: int
    wall_ns: int
    first_wall_ns: int
    level: Level
    instance_uid: str
    name: str
    message: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    count: int = 1

    def is_of(self, function: str, node: str) -> bool:
        """Whether it is about this function and this node; "" stands for any."""
        nodes = (self.attributes.get("node", ""), *self.attributes.get("nodes_out", "").split(", "))
        return function in ("", self.attributes.get("function")) and (not node or node in nodes)


LOG_AFTER_S = 0.02
"""Delay of log lines: writing one costs a wake up to 0.3 ms, and a request waits for every wake."""
MAX_UNLOGGED = 1000
REPEAT_NS = 600 * SECOND_NS
"""The scheduler tries again for ever: events that are the same, each no longer than this after the one before, are one
that counts."""


class EventLog:
    """Keeps the last `capacity` events, and logs each once, within `LOG_AFTER_S` but with the time it was added. Call
    `flush` at the end. Never pass secrets. Call it on the loop's thread."""

    def __init__(self, clock: Clock, capacity: int = 5000, repeat_ns: int = 0) -> None:
        """`repeat_ns`: an event that was already added within this time, with the same attributes, replaces the
        earlier one and counts both, so that what is tried again and again drops no other event. 0 keeps each. The log
        has every one."""
        self._clock = clock
        self._capacity = capacity
        self._repeat_ns = repeat_ns
        self._events: OrderedDict[int, LoggedEvent] = OrderedDict()
        self._newest: dict[object, int] = {}  # of events that are the same: the sequence of the last one
        self._unlogged: list[tuple[LoggedEvent, Mapping[str, object]]] = []
        self._sequence = 0
        self._log = get_logger()

    def add(self, instance_uid: str, name: str, message: str = "", **attributes: str | int) -> None:
        """Record an event of a node: of an instance, or of the node itself ("")."""
        texts = {key: str(value) for key, value in attributes.items()}
        said = {"message": message} if message else {}
        self._record("info", instance_uid, name, message, texts, {"instance": instance_uid, **said, **texts})

    def info(self, name: str, *, about: str = "", **keys: object) -> None:
        """Record an event of the fleet. `keys` are those of its log line: `message` becomes the event's message, `uid`
        its instance, all others its attributes. `about`: the function, if no key names it."""
        self._add_keys("info", name, about, keys)

    def warning(self, name: str, *, about: str = "", **keys: object) -> None:
        """As `info`."""
        self._add_keys("warning", name, about, keys)

    def error(self, name: str, *, about: str = "", **keys: object) -> None:
        """As `info`."""
        self._add_keys("error", name, about, keys)

    def _add_keys(self, level: Level, name: str, about: str, keys: Mapping[str, object]) -> None:
        texts = {"function": about} if about else {}
        texts |= {key: _text(value) for key, value in keys.items()}
        self._record(level, texts.pop("uid", ""), name, texts.pop("message", ""), texts, keys)

    def _record(
        self,
        level: Level,
        instance_uid: str,
        name: str,
        message: str,
        attributes: Mapping[str, str],
        line: Mapping[str, object],
    ) -> None:
        self._sequence += 1
        now = self._clock.wall_ns()
        event = LoggedEvent(self._sequence, now, now, level, instance_uid, name, message, attributes)
        self._events[event.sequence] = self._with_earlier(event) if self._repeat_ns else event
        if len(self._events) > self._capacity:
            _, dropped = self._events.popitem(last=False)
            if self._repeat_ns and self._newest[_same(dropped)] == dropped.sequence:
                del self._newest[_same(dropped)]
        self._unlogged.append((event, line))
        if len(self._unlogged) == 1:
            self._flush_soon()
        elif len(self._unlogged) >= MAX_UNLOGGED:
            self.flush()

    def _with_earlier(self, event: LoggedEvent) -> LoggedEvent:
        """The event, counted together with a recent one that is the same and is dropped."""
        before = self._events.get(self._newest.get(_same(event), 0))
        self._newest[_same(event)] = event.sequence
        if before is None or event.wall_ns - before.wall_ns > self._repeat_ns:
            return event
        del self._events[before.sequence]
        return replace(event, count=before.count + 1, first_wall_ns=before.first_wall_ns)

    def _flush_soon(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no request runs, so a line may cost what it costs
            self.flush()
        else:
            loop.call_later(LOG_AFTER_S, self.flush)

    def flush(self) -> None:
        """Log the events that have not been logged yet."""
        unlogged, self._unlogged = self._unlogged, []
        for event, keys in unlogged:
            getattr(self._log, event.level)(event.name, timestamp=timestamp(event.wall_ns), **keys)

    def read(
        self, *, after: int = 0, instance_uid: str = "", since_wall_ns: int = 0, function: str = "", node: str = ""
    ) -> list[LoggedEvent]:
        """Events after sequence number `after` that match the other filters ("" and 0 match all), oldest first."""
        return [
            event
            for event in self._events.values()
            if event.sequence > after
            and event.wall_ns >= since_wall_ns
            and instance_uid in ("", event.instance_uid)
            and event.is_of(function, node)
        ]


def _text(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text[:MAX_VALUE_CHARS]


def _same(event: LoggedEvent) -> object:
    """Equal for events that differ only in their times."""
    return event.name, event.instance_uid, event.message, tuple(event.attributes.items())
