"""The answer to a request that waited too long names who holds the GPU."""

from __future__ import annotations

from agent.core.types import SECOND_NS
from agent.event_log import EventLog
from agent.scheduler.fleet.fleet import Fleet
from agent.scheduler.fleet.gpu_waits import GpuWaits
from agent.v1.scheduler_service_pb2 import InstanceLoad, NodeLoad, Registration, ReportLoadRequest
from agent.v1.types_pb2 import Instance, Node
from agent.wire.convert_time import time_to_proto
from tests.fakes.clock import FakeClock


def report(clock: FakeClock, fleet: Fleet, *instances: tuple[str, str, Instance.State.ValueType]) -> None:
    now = time_to_proto(clock.wall_ns())
    message = ReportLoadRequest(epoch=1, sequence=1, snapshot=True, load=NodeLoad(state=Node.STATE_READY))
    message.registration.CopyFrom(Registration(ingress_address="127.0.0.1:1", grpc_address="127.0.0.1:2"))
    for uid, function, state in instances:
        message.instances.append(
            InstanceLoad(uid=uid, function=function, state=state, gpu_uuids=["g1"], create_time=now, state_time=now)
        )
    fleet.receive("n1", fleet.stream_opened("n1"), message)


def test_the_holder_is_named_with_its_time_and_requests_share_one_look() -> None:
    clock = FakeClock()
    fleet = Fleet(clock, EventLog(clock), lambda event: None, lambda: None, 3 * SECOND_NS, 10 * SECOND_NS)
    waits = GpuWaits(fleet, clock)
    assert waits.why("ocr") == ""
    report(
        clock,
        fleet,
        ("i1", "ocr", Instance.STATE_WAITING_GPU),
        ("i2", "chat", Instance.STATE_RUNNING),
        ("i3", "old", Instance.STATE_STOPPED),
    )
    clock.advance(SECOND_NS // 2)
    assert waits.why("ocr") == "", "the last look is fresh"
    clock.advance(SECOND_NS)
    assert waits.why("ocr") == "its GPU is held by i2 of chat, RUNNING for 1 s"
    assert waits.why("chat") == ""
