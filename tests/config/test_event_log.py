"""The event log: events can be read at once, and are logged a moment later with their own time. It is bounded, and one
that repeats counts."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import pytest

from agent import log
from agent.core.types import SECOND_NS
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


def test_a_line_of_the_fleet_has_its_keys_and_level_and_no_other(lines: io.StringIO) -> None:
    """No loop runs here, so that nobody waits: the line is there at once."""
    events = EventLog(FakeClock(wall_ns=1_700_000_000_123_456_789))
    events.warning(
        "provision.stop_failed", about="ocr", uid="i1", node="n1", tries=3, message="no answer", to=["a", "b"]
    )
    assert json.loads(lines.getvalue()) == {
        "event": "provision.stop_failed",
        "level": "warning",
        "timestamp": "2023-11-14T22:13:20.123456Z",
        "uid": "i1",
        "node": "n1",
        "tries": 3,
        "message": "no answer",
        "to": ["a", "b"],
    }
    (event,) = events.read()
    assert (event.level, event.instance_uid, event.message) == ("warning", "i1", "no answer")
    assert event.attributes == {"function": "ocr", "node": "n1", "tries": "3", "to": "a, b"}


def test_the_oldest_are_dropped_and_long_texts_cut() -> None:
    events = EventLog(FakeClock(), capacity=3, repeat_ns=SECOND_NS)
    for number in range(10):
        events.info("fleet.gap", node="n1", sequence=number)
    assert [event.attributes["sequence"] for event in events.read()] == ["7", "8", "9"]
    assert len(events._newest) == 3, "nothing is kept of those dropped"
    events.info("fleet.gap", node="n" * 10_000)
    assert len(events.read()[-1].attributes["node"]) == 2_000


def test_what_repeats_is_one_event_that_counts_at_its_last_time(lines: io.StringIO) -> None:
    clock = FakeClock()
    events = EventLog(clock, capacity=5, repeat_ns=10 * SECOND_NS)
    events.info("function.deployed", function="ocr")
    began = clock.wall_ns()
    for _ in range(100):
        events.info("provision.stopping", about="ocr", uid="i1")
        events.warning("provision.stop_failed", about="ocr", uid="i1", reason="UNREACHABLE")
        clock.advance(2 * SECOND_NS)
    listed = [(event.name, event.count, event.first_wall_ns) for event in events.read()]
    assert listed == [
        ("function.deployed", 1, began),
        ("provision.stopping", 100, began),
        ("provision.stop_failed", 100, began),
    ]
    assert events.read()[-1].wall_ns == clock.wall_ns() - 2 * SECOND_NS
    assert len(lines.getvalue().splitlines()) == 201, "the log has every one"


def test_another_cause_or_one_long_ago_is_another_event() -> None:
    clock = FakeClock()
    events = EventLog(clock, repeat_ns=10 * SECOND_NS)
    for reason in ("FULL", "GONE", "FULL"):
        events.warning("provision.create_failed", node="n1", reason=reason)
    clock.advance(11 * SECOND_NS)
    events.warning("provision.create_failed", node="n1", reason="FULL")
    assert [(event.attributes["reason"], event.count) for event in events.read()] == [
        ("GONE", 1),
        ("FULL", 2),
        ("FULL", 1),
    ]


def test_a_node_keeps_each_of_its_events() -> None:
    events = EventLog(FakeClock())
    for _ in range(3):
        events.add("i1", "instance.frozen")
    assert [event.count for event in events.read()] == [1, 1, 1]


def test_events_are_found_by_function_node_and_time() -> None:
    clock = FakeClock()
    events = EventLog(clock)
    events.info("provision.created", about="ocr", uid="i1", node="n1", request_id="ocr/1/0/1")
    events.info("fleet.node_heard", node="n10", standing="READY")
    clock.advance(SECOND_NS)
    events.error("node.token_unusable", reason="TOKEN_NOT_UNIQUE", nodes_out=["n1", "n2"])
    events.error("function.not_understood", function="ocr", message="damaged")

    def names(**only: str | int) -> list[str]:
        return [event.name for event in events.read(**only)]  # type: ignore[arg-type]

    assert names(function="ocr") == ["provision.created", "function.not_understood"]
    assert names(node="n1") == ["provision.created", "node.token_unusable"]
    assert names(node="n2") == ["node.token_unusable"], "each node that it keeps out"
    assert names(node="n10") == ["fleet.node_heard"]
    assert names(function="ocr", node="n1") == ["provision.created"]
    assert names(since_wall_ns=clock.wall_ns()) == ["node.token_unusable", "function.not_understood"]
    assert names(instance_uid="i1") == ["provision.created"]
    assert names(function="oc") == names(node="n") == []
