"""The event log: events can be read at once, and are logged a moment later with their own time."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import pytest

from agent import log
from agent.event_log import MAX_UNLOGGED, EventLog
from tests.fakes.clock import FakeClock
from tests.host.rig import eventually


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    log.configure(stream=stream)
    yield stream
    log.configure()


async def test_an_event_is_there_at_once_and_logged_with_its_own_time(lines: io.StringIO) -> None:
    clock = FakeClock(wall_ns=1_700_000_000_123_456_789)
    events = EventLog(clock)
    events.add("i1", "instance.frozen", "", was="FREEZING")
    assert [event.name for event in events.read()] == ["instance.frozen"]
    assert lines.getvalue() == "", "nobody waits for the log"
    clock.advance(10**9)
    await eventually(lambda: lines.getvalue() != "")
    line = json.loads(lines.getvalue())
    assert line == {
        "event": "instance.frozen",
        "instance": "i1",
        "level": "info",
        "timestamp": "2023-11-14T22:13:20.123456Z",
        "was": "FREEZING",
    }


async def test_flush_logs_all_and_a_flood_is_logged_at_once(lines: io.StringIO) -> None:
    events = EventLog(FakeClock())
    for _ in range(MAX_UNLOGGED):
        events.add("i1", "instance.running")
    assert len(lines.getvalue().splitlines()) == MAX_UNLOGGED
    events.add("i1", "instance.stopped")
    events.flush()
    assert json.loads(lines.getvalue().splitlines()[-1])["event"] == "instance.stopped"
