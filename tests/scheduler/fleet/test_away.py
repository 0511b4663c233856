"""How long a node was given up, in its own clock: from what it says after its return, whatever was under way."""

from __future__ import annotations

from agent.core.billing.absence import NO_END_NS, Absence
from agent.core.dispatch.events import NodeLost
from agent.core.dispatch.model import NodeStanding
from agent.core.types import SECOND_NS
from agent.event_log import EventLog
from agent.scheduler.fleet.fleet import Fleet
from agent.v1.scheduler_service_pb2 import NodeLoad, Registration, ReportLoadRequest
from agent.v1.types_pb2 import Node
from tests.fakes.clock import FakeClock

AHEAD_NS = 5_000 * SECOND_NS
"""The host booted earlier than the scheduler's."""


class Rig:
    """A fleet and its node n1; `noted` are the absences that a database would have to keep first."""

    def __init__(self, *, durable: bool = True) -> None:
        self.clock = FakeClock()
        self.lost = 0
        self.noted: list[str] = []
        self.in_last_boot: list[Absence | None] = []
        self.returned: list[Absence | None] = []
        self.durable = durable
        self.fleet = Fleet(
            self.clock,
            EventLog(self.clock),
            self._event,
            lambda: None,
            3 * SECOND_NS,
            10 * SECOND_NS,
            note_absence=self._note,
            returned=lambda _, absence: self.returned.append(absence),
        )
        self.stream = self.sequence = 0

    def _note(self, name: str, absence: Absence | None) -> None:
        self.noted.append(name)
        self.in_last_boot.append(absence)
        if self.durable:
            self.fleet.give_up(name)

    def _event(self, event: object) -> None:
        self.lost += isinstance(event, NodeLost)

    def connect(self, late_ns: int = 0, boot_id: str = "boot-a") -> None:
        self.stream, self.sequence = self.fleet.stream_opened("n1"), 0
        self.say(late_ns, Registration(boot_id=boot_id, ingress_address="127.0.0.1:1", grpc_address="127.0.0.1:2"))

    def say(self, late_ns: int = 0, registration: Registration | None = None, *, dated: bool = True) -> None:
        """A message that was under way for `late_ns`."""
        self.sequence += 1
        message = ReportLoadRequest(
            epoch=1, sequence=self.sequence, snapshot=True, load=NodeLoad(state=Node.STATE_READY)
        )
        if dated:
            message.monotonic_ns = self.clock.monotonic_ns() + AHEAD_NS - late_ns
        if registration is not None:
            message.registration.CopyFrom(registration)
        self.fleet.receive("n1", self.stream, message)

    def silence(self, seconds: int) -> None:
        for _ in range(seconds):
            self.clock.advance(SECOND_NS)
            self.fleet.check_silence()

    def host_ns(self) -> int:
        return self.clock.monotonic_ns() + AHEAD_NS

    def standing(self) -> NodeStanding:
        node = self.fleet.node("n1")
        assert node is not None
        return node.standing


def test_an_absence_lasts_from_the_loss_to_the_return_in_the_clock_of_the_host() -> None:
    rig = Rig()
    rig.connect()
    rig.silence(10)
    lost_at = rig.host_ns()
    assert (rig.lost, rig.noted) == (1, ["n1"])
    rig.silence(806)
    back_at = rig.host_ns()
    rig.connect(late_ns=7 * SECOND_NS)
    assert rig.standing() is NodeStanding.READY
    rig.clock.advance(SECOND_NS // 2)
    rig.say()
    assert rig.returned == [], "its clock is still being compared"
    rig.clock.advance(SECOND_NS // 2)
    rig.say(late_ns=SECOND_NS)
    assert rig.returned == [Absence("boot-a", lost_at, back_at)], "what was under way for long does not move it"
    rig.say()
    assert len(rig.returned) == 1


def test_in_the_boot_in_which_it_was_last_heard_an_absence_lasts_to_the_end() -> None:
    """Whether the host is rebooted before it is back is not known when it is given up."""
    rig = Rig()
    rig.connect(late_ns=7 * SECOND_NS)
    rig.say()
    rig.silence(10)
    lost_at = rig.host_ns()
    rig.connect(boot_id="boot-b")
    rig.silence(1)
    rig.say()
    assert rig.in_last_boot == [Absence("boot-a", lost_at, NO_END_NS)]
    assert [absence.boot_id for absence in rig.returned if absence is not None] == ["boot-b"]


def test_a_short_silence_is_no_absence() -> None:
    rig = Rig()
    rig.connect()
    rig.silence(9)
    rig.connect()
    rig.silence(1)
    rig.say()
    assert (rig.lost, rig.noted, rig.returned) == (0, [], [])


def test_a_node_is_lost_only_after_that_is_noted() -> None:
    rig = Rig(durable=False)
    rig.connect()
    rig.silence(12)
    assert (rig.lost, rig.noted, rig.standing()) == (0, ["n1"], NodeStanding.SUSPECT)
    rig.fleet.give_up("n1")
    assert (rig.lost, rig.standing()) == (1, NodeStanding.LOST)


def test_a_node_that_is_heard_while_that_is_being_noted_is_not_lost_and_the_note_is_ended() -> None:
    rig = Rig(durable=False)
    rig.connect()
    rig.silence(10)
    lost_at = rig.host_ns()
    rig.say()
    rig.fleet.give_up("n1")
    assert (rig.lost, rig.standing()) == (0, NodeStanding.READY)
    rig.clock.advance(SECOND_NS)
    rig.say()
    assert rig.returned == [Absence("boot-a", lost_at, lost_at)]


def test_a_node_that_goes_again_before_its_return_is_measured_was_away_all_the_time() -> None:
    rig = Rig()
    rig.connect()
    rig.silence(10)
    lost_at = rig.host_ns()
    rig.silence(100)
    rig.connect()
    rig.silence(20)
    assert (rig.lost, rig.noted) == (2, ["n1", "n1"])
    back_at = rig.host_ns()
    rig.connect()
    rig.silence(1)
    rig.say()
    assert rig.returned == [Absence("boot-a", lost_at, back_at)]


def test_a_restarted_scheduler_goes_on_with_an_absence_that_had_no_end() -> None:
    rig = Rig()
    rig.fleet.expect("n1", away_ns=300 * SECOND_NS)
    lost_at = rig.host_ns() - 300 * SECOND_NS
    rig.silence(2)
    back_at = rig.host_ns()
    rig.connect()
    rig.silence(1)
    rig.say()
    assert (rig.lost, rig.returned) == (0, [Absence("boot-a", lost_at, back_at)])


def test_nodes_that_outlived_a_restart_of_the_scheduler_were_not_away() -> None:
    rig = Rig()
    rig.fleet.expect("n1")
    rig.silence(5)
    rig.connect()
    rig.silence(2)
    rig.say()
    assert (rig.lost, rig.returned) == (0, [])


def test_an_agent_that_does_not_say_its_time_ends_the_absence_without_a_date() -> None:
    rig = Rig()
    rig.connect()
    rig.silence(10)
    rig.say(dated=False)
    rig.silence(1)
    rig.say(dated=False)
    assert rig.returned == [None]
    rig.silence(10)
    assert rig.in_last_boot[-1] is None
