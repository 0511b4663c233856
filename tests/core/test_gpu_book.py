"""The GPU book's rules, one story each (DESIGN section 3)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from agent.core import gpu_book as gb
from agent.core.types import MILLISECOND_NS, SECOND_NS

HOLD = 10 * SECOND_NS


@dataclass
class Desk:
    """A book and the effects of the last event."""

    gpus: int = 1
    per_gpu: int = 8
    at: int = 0
    book: gb.Book = field(init=False)

    def __post_init__(self) -> None:
        devices = {name: gb.Device(name, "L20") for name in "ABCDEF"[: self.gpus]}
        self.book = gb.Book(devices, per_gpu=self.per_gpu, max_hold_ns=HOLD)

    def __call__(self, event: gb.BookEvent, after_ns: int = 0) -> list[gb.BookEffect]:
        self.at += after_ns
        self.book, effects = gb.step(self.book, event, self.at)
        return effects

    def member(self, uid: str, *gpus: str) -> None:
        """Assigned to these GPUs, holding none."""
        self(gb.Adopt(uid, gpus, holds=False))

    def holding(self, uid: str, *gpus: str) -> None:
        self(gb.Adopt(uid, gpus, holds=True))

    def idle(self, uid: str, preemptible_at_ns: int = 0) -> list[gb.BookEffect]:
        return self(gb.BecameIdle(uid, preemptible_at_ns))

    def gives_way(self, uid: str) -> list[gb.BookEffect]:
        self(gb.Releasing(uid))
        return self(gb.Released(uid))


def only(kind: type, effects: list[gb.BookEffect]) -> list[str]:
    return [effect.uid for effect in effects if isinstance(effect, kind) and not isinstance(effect, gb.WakeMeAt)]


def test_instances_spread_before_they_share_and_the_rest_is_told_why_not() -> None:
    desk = Desk(gpus=2, per_gpu=2)
    chosen = []
    for uid in ("a", "b", "c", "d"):
        (answer,) = desk(gb.Assign(uid, 1, ""))
        assert isinstance(answer, gb.Assigned)
        chosen.append(answer.gpus[0])
    assert chosen == ["A", "B", "A", "B"]
    (refusal,) = desk(gb.Assign("e", 1, ""))
    assert isinstance(refusal, gb.Unassignable)
    assert "gpu.instances_per_gpu: 2" in refusal.message
    desk(gb.Unassign("c"))
    assert desk(gb.Assign("e", 1, "")) == [gb.Assigned("e", ("A",))]


def test_a_repeated_assignment_is_the_same_one() -> None:
    desk = Desk(gpus=2)
    first = desk(gb.Assign("a", 1, ""))
    assert desk(gb.Assign("a", 1, "")) == first


def test_only_the_model_that_was_asked_for() -> None:
    (answer,) = Desk()(gb.Assign("a", 1, "H100"))
    assert isinstance(answer, gb.Unassignable)
    assert "'H100'" in answer.message


def test_without_a_gpu_nothing_is_waited_for() -> None:
    desk = Desk()
    desk(gb.Assign("cpu", 0, ""))
    assert desk(gb.Ask("cpu")) == [gb.Grant("cpu", ())]


def test_first_come_first_served() -> None:
    desk = Desk()
    desk.holding("now", "A")
    for uid in ("first", "second"):
        desk.member(uid, "A")
        desk(gb.Ask(uid), after_ns=1)
    assert desk.gives_way("now")[0] == gb.Grant("first", ("A",))
    assert desk.gives_way("first") == [gb.Grant("second", ("A",))]


def test_all_or_nothing_and_what_the_head_needs_is_kept_for_it() -> None:
    desk = Desk(gpus=2)
    desk.holding("busy", "B")
    desk.member("pair", "A", "B")
    desk.member("single", "A")
    desk(gb.Ask("pair"))
    assert desk.book.devices["A"].holder == "", "nobody holds one GPU while waiting for the other"
    assert only(gb.Grant, desk(gb.Ask("single"))) == [], "A is free but kept for the head"
    assert desk.gives_way("busy")[0] == gb.Grant("pair", ("A", "B"))


def test_later_waiters_may_use_what_the_head_cannot() -> None:
    desk = Desk(gpus=2)
    desk.holding("busy", "A")
    desk.member("head", "A")
    desk.member("other", "B")
    desk(gb.Ask("head"))
    assert desk(gb.Ask("other"))[0] == gb.Grant("other", ("B",))


def test_the_victim_is_the_one_idle_for_longest() -> None:
    desk = Desk(gpus=2)
    desk.holding("early", "A")
    desk.holding("late", "B")
    desk.idle("late")
    desk.at += 5
    desk.idle("early")
    desk(gb.Adopt("both", ("A", "B"), holds=False))
    desk.member("one", "A", "B")
    desk.book = replace(
        desk.book, queue=(gb.Waiter("one", 1, ("A", "B"), desk.at),)
    )  # may use either: as with migration
    assert only(gb.AskFreeze, desk(gb.Tick())) == ["late"]


def test_one_victim_is_enough_and_is_asked_once() -> None:
    desk = Desk()
    desk.holding("idle", "A")
    desk.idle("idle")
    desk.member("waiter", "A")
    assert only(gb.AskFreeze, desk(gb.Ask("waiter"))) == ["idle"]
    assert only(gb.AskFreeze, desk(gb.Tick())) == []


def test_min_awake_protects_and_the_book_asks_to_be_woken_then() -> None:
    desk = Desk()
    desk.holding("fresh", "A")
    desk.idle("fresh", preemptible_at_ns=3 * SECOND_NS)
    desk.member("waiter", "A")
    assert desk(gb.Ask("waiter")) == [gb.WakeMeAt(3 * SECOND_NS)]
    assert desk(gb.Tick(), after_ns=3 * SECOND_NS) == [gb.AskFreeze("fresh")]


def test_a_victim_that_refuses_is_left_alone_for_a_while_and_the_next_is_asked() -> None:
    desk = Desk(gpus=2)
    for uid, gpu in (("stubborn", "A"), ("kind", "B")):
        desk.holding(uid, gpu)
        desk.idle(uid)
        desk.at += 1
    desk.member("waiter", "A")
    desk.book = replace(desk.book, queue=(gb.Waiter("waiter", 1, ("A", "B"), desk.at),))
    assert only(gb.AskFreeze, desk(gb.Tick())) == ["stubborn"]
    assert only(gb.AskFreeze, desk(gb.FreezeRefused("stubborn"))) == ["kind"]


def test_a_lone_victim_that_refused_is_asked_again_after_a_second() -> None:
    desk = Desk()
    desk.holding("stubborn", "A")
    desk.idle("stubborn")
    desk.member("waiter", "A")
    desk(gb.Ask("waiter"))
    assert desk(gb.FreezeRefused("stubborn")) == [gb.WakeMeAt(desk.at + gb.REFUSAL_BACK_OFF_NS)]
    assert desk(gb.Tick(), after_ns=gb.REFUSAL_BACK_OFF_NS) == [gb.AskFreeze("stubborn")]


def test_a_busy_holder_is_drained_only_after_max_hold() -> None:
    desk = Desk()
    desk.holding("busy", "A")
    desk.member("waiter", "A")
    assert desk(gb.Ask("waiter")) == [gb.WakeMeAt(HOLD)]
    assert desk(gb.Tick(), after_ns=HOLD - MILLISECOND_NS) == [gb.WakeMeAt(HOLD)]
    assert desk(gb.Tick(), after_ns=MILLISECOND_NS) == [gb.AskDrain("busy")]


def test_a_holder_that_becomes_idle_meanwhile_gives_way_at_once() -> None:
    desk = Desk()
    desk.holding("busy", "A")
    desk.member("waiter", "A")
    desk(gb.Ask("waiter"))
    assert desk.idle("busy") == [gb.AskFreeze("busy")]
    assert desk(gb.BecameBusy("busy")) == []


def test_a_gpu_changes_hands_on_proof_not_on_state() -> None:
    desk = Desk()
    desk.holding("leaving", "A")
    desk.member("waiter", "A")
    desk(gb.Releasing("leaving"))
    assert desk(gb.Ask("waiter")) == [], "it is being vacated: nobody is asked, nobody is granted"
    assert desk.book.devices["A"].holder == "leaving"
    assert desk(gb.Released("leaving")) == [gb.Grant("waiter", ("A",))]


def test_an_instance_may_want_its_gpu_back_while_the_proof_of_its_release_is_on_its_way() -> None:
    desk = Desk()
    desk.holding("a", "A")
    desk(gb.Releasing("a"))
    desk(gb.Ask("a"))
    assert desk(gb.Released("a")) == [gb.Grant("a", ("A",))]


def test_who_leaves_the_queue_is_not_served() -> None:
    desk = Desk()
    desk.holding("now", "A")
    for uid in ("gone", "next"):
        desk.member(uid, "A")
        desk(gb.Ask(uid))
    desk(gb.Leave("gone"))
    assert desk.gives_way("now") == [gb.Grant("next", ("A",))]


def test_nothing_new_gets_a_cordoned_gpu_until_it_is_lifted() -> None:
    desk = Desk()
    desk.member("waiter", "A")
    desk(gb.Cordon("A", "XID 79"))
    assert desk(gb.Ask("waiter")) == []
    assert isinstance(desk(gb.Assign("new", 1, ""))[0], gb.Unassignable)
    assert desk(gb.Cordon("A", "")) == [gb.Grant("waiter", ("A",))]


def test_a_cordon_of_a_gpu_that_is_not_ours_is_nothing() -> None:
    assert Desk()(gb.Cordon("GPU-of-another-agent", "DRIVER_STUCK")) == []


def test_a_head_that_waits_for_a_cordoned_gpu_holds_up_nobody() -> None:
    desk = Desk(gpus=2)
    desk.holding("idle", "A")
    desk.idle("idle")
    desk.member("pair", "A", "B")
    desk.member("single", "A")
    desk(gb.Cordon("B", "XID 79"))
    assert desk(gb.Ask("pair")) == [], "nobody gives way for what can't be served"
    assert desk(gb.Ask("single")) == [gb.AskFreeze("idle")]
    assert desk.gives_way("idle") == [gb.Grant("single", ("A",))]


def test_nobody_gives_way_to_a_waiter_that_must_wait_for_another_anyway() -> None:
    desk = Desk(gpus=3)
    desk.holding("busy", "A")
    desk.holding("idle", "C")
    desk.idle("idle")
    desk.member("head", "A", "B")
    desk.member("second", "B", "C")
    desk(gb.Ask("head"))
    assert desk(gb.Ask("second")) == [gb.WakeMeAt(HOLD)], "B goes to the head first: C may stay awake"
    assert desk.gives_way("busy")[0] == gb.Grant("head", ("A", "B"))
    assert set(only(gb.AskFreeze, desk.idle("head"))) == {"idle", "head"}, "now both are to be had"


def test_an_unknown_holder_changes_nothing() -> None:
    desk = Desk()
    before = desk.book
    for event in (gb.Released("x"), gb.Releasing("x"), gb.FreezeRefused("x"), gb.BecameBusy("x"), gb.Unassign("x")):
        assert desk(event) == []
    assert desk.book == before
