"""What the scheduler believes of its nodes: gaps, silence, restarts of an agent."""

from __future__ import annotations

import pytest

from agent.core.dispatch.events import Event, InstanceGone, InstanceReported, NodeLost, NodeReported, NodeSuspect
from agent.core.dispatch.model import NodeStanding
from agent.core.errors import ConfigError, InvalidArgumentError, PreconditionError
from agent.core.types import SECOND_NS
from agent.scheduler.fleet.fleet import UNREACHABLE_NS, Fleet
from agent.v1.scheduler_service_pb2 import (
    InstanceLoad,
    NodeLoad,
    Registration,
    ReportLoadRequest,
    ReportLoadResponse,
)
from agent.v1.types_pb2 import Gpu, Instance, Node
from tests.fakes.clock import FakeClock

READY, RECOVERING = Node.STATE_READY, Node.STATE_RECOVERING
RUNNING, FROZEN = Instance.STATE_RUNNING, Instance.STATE_FROZEN


class Story:
    """A fleet, one agent called n1, and what the dispatcher was told."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.told: list[Event] = []
        self.changes = 0
        self.met: list[str] = []
        self.fleet = Fleet(self.clock, self.told.append, self._change, 3 * SECOND_NS, 10 * SECOND_NS, self.met.append)
        self.sequence = 0
        self.stream = 0
        self.epoch = 1

    def _change(self) -> None:
        self.changes += 1

    def connect(self, *uids: str, state: Node.State.ValueType = READY, name: str = "n1") -> ReportLoadResponse | None:
        self.stream = self.fleet.stream_opened(name)
        self.sequence = 0
        return self.say(*uids, snapshot=True, state=state, register=True)

    def say(
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
        self.told.clear()
        return self.fleet.receive("n1", self.stream, message)

    def asked_for_all(self, *uids: str, snapshot: bool = False) -> bool:
        answer = self.say(*uids, snapshot=snapshot)
        assert answer is not None, "what matters is answered"
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
    story = Story()
    answer = story.connect("a", "b")
    assert answer is not None
    assert (answer.node, answer.acknowledged_sequence, answer.resync) == ("n1", 1, False)
    assert kinds(story.told) == [InstanceReported, InstanceReported, NodeReported]
    reported = story.told[-1]
    assert isinstance(reported, NodeReported)
    assert (reported.gpu_count, reported.draining) == (1, False), "cordoned GPUs do not count"
    assert story.met == ["n1"]
    assert story.fleet.all_reported()


def test_after_a_gap_deltas_are_ignored_until_the_snapshot() -> None:
    story = Story()
    story.connect("a")
    story.sequence += 1  # one message is lost
    assert story.asked_for_all("b")
    assert story.uids() == ["a"]
    assert kinds(story.told) == [NodeReported], "heartbeats count all the same"
    assert story.asked_for_all("c")
    assert not story.asked_for_all("b", "c", snapshot=True)
    assert story.uids() == ["b", "c"]
    assert InstanceGone("a") in story.told


def test_removed_instances_are_gone() -> None:
    story = Story()
    story.connect("a", "b")
    story.say(removed=("a",))
    assert story.told[0] == InstanceGone("a")
    assert story.uids() == ["b"]


def test_a_silent_node_is_suspect_then_lost_until_a_heartbeat() -> None:
    story = Story()
    story.connect("a")
    story.told.clear()
    story.clock.advance(3 * SECOND_NS - 1)
    story.fleet.check_silence()
    assert story.told == []
    story.clock.advance(1)
    story.fleet.check_silence()
    assert story.told == [NodeSuspect("n1")]
    story.clock.advance(7 * SECOND_NS)
    story.fleet.check_silence()
    story.fleet.check_silence()
    assert story.told == [NodeSuspect("n1"), NodeLost("n1")]
    assert story.uids() == ["a"], "it is counted out, not forgotten"
    story.say()
    assert kinds(story.told) == [NodeReported]
    assert story.standing() is NodeStanding.READY


def test_a_node_is_suspect_when_its_stream_ends_or_refuses_a_connection() -> None:
    story = Story()
    story.connect("a")
    story.fleet.unreachable("n1")
    assert story.standing() is NodeStanding.SUSPECT
    story.say()
    assert story.standing() is NodeStanding.SUSPECT, "a message that was under way when it died"
    story.clock.advance(UNREACHABLE_NS)
    story.say(state=None)
    assert story.standing() is NodeStanding.READY, "any message of a ready node is a sign of life"
    story.fleet.stream_closed("n1", story.stream)
    assert story.standing() is NodeStanding.SUSPECT


def test_the_end_of_an_old_stream_does_not_affect_the_new_one() -> None:
    story = Story()
    story.connect("a")
    old = story.stream
    story.connect("a")
    story.fleet.stream_closed("n1", old)
    assert story.standing() is NodeStanding.READY
    with pytest.raises(PreconditionError):
        story.fleet.receive("n1", old, ReportLoadRequest(epoch=1, sequence=9))


def test_instances_missing_from_a_recovering_agent_are_kept_until_it_is_ready() -> None:
    story = Story()
    story.connect("a", "b")
    story.fleet.stream_closed("n1", story.stream)
    story.epoch = 2
    story.connect(state=RECOVERING)
    assert story.uids() == ["a", "b"], "it has not looked yet"
    assert story.standing() is NodeStanding.DRAINING
    assert not story.fleet.all_reported()
    story.say("a", state=RECOVERING)
    story.say(state=READY)
    assert story.uids() == ["a"]
    assert InstanceGone("b") in story.told
    assert story.fleet.all_reported()


def test_an_older_run_of_the_agent_is_refused() -> None:
    story = Story()
    story.epoch = 5
    story.connect("a")
    story.stream = story.fleet.stream_opened("n1")
    with pytest.raises(PreconditionError):
        story.fleet.receive("n1", story.stream, ReportLoadRequest(epoch=4, sequence=1))


def test_after_its_hosts_clock_went_back_an_agent_counts_again() -> None:
    story = Story()
    story.epoch = 5
    story.connect("a")
    story.fleet.stream_closed("n1", story.stream)
    story.epoch = 4
    assert story.connect("a") is not None
    assert story.standing() is NodeStanding.READY


def test_a_stream_counts_from_its_first_message_on() -> None:
    """Or whoever connects with the same credential and says nothing would silence the node."""
    story = Story()
    story.connect("a")
    late = story.fleet.stream_opened("n1")
    story.say("b")
    assert story.uids() == ["a", "b"]
    newer = story.fleet.stream_opened("n1")
    for stream in (newer, late):
        message = ReportLoadRequest(epoch=1, sequence=1, snapshot=True)
        message.registration.CopyFrom(Registration(ingress_address="127.0.0.1:1", grpc_address="127.0.0.1:2"))
        if stream is late:
            with pytest.raises(PreconditionError):
                story.fleet.receive("n1", stream, message)
        else:
            story.fleet.receive("n1", stream, message)


def test_a_stream_must_register_first() -> None:
    story = Story()
    stream = story.fleet.stream_opened("n1")
    with pytest.raises(InvalidArgumentError):
        story.fleet.receive("n1", stream, ReportLoadRequest(epoch=1, sequence=1, snapshot=True))


def test_known_nodes_are_waited_for_until_they_are_lost() -> None:
    story = Story()
    story.fleet.expect("n1")
    story.fleet.expect("n2")
    assert not story.fleet.all_reported()
    story.connect("a")
    assert story.met == [], "known already"
    assert not story.fleet.all_reported()
    story.clock.advance(10 * SECOND_NS)
    story.fleet.check_silence()
    assert story.fleet.all_reported()


def test_provisioning_hears_of_changes_and_not_of_heartbeats() -> None:
    story = Story()
    story.connect("a")
    before = story.changes
    story.say()
    story.say("a")
    story.say("a", as_state=FROZEN)
    story.say("a", as_state=RUNNING)
    assert story.changes == before, "sleeping and waking are no news: it is there"
    story.say("a", as_state=Instance.STATE_FAILED)
    assert story.changes == before + 1


def test_a_node_cannot_speak_about_an_instance_of_another() -> None:
    story = Story()
    story.connect("a")
    stream = story.fleet.stream_opened("n2")
    message = ReportLoadRequest(epoch=1, sequence=1, snapshot=True, load=NodeLoad(state=READY))
    message.registration.CopyFrom(Registration(ingress_address="127.0.0.1:3", grpc_address="127.0.0.1:4"))
    message.instances.add(uid="a", function="ocr", state=Instance.STATE_FAILED)
    story.told.clear()
    story.fleet.receive("n2", stream, message)
    story.fleet.receive("n2", stream, ReportLoadRequest(epoch=1, sequence=2, removed_uids=["a"]))
    assert kinds(story.told) == [NodeReported]
    load = story.fleet.instance("a")
    assert load is not None
    assert load.state == RUNNING


@pytest.mark.parametrize("address", ["203.0.113.7:8610", "no port", "127.0.0.1:99999"])
def test_an_address_that_would_reveal_the_token_is_refused(address: str) -> None:
    story = Story()
    stream = story.fleet.stream_opened("n1")
    message = ReportLoadRequest(epoch=1, sequence=1, snapshot=True)
    message.registration.CopyFrom(Registration(ingress_address=address, grpc_address="127.0.0.1:2"))
    with pytest.raises(ConfigError):
        story.fleet.receive("n1", stream, message)
    assert story.standing() is NodeStanding.SUSPECT
