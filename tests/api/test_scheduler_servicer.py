"""The fleet and the scheduler's events as SchedulerService shows them."""

from __future__ import annotations

from typing import cast

from agent.api.scheduler_servicer import SchedulerServicer
from agent.core.types import SECOND_NS
from agent.event_log import REPEAT_NS, EventLog
from agent.scheduler.fleet.fleet import Fleet
from agent.scheduler.fleet.node_scheduling import NodeScheduling
from agent.v1.scheduler_service_pb2 import (
    InstanceLoad,
    ListFleetEventsRequest,
    ListFleetInstancesRequest,
    ListNodesRequest,
    NodeLoad,
    Registration,
    ReportLoadRequest,
)
from agent.v1.types_pb2 import Event, Instance, Node
from agent.wire.convert_time import time_from_proto, time_to_proto
from tests.fakes.clock import FakeClock


def report(fleet: Fleet, name: str, *loads: InstanceLoad) -> None:
    registration = Registration(ingress_address="127.0.0.1:1", grpc_address="127.0.0.1:2")
    load = NodeLoad(state=Node.STATE_READY)
    message = ReportLoadRequest(
        epoch=1, sequence=1, snapshot=True, registration=registration, load=load, instances=loads
    )
    fleet.receive(name, fleet.stream_opened(name), message)


async def test_nothing_is_known_of_a_lost_nodes_instances_since_it_was_last_heard() -> None:
    clock = FakeClock()
    events = EventLog(clock)
    fleet = Fleet(clock, events, lambda _: None, lambda: None, 3 * SECOND_NS, 10 * SECOND_NS)
    servicer = SchedulerServicer(fleet, cast(NodeScheduling, None), events)
    heard = clock.wall_ns()
    report(
        fleet,
        "n1",
        InstanceLoad(uid="i1", function="ocr", state=Instance.STATE_FROZEN),
        InstanceLoad(uid="i2", function="ocr", state=Instance.STATE_FAILED, state_reason="OUT_OF_MEMORY"),
    )
    clock.advance(9 * SECOND_NS)
    fleet.check_silence()
    listed = (await servicer.ListFleetInstances(ListFleetInstancesRequest(), None)).instances
    assert [one.state for one in listed] == [Instance.STATE_FROZEN, Instance.STATE_FAILED], "it may only be slow"
    clock.advance(2 * SECOND_NS)
    fleet.check_silence()
    lost, failed = (await servicer.ListFleetInstances(ListFleetInstancesRequest(), None)).instances
    assert (lost.state, lost.state_reason) == (Instance.STATE_UNKNOWN, "NODE_LOST")
    assert lost.state_message == "it was FROZEN when n1 was last heard"
    assert time_from_proto(lost.state_time) == heard
    assert (failed.state, failed.state_reason) == (Instance.STATE_FAILED, "OUT_OF_MEMORY"), "that is over anyway"


async def test_nodes_are_in_the_order_of_their_numbers_and_a_silent_one_is_expected() -> None:
    clock = FakeClock()
    events = EventLog(clock)
    fleet = Fleet(clock, events, lambda _: None, lambda: None, 3 * SECOND_NS, 10 * SECOND_NS)
    fleet.expect("gpu-10")
    for name in ("gpu-2", "gpu-1"):
        report(fleet, name, InstanceLoad(uid=f"i-{name}", function="ocr", state=Instance.STATE_RUNNING))
    report(fleet, "gpu-11", InstanceLoad(uid="i-gpu-11", function="ocr", state=Instance.STATE_RUNNING))
    servicer = SchedulerServicer(fleet, cast(NodeScheduling, None), events)
    nodes = (await servicer.ListNodes(ListNodesRequest(), None)).nodes
    assert [(one.name, Node.State.Name(one.state)) for one in nodes] == [
        ("gpu-1", "STATE_READY"),
        ("gpu-2", "STATE_READY"),
        ("gpu-10", "STATE_EXPECTED"),
        ("gpu-11", "STATE_READY"),
    ]
    listed = (await servicer.ListFleetInstances(ListFleetInstancesRequest(), None)).instances
    assert [one.node for one in listed] == ["gpu-1", "gpu-2", "gpu-11"]


async def test_a_lost_node_is_an_event_and_its_return_another() -> None:
    clock = FakeClock()
    events = EventLog(clock, repeat_ns=REPEAT_NS)
    fleet = Fleet(clock, events, lambda _: None, lambda: None, 3 * SECOND_NS, 10 * SECOND_NS)
    servicer = SchedulerServicer(fleet, cast(NodeScheduling, None), events)
    report(fleet, "n2")
    for _ in range(2):
        report(fleet, "n1")
        fleet.check_silence()
        clock.advance(10 * SECOND_NS)
        report(fleet, "n2")
        fleet.check_silence()
    lost_at = clock.wall_ns()
    answer = await servicer.ListFleetEvents(ListFleetEventsRequest(node="n1"), None)
    assert [(one.name, one.count, one.level) for one in answer.events] == [
        ("fleet.node_registered", 2, Event.LEVEL_INFO),
        ("fleet.node_heard", 2, Event.LEVEL_INFO),
        ("fleet.node_lost", 2, Event.LEVEL_WARNING),
    ]
    lost = answer.events[-1]
    assert dict(lost.attributes) == {"node": "n1", "silent_ms": "10000"}
    assert (time_from_proto(lost.first_time), time_from_proto(lost.time)) == (lost_at - 10 * SECOND_NS, lost_at)
    since = ListFleetEventsRequest(node="n1", since=time_to_proto(lost_at))
    assert [one.name for one in (await servicer.ListFleetEvents(since, None)).events] == ["fleet.node_lost"]


async def test_pages_of_events_miss_none_when_old_ones_are_dropped_or_happen_again() -> None:
    clock = FakeClock()
    events = EventLog(clock, capacity=7, repeat_ns=REPEAT_NS)
    servicer = SchedulerServicer(cast(Fleet, None), cast(NodeScheduling, None), events)
    for number in range(7):
        events.info("function.deployed", function="ocr", revision=number)
    found, token, more = [], "", iter((2, 7, 8))
    while True:
        answer = await servicer.ListFleetEvents(
            ListFleetEventsRequest(page_size=3, page_token=token, function="ocr"), None
        )
        assert len(answer.events) <= 3
        found += [one.attributes["revision"] for one in answer.events]
        token = answer.next_page_token
        if not token:
            break
        events.info("function.deployed", function="ocr", revision=next(more))  # between two pages
    assert found == ["0", "1", "2", "3", "4", "5", "6", "2", "7"]
