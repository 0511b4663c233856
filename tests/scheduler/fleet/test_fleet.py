"""The fleet: gaps, silence, restarts of an agent."""

from __future__ import annotations

import pytest

from agent.core.dispatch.events import Event, InstanceGone, InstanceReported, NodeLost, NodeReported, NodeSuspect
from agent.core.dispatch.model import NodeStanding
from agent.core.errors import ConfigError, InvalidArgumentError, PreconditionError
from agent.core.types import SECOND_NS
from agent.event_log import EventLog
from agent.scheduler.fleet.fleet import UNREACHABLE_NS, Fleet
from agent.v1.scheduler_service_pb2 import InstanceLoad, NodeLoad, Registration, ReportLoadRequest, ReportLoadResponse
from agent.v1.types_pb2 import Gpu, Instance, Node
from tests.fakes.clock import FakeClock

READY, RECOVERING = Node.STATE_READY, Node.STATE_RECOVERING
RUNNING, FROZEN = Instance.STATE_RUNNING, Instance.STATE_FROZEN


class FleetRig:
    """A fleet with an agent n1, and the events for the dispatcher."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.events: list[Event] = []
        self.changes = 0
        self.first_seen: list[str] = []
        first_seen = self.first_seen.append
        self.event_log = EventLog(self.clock)
        self.fleet = Fleet(
            self.clock, self.event_log, self.events.append, self._change, 3 * SECOND_NS, 10 * SECOND_NS, first_seen
        )
        self.sequence = 0
        self.stream = 0
        self.epoch = 1

    def _change(self) -> None:
        self.changes += 1

    def connect(self, *uids: str, state: Node.State.ValueType = READY, name: str = "n1") -> ReportLoadResponse | None:
        self.stream = self.fleet.stream_opened(name)
        self.sequence = 0
        return self.send(*uids, snapshot=True, state=state, register=True)

    def send(
        self,
        *uids: str,
        snapshot: bool = False,
        state: Node.State.ValueType | None = READY,
        register: bool = False,
        removed: tuple[str, ...] = (),
        as_state: Instance.State.ValueType = RUNNING,
    ) -> ReportLoadResponse | None:
        self.sequence += 1
        message = ReportLoadRequest(epoch=self.epoch, sequence=self.sequence, snapshot=snapshot, removed_uids=removed)
        message.instances.extend(InstanceLoad(uid=uid, function="ocr", state=as_state, healthy=True) for uid in uids)
        if register:
            gpus = [Gpu(uuid="g0", health=Gpu.HEALTH_OK), Gpu(uuid="g1", health=Gpu.HEALTH_CORDONED)]
            message.registration.CopyFrom(
                Registration(ingress_address="127.0.0.1:1", grpc_address="127.0.0.1:2", gpus=gpus)
            )
        if state is not None:
            message.load.CopyFrom(NodeLoad(state=state))
        self.events.clear()
        return self.fleet.receive("n1", self.stream, message)

    def asked_for_all(self, *uids: str, snapshot: bool = False) -> bool:
        answer = self.send(*uids, snapshot=snapshot)
        assert answer is not None, "a snapshot or gap is answered"
        return answer.resync

    def uids(self) -> list[str]:
        return [load.uid for _, load in self.fleet.instances()]

    def standing(self) -> NodeStanding:
        node = self.fleet.node("n1")
        assert node is not None
        return node.standing


def kinds(events: list[Event]) -> list[type]:
    return [type(event) for event in events]


def test_the_first_message_names_the_node_and_fills_the_table() -> None:
    rig = FleetRig()
    answer = rig.connect("a", "b")
    assert answer is not None
    assert (answer.node, answer.acknowledged_sequence, answer.resync) == ("n1", 1, False)
    assert kinds(rig.events) == [InstanceReported, InstanceReported, NodeReported]
    reported = rig.events[-1]
    assert isinstance(reported, NodeReported)
    assert (reported.gpu_count, reported.draining) == (1, False), "cordoned GPUs do not count"
    assert rig.first_seen == ["n1"]
    assert rig.fleet.all_reported()


def test_after_a_gap_deltas_are_ignored_until_the_snapshot() -> None:
    rig = FleetRig()
    rig.connect("a")
    rig.sequence += 1  # one message is lost
    assert rig.asked_for_all("b")
    assert rig.uids() == ["a"]
    assert kinds(rig.events) == [NodeReported], "heartbeats count all the same"
    assert rig.asked_for_all("c")
    assert not rig.asked_for_all("b", "c", snapshot=True)
    assert rig.uids() == ["b", "c"]
    assert InstanceGone("a") in rig.events


def test_removed_instances_are_gone() -> None:
    rig = FleetRig()
    rig.connect("a", "b")
    rig.send(removed=("a",))
    assert rig.events[0] == InstanceGone("a")
    assert rig.uids() == ["b"]


def test_a_silent_node_is_suspect_then_lost_until_a_heartbeat() -> None:
    rig = FleetRig()
    rig.connect("a")
    rig.events.clear()
    rig.clock.advance(3 * SECOND_NS - 1)
    rig.fleet.check_silence()
    assert rig.events == []
    rig.clock.advance(1)
    rig.fleet.check_silence()
    assert rig.events == [NodeSuspect("n1")]
    rig.clock.advance(7 * SECOND_NS)
    rig.fleet.check_silence()
    rig.fleet.check_silence()
    assert rig.events == [NodeSuspect("n1"), NodeLost("n1")]
    assert rig.uids() == ["a"], "it is counted out, not forgotten"
    rig.send()
    assert kinds(rig.events) == [NodeReported]
    assert rig.standing() is NodeStanding.READY


def test_a_node_is_suspect_when_its_stream_ends_or_refuses_a_connection() -> None:
    rig = FleetRig()
    rig.connect("a")
    rig.fleet.unreachable("n1")
    assert rig.standing() is NodeStanding.SUSPECT
    rig.send()
    assert rig.standing() is NodeStanding.SUSPECT, "a message that was under way when it died"
    rig.clock.advance(UNREACHABLE_NS)
    rig.send(state=None)
    assert rig.standing() is NodeStanding.READY, "any message of a ready node is a sign of life"
    rig.fleet.stream_closed("n1", rig.stream)
    assert rig.standing() is NodeStanding.SUSPECT


def test_the_end_of_an_old_stream_does_not_affect_the_new_one() -> None:
    rig = FleetRig()
    rig.connect("a")
    old = rig.stream
    rig.connect("a")
    rig.fleet.stream_closed("n1", old)
    assert rig.standing() is NodeStanding.READY
    with pytest.raises(PreconditionError):
        rig.fleet.receive("n1", old, ReportLoadRequest(epoch=1, sequence=9))


def test_instances_missing_from_a_recovering_agent_are_kept_until_it_is_ready() -> None:
    rig = FleetRig()
    rig.connect("a", "b")
    rig.fleet.stream_closed("n1", rig.stream)
    rig.epoch = 2
    rig.connect(state=RECOVERING)
    assert rig.uids() == ["a", "b"], "it does not know its instances yet"
    assert rig.standing() is NodeStanding.DRAINING
    assert not rig.fleet.all_reported()
    rig.send("a", state=RECOVERING)
    rig.send(state=READY)
    assert rig.uids() == ["a"]
    assert InstanceGone("b") in rig.events
    assert rig.fleet.all_reported()


def test_an_older_run_of_the_agent_is_refused() -> None:
    rig = FleetRig()
    rig.epoch = 5
    rig.connect("a")
    rig.stream = rig.fleet.stream_opened("n1")
    with pytest.raises(PreconditionError):
        rig.fleet.receive("n1", rig.stream, ReportLoadRequest(epoch=4, sequence=1))


def test_after_its_hosts_clock_went_back_an_agent_counts_again() -> None:
    rig = FleetRig()
    rig.epoch = 5
    rig.connect("a")
    rig.fleet.stream_closed("n1", rig.stream)
    rig.epoch = 4
    assert rig.connect("a") is not None
    assert rig.standing() is NodeStanding.READY


def test_a_stream_counts_from_its_first_message_on() -> None:
    """Otherwise a silent connection with the same credential would silence the node."""
    rig = FleetRig()
    rig.connect("a")
    late = rig.fleet.stream_opened("n1")
    rig.send("b")
    assert rig.uids() == ["a", "b"]
    newer = rig.fleet.stream_opened("n1")
    for stream in (newer, late):
        message = ReportLoadRequest(epoch=1, sequence=1, snapshot=True)
        message.registration.CopyFrom(Registration(ingress_address="127.0.0.1:1", grpc_address="127.0.0.1:2"))
        if stream is late:
            with pytest.raises(PreconditionError):
                rig.fleet.receive("n1", stream, message)
        else:
            rig.fleet.receive("n1", stream, message)


def test_a_stream_must_register_first() -> None:
    rig = FleetRig()
    stream = rig.fleet.stream_opened("n1")
    with pytest.raises(InvalidArgumentError):
        rig.fleet.receive("n1", stream, ReportLoadRequest(epoch=1, sequence=1, snapshot=True))


def test_known_nodes_are_waited_for_until_they_are_lost() -> None:
    rig = FleetRig()
    rig.fleet.expect("n1")
    rig.fleet.expect("n2")
    assert not rig.fleet.all_reported()
    rig.connect("a")
    assert rig.first_seen == [], "known already"
    assert not rig.fleet.all_reported()
    rig.clock.advance(10 * SECOND_NS)
    rig.fleet.check_silence()
    assert rig.fleet.all_reported()


def test_provisioning_hears_of_changes_and_not_of_heartbeats() -> None:
    rig = FleetRig()
    rig.connect("a")
    before = rig.changes
    rig.send()
    rig.send("a")
    rig.send("a", as_state=FROZEN)
    rig.send("a", as_state=RUNNING)
    assert rig.changes == before, "freezing and waking do not concern provisioning"
    rig.send("a", as_state=Instance.STATE_FAILED)
    assert rig.changes == before + 1


def test_a_node_cannot_speak_about_an_instance_of_another() -> None:
    rig = FleetRig()
    rig.connect("a")
    stream = rig.fleet.stream_opened("n2")
    message = ReportLoadRequest(epoch=1, sequence=1, snapshot=True, load=NodeLoad(state=READY))
    message.registration.CopyFrom(Registration(ingress_address="127.0.0.1:3", grpc_address="127.0.0.1:4"))
    message.instances.add(uid="a", function="ocr", state=Instance.STATE_FAILED)
    rig.events.clear()
    rig.fleet.receive("n2", stream, message)
    rig.fleet.receive("n2", stream, ReportLoadRequest(epoch=1, sequence=2, removed_uids=["a"]))
    assert kinds(rig.events) == [NodeReported]
    load = rig.fleet.instance("a")
    assert load is not None
    assert load.state == RUNNING


@pytest.mark.parametrize("address", ["203.0.113.7:8610", "no port", "127.0.0.1:99999"])
def test_an_address_that_would_reveal_the_token_is_refused(address: str) -> None:
    rig = FleetRig()
    stream = rig.fleet.stream_opened("n1")
    message = ReportLoadRequest(epoch=1, sequence=1, snapshot=True)
    message.registration.CopyFrom(Registration(ingress_address=address, grpc_address="127.0.0.1:2"))
    with pytest.raises(ConfigError):
        rig.fleet.receive("n1", stream, message)
    assert rig.standing() is NodeStanding.SUSPECT
