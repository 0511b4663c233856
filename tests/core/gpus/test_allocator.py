"""The GPU book's rules, one story each (DESIGN section 3)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from agent.core.gpus import allocator as gb
from agent.core.gpus import allocator_events as bev
from agent.core.types import MILLISECOND_NS, SECOND_NS

HOLD = 10 * SECOND_NS


@dataclass
class Desk:
    """A book and the effects of the last event."""

    gpus: int = 1
    per_gpu: int = 8
    migrate: bool = False
    at: int = 0
    book: gb.GpuAllocator = field(init=False)

    def __post_init__(self) -> None:
        devices = {name: gb.AllocatableGpu(name, "L20") for name in "ABCDEF"[: self.gpus]}
        self.book = gb.GpuAllocator(devices, per_gpu=self.per_gpu, max_hold_ns=HOLD, migrate=self.migrate)

    def __call__(self, event: bev.AllocatorEvent, after_ns: int = 0) -> list[bev.AllocatorEffect]:
        self.at += after_ns
        self.book, effects = gb.step(self.book, event, self.at)
        return effects

    def member(self, uid: str, *gpus: str) -> None:
        """Assigned to these GPUs, holding none."""
        self(bev.Adopt(uid, gpus, holds=False))

    def holding(self, uid: str, *gpus: str) -> None:
        self(bev.Adopt(uid, gpus, holds=True))

    def idle(self, uid: str, preemptible_at_ns: int = 0) -> list[bev.AllocatorEffect]:
        return self(bev.BecameIdle(uid, preemptible_at_ns))

    def gives_way(self, uid: str) -> list[bev.AllocatorEffect]:
        self(bev.Releasing(uid))
        return self(bev.Released(uid))


def only(kind: type, effects: list[bev.AllocatorEffect]) -> list[str]:
    return [effect.uid for effect in effects if isinstance(effect, kind) and not isinstance(effect, bev.WakeMeAt)]


def test_instances_spread_before_they_share_and_the_rest_is_told_why_not() -> None:
    desk = Desk(gpus=2, per_gpu=2)
    chosen = []
    for uid in ("a", "b", "c", "d"):
        (answer,) = desk(bev.Assign(uid, 1, ""))
        assert isinstance(answer, bev.Assigned)
        chosen.append(answer.gpus[0])
    assert chosen == ["A", "B", "A", "B"]
    (refusal,) = desk(bev.Assign("e", 1, ""))
    assert isinstance(refusal, bev.Unassignable)
    assert "gpu.instances_per_gpu: 2" in refusal.message
    desk(bev.Unassign("c"))
    assert desk(bev.Assign("e", 1, "")) == [bev.Assigned("e", ("A",))]


def test_a_repeated_assignment_is_the_same_one() -> None:
    desk = Desk(gpus=2)
    first = desk(bev.Assign("a", 1, ""))
    assert desk(bev.Assign("a", 1, "")) == first


def test_only_the_model_that_was_asked_for() -> None:
    (answer,) = Desk()(bev.Assign("a", 1, "H100"))
    assert isinstance(answer, bev.Unassignable)
    assert "'H100'" in answer.message


def test_without_a_gpu_nothing_is_waited_for() -> None:
    desk = Desk()
    desk(bev.Assign("cpu", 0, ""))
    assert desk(bev.Ask("cpu")) == [bev.Grant("cpu", ())]


def test_first_come_first_served() -> None:
    desk = Desk()
    desk.holding("now", "A")
    for uid in ("first", "second"):
        desk.member(uid, "A")
        desk(bev.Ask(uid), after_ns=1)
    assert desk.gives_way("now")[0] == bev.Grant("first", ("A",))
    assert desk.gives_way("first") == [bev.Grant("second", ("A",))]


def test_all_or_nothing_and_what_the_head_needs_is_kept_for_it() -> None:
    desk = Desk(gpus=2)
    desk.holding("busy", "B")
    desk.member("pair", "A", "B")
    desk.member("single", "A")
    desk(bev.Ask("pair"))
    assert desk.book.devices["A"].holder == "", "nobody holds one GPU while waiting for the other"
    assert only(bev.Grant, desk(bev.Ask("single"))) == [], "A is free but kept for the head"
    assert desk.gives_way("busy")[0] == bev.Grant("pair", ("A", "B"))


def test_later_waiters_may_use_what_the_head_cannot() -> None:
    desk = Desk(gpus=2)
    desk.holding("busy", "A")
    desk.member("head", "A")
    desk.member("other", "B")
    desk(bev.Ask("head"))
    assert desk(bev.Ask("other"))[0] == bev.Grant("other", ("B",))


def test_the_victim_is_the_one_idle_for_longest() -> None:
    desk = Desk(gpus=2)
    desk.holding("early", "A")
    desk.holding("late", "B")
    desk.idle("late")
    desk.at += 5
    desk.idle("early")
    desk(bev.Adopt("both", ("A", "B"), holds=False))
    desk.member("one", "A", "B")
    desk.book = replace(
        desk.book, queue=(gb.Waiter("one", 1, ("A", "B"), desk.at),)
    )  # may use either: as with migration
    assert only(bev.AskFreeze, desk(bev.Tick())) == ["late"]


def test_one_victim_is_enough_and_is_asked_once() -> None:
    desk = Desk()
    desk.holding("idle", "A")
    desk.idle("idle")
    desk.member("waiter", "A")
    assert only(bev.AskFreeze, desk(bev.Ask("waiter"))) == ["idle"]
    assert only(bev.AskFreeze, desk(bev.Tick())) == []


def test_min_awake_protects_and_the_book_asks_to_be_woken_then() -> None:
    desk = Desk()
    desk.holding("fresh", "A")
    desk.idle("fresh", preemptible_at_ns=3 * SECOND_NS)
    desk.member("waiter", "A")
    assert desk(bev.Ask("waiter")) == [bev.WakeMeAt(3 * SECOND_NS)]
    assert desk(bev.Tick(), after_ns=3 * SECOND_NS) == [bev.AskFreeze("fresh")]


def test_a_victim_that_refuses_is_left_alone_for_a_while_and_the_next_is_asked() -> None:
    desk = Desk(gpus=2)
    for uid, gpu in (("stubborn", "A"), ("kind", "B")):
        desk.holding(uid, gpu)
        desk.idle(uid)
        desk.at += 1
    desk.member("waiter", "A")
    desk.book = replace(desk.book, queue=(gb.Waiter("waiter", 1, ("A", "B"), desk.at),))
    assert only(bev.AskFreeze, desk(bev.Tick())) == ["stubborn"]
    assert only(bev.AskFreeze, desk(bev.FreezeRefused("stubborn"))) == ["kind"]


def test_a_lone_victim_that_refused_is_asked_again_after_a_second() -> None:
    desk = Desk()
    desk.holding("stubborn", "A")
    desk.idle("stubborn")
    desk.member("waiter", "A")
    desk(bev.Ask("waiter"))
    assert desk(bev.FreezeRefused("stubborn")) == [bev.WakeMeAt(desk.at + gb.REFUSAL_BACK_OFF_NS)]
    assert desk(bev.Tick(), after_ns=gb.REFUSAL_BACK_OFF_NS) == [bev.AskFreeze("stubborn")]


def test_a_busy_holder_is_drained_only_after_max_hold() -> None:
    desk = Desk()
    desk.holding("busy", "A")
    desk.member("waiter", "A")
    assert desk(bev.Ask("waiter")) == [bev.WakeMeAt(HOLD)]
    assert desk(bev.Tick(), after_ns=HOLD - MILLISECOND_NS) == [bev.WakeMeAt(HOLD)]
    assert desk(bev.Tick(), after_ns=MILLISECOND_NS) == [bev.AskDrain("busy")]


def test_a_holder_that_becomes_idle_meanwhile_gives_way_at_once() -> None:
    desk = Desk()
    desk.holding("busy", "A")
    desk.member("waiter", "A")
    desk(bev.Ask("waiter"))
    assert desk.idle("busy") == [bev.AskFreeze("busy")]
    assert desk(bev.BecameBusy("busy")) == []


def test_a_gpu_changes_hands_on_proof_not_on_state() -> None:
    desk = Desk()
    desk.holding("leaving", "A")
    desk.member("waiter", "A")
    desk(bev.Releasing("leaving"))
    assert desk(bev.Ask("waiter")) == [], "it is being vacated: nobody is asked, nobody is granted"
    assert desk.book.devices["A"].holder == "leaving"
    assert desk(bev.Released("leaving")) == [bev.Grant("waiter", ("A",))]


def test_who_gave_a_gpu_up_may_have_it_back_before_it_is_proven_free() -> None:
    desk = Desk()
    desk.holding("a", "A")
    desk(bev.Releasing("a"))
    assert desk(bev.Ask("a")) == [bev.Grant("a", ("A",))], "what may still be there is its own"
    assert not desk.book.holders["a"].leaving


def test_but_not_if_somebody_was_first() -> None:
    desk = Desk()
    desk.holding("a", "A")
    desk.member("first", "A")
    desk(bev.Ask("first"))
    desk(bev.Releasing("a"))
    assert only(bev.Grant, desk(bev.Ask("a"))) == []
    assert only(bev.Grant, desk(bev.Released("a"))) == ["first"]


def test_nor_if_it_is_cordoned_meanwhile() -> None:
    desk = Desk()
    desk.holding("a", "A")
    desk(bev.Releasing("a"))
    desk(bev.Cordon("A", "NVML_ERROR", "health", lasting=False))
    assert desk(bev.Ask("a")) == []
    desk(bev.Released("a"))
    assert desk(bev.Uncordon("A", "health")) == [bev.Grant("a", ("A",))]


def test_who_leaves_the_queue_is_not_served() -> None:
    desk = Desk()
    desk.holding("now", "A")
    for uid in ("gone", "next"):
        desk.member(uid, "A")
        desk(bev.Ask(uid))
    desk(bev.Leave("gone"))
    assert desk.gives_way("now") == [bev.Grant("next", ("A",))]


def test_nothing_new_gets_a_cordoned_gpu_until_it_is_lifted() -> None:
    desk = Desk()
    desk.member("waiter", "A")
    desk(bev.Cordon("A", "XID 79", "xid", lasting=False))
    assert desk(bev.Ask("waiter")) == []
    assert isinstance(desk(bev.Assign("new", 1, ""))[0], bev.Unassignable)
    assert desk(bev.Uncordon("A", "xid")) == [bev.Grant("waiter", ("A",))]


def test_a_cordon_of_a_gpu_that_is_not_ours_is_nothing() -> None:
    assert Desk()(bev.Cordon("GPU-of-another-agent", "DRIVER_STUCK", "driver", lasting=True)) == []


def test_a_head_that_waits_for_a_cordoned_gpu_holds_up_nobody() -> None:
    desk = Desk(gpus=2)
    desk.holding("idle", "A")
    desk.idle("idle")
    desk.member("pair", "A", "B")
    desk.member("single", "A")
    desk(bev.Cordon("B", "XID 79", "xid", lasting=False))
    assert desk(bev.Ask("pair")) == [], "nobody gives way for what can't be served"
    assert desk(bev.Ask("single")) == [bev.AskFreeze("idle")]
    assert desk.gives_way("idle") == [bev.Grant("single", ("A",))]


def test_nobody_gives_way_to_a_waiter_that_must_wait_for_another_anyway() -> None:
    desk = Desk(gpus=3)
    desk.holding("busy", "A")
    desk.holding("idle", "C")
    desk.idle("idle")
    desk.member("head", "A", "B")
    desk.member("second", "B", "C")
    desk(bev.Ask("head"))
    assert desk(bev.Ask("second")) == [bev.WakeMeAt(HOLD)], "B goes to the head first: C may stay awake"
    assert desk.gives_way("busy")[0] == bev.Grant("head", ("A", "B"))
    assert set(only(bev.AskFreeze, desk.idle("head"))) == {"idle", "head"}, "now both are to be had"


def test_an_unknown_holder_changes_nothing() -> None:
    desk = Desk()
    before = desk.book
    kinds = (bev.Released, bev.Releasing, bev.FreezeRefused, bev.BecameBusy, bev.Unassign)
    for event in (kind("x") for kind in kinds):
        assert desk(event) == []
    assert desk.book == before


def test_each_source_has_a_cordon_of_its_own_and_all_must_be_lifted() -> None:
    desk = Desk()
    desk.member("waiter", "A")
    desk(bev.Cordon("A", "RELEASE_NOT_PROVEN", "i-1", lasting=False))
    desk(bev.Cordon("A", "NVML_ERROR", "health", lasting=False))
    assert desk.book.devices["A"].cordoned == "RELEASE_NOT_PROVEN; NVML_ERROR"
    desk(bev.Ask("waiter"))
    assert desk(bev.Uncordon("A", "i-1")) == []
    assert desk(bev.Uncordon("A", "health")) == [bev.Grant("waiter", ("A",))]


def test_who_waits_for_a_gpu_that_is_lost_is_told_so_and_waits_no_longer() -> None:
    desk = Desk(gpus=2)
    desk.member("early", "A")
    desk.member("late", "A")
    desk.holding("now", "A")
    desk(bev.Ask("early"))
    (told,) = desk(bev.Cordon("A", "XID 79", "xid", lasting=True))
    assert told == bev.Unservable("early", "A: XID 79")
    assert desk.book.queue == ()
    assert only(bev.Unservable, desk(bev.Ask("late"))) == ["late"]


def test_with_migration_a_free_gpu_of_the_same_model_serves_as_well() -> None:
    desk = Desk(gpus=2, migrate=True)
    desk.holding("busy", "A")
    desk.member("asleep", "A")
    assert desk(bev.Ask("asleep")) == [bev.Grant("asleep", ("B",))]
    assert desk.book.assigned["asleep"] == ("B",), "its image will lie there next"


def test_with_migration_a_sleeper_that_sees_only_its_own_gpu_waits_for_that() -> None:
    desk = Desk(gpus=2, migrate=True)
    desk.holding("busy", "A")
    desk.member("asleep", "A")
    assert only(bev.Grant, desk(bev.Ask("asleep", stays=True))) == [], "the other GPU is free and no use to it"


def test_with_migration_its_own_gpu_comes_first_and_another_model_never() -> None:
    desk = Desk(gpus=3, migrate=True)
    desk.book = replace(desk.book, devices={**desk.book.devices, "C": gb.AllocatableGpu("C", "T4")})
    desk.member("asleep", "B")
    assert desk(bev.Ask("asleep")) == [bev.Grant("asleep", ("B",))]
    desk.holding("busy", "A")
    desk.member("other", "A")
    assert only(bev.Grant, desk(bev.Ask("other"))) == [], "C is free, but a T4"


def test_after_a_failed_restore_the_gpu_is_avoided_if_there_is_another() -> None:
    desk = Desk(gpus=2, migrate=True)
    desk.member("unlucky", "A")
    assert desk(bev.Ask("unlucky", avoid=("A",))) == [bev.Grant("unlucky", ("B",))]
    desk.gives_way("unlucky")
    desk(bev.Cordon("A", "XID 79", "xid", lasting=True))
    assert desk(bev.Ask("unlucky", avoid=("B",))) == [bev.Grant("unlucky", ("B",))], "better than none"


def test_nobody_gets_a_second_gpu_before_the_first_is_proven_free() -> None:
    desk = Desk(gpus=2, migrate=True)
    desk.holding("unlucky", "A")
    desk(bev.Releasing("unlucky"))
    assert desk(bev.Ask("unlucky", avoid=("A",))) == []
    assert desk(bev.Released("unlucky")) == [bev.Grant("unlucky", ("B",))]
    assert desk.book.devices["A"].holder == ""


def test_with_migration_a_frozen_instance_leaves_a_lost_gpu() -> None:
    desk = Desk(gpus=2, migrate=True)
    desk.member("asleep", "A")
    desk(bev.Cordon("A", "XID 79", "xid", lasting=True))
    assert desk(bev.Ask("asleep")) == [bev.Grant("asleep", ("B",))]


def test_with_migration_sharers_are_bounded_over_all_gpus_of_the_model() -> None:
    desk = Desk(gpus=2, per_gpu=1, migrate=True)
    desk(bev.Assign("a", 1, ""))
    desk(bev.Assign("b", 1, ""))
    desk.book = replace(desk.book, assigned={"a": ("A",), "b": ("A",)})  # b moved
    assert isinstance(desk(bev.Assign("c", 1, ""))[0], bev.Unassignable)
