"""The rules of the GPU allocator."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from agent.core.gpus import allocator
from agent.core.gpus import allocator_events as ev
from agent.core.types import MILLISECOND_NS, SECOND_NS

HOLD = 10 * SECOND_NS


@dataclass
class Harness:
    """The allocator's state; a call applies one event and returns its effects."""

    gpus: int = 1
    per_gpu: int = 8
    migrate: bool = False
    at: int = 0
    state: allocator.GpuAllocator = field(init=False)

    def __post_init__(self) -> None:
        devices = {name: allocator.AllocatableGpu(name, "L20") for name in "ABCDEF"[: self.gpus]}
        self.state = allocator.GpuAllocator(devices, per_gpu=self.per_gpu, max_hold_ns=HOLD, migrate=self.migrate)

    def __call__(self, event: ev.AllocatorEvent, after_ns: int = 0) -> list[ev.AllocatorEffect]:
        self.at += after_ns
        self.state, effects = allocator.step(self.state, event, self.at)
        return effects

    def member(self, uid: str, *gpus: str) -> None:
        """Assign these GPUs without a grant."""
        self(ev.Adopt(uid, gpus, holds=False))

    def holding(self, uid: str, *gpus: str) -> None:
        self(ev.Adopt(uid, gpus, holds=True))

    def idle(self, uid: str, preemptible_at_ns: int = 0) -> list[ev.AllocatorEffect]:
        return self(ev.BecameIdle(uid, preemptible_at_ns))

    def release(self, uid: str) -> list[ev.AllocatorEffect]:
        self(ev.Releasing(uid))
        return self(ev.Released(uid))


def only(kind: type, effects: list[ev.AllocatorEffect]) -> list[str]:
    return [effect.uid for effect in effects if isinstance(effect, kind) and not isinstance(effect, ev.WakeMeAt)]


def test_instances_spread_before_they_share_up_to_the_limit() -> None:
    gpus = Harness(gpus=2, per_gpu=2)
    chosen = []
    for uid in ("a", "b", "c", "d"):
        (answer,) = gpus(ev.Assign(uid, 1))
        assert isinstance(answer, ev.Assigned)
        chosen.append(answer.gpus[0])
    assert chosen == ["A", "B", "A", "B"]
    (refusal,) = gpus(ev.Assign("e", 1))
    assert isinstance(refusal, ev.Unassignable)
    assert "gpu.instances_per_gpu: 2" in refusal.message
    gpus(ev.Unassign("c"))
    assert gpus(ev.Assign("e", 1)) == [ev.Assigned("e", ("A",))]


def test_a_repeated_assignment_is_the_same_one() -> None:
    gpus = Harness(gpus=2)
    first = gpus(ev.Assign("a", 1))
    assert gpus(ev.Assign("a", 1)) == first


def test_only_gpus_that_suit_the_instance_are_assigned() -> None:
    gpus = Harness(gpus=2)
    assert gpus(ev.Assign("a", 1, frozenset("B"))) == [ev.Assigned("a", ("B",))]
    (answer,) = gpus(ev.Assign("b", 2, frozenset("B"), " of model H100"))
    assert isinstance(answer, ev.Unassignable)
    assert "2 GPU(s) of model H100 wanted, 1 of 1 such" in answer.message


def test_instance_without_gpus_is_granted_at_once() -> None:
    gpus = Harness()
    gpus(ev.Assign("cpu", 0))
    assert gpus(ev.Ask("cpu")) == [ev.Grant("cpu", ())]


def test_first_come_first_served() -> None:
    gpus = Harness()
    gpus.holding("now", "A")
    for uid in ("first", "second"):
        gpus.member(uid, "A")
        gpus(ev.Ask(uid), after_ns=1)
    assert gpus.release("now")[0] == ev.Grant("first", ("A",))
    assert gpus.release("first") == [ev.Grant("second", ("A",))]


def test_gpus_are_reserved_for_the_head_of_the_queue() -> None:
    gpus = Harness(gpus=2)
    gpus.holding("busy", "B")
    gpus.member("pair", "A", "B")
    gpus.member("single", "A")
    gpus(ev.Ask("pair"))
    assert gpus.state.devices["A"].holder == "", "no instance holds one GPU while it waits for the other"
    assert only(ev.Grant, gpus(ev.Ask("single"))) == [], "A is free but kept for the head"
    assert gpus.release("busy")[0] == ev.Grant("pair", ("A", "B"))


def test_later_waiters_may_use_what_the_head_cannot() -> None:
    gpus = Harness(gpus=2)
    gpus.holding("busy", "A")
    gpus.member("head", "A")
    gpus.member("other", "B")
    gpus(ev.Ask("head"))
    assert gpus(ev.Ask("other"))[0] == ev.Grant("other", ("B",))


def test_victim_is_the_longest_idle_holder() -> None:
    gpus = Harness(gpus=2)
    gpus.holding("early", "A")
    gpus.holding("late", "B")
    gpus.idle("late")
    gpus.at += 5
    gpus.idle("early")
    gpus(ev.Adopt("both", ("A", "B"), holds=False))
    gpus.member("one", "A", "B")
    gpus.state = replace(
        gpus.state, queue=(allocator.Waiter("one", 1, ("A", "B"), gpus.at),)
    )  # may use either: as with migration
    assert only(ev.AskFreeze, gpus(ev.Tick())) == ["late"]


def test_one_victim_is_enough_and_is_asked_once() -> None:
    gpus = Harness()
    gpus.holding("idle", "A")
    gpus.idle("idle")
    gpus.member("waiter", "A")
    assert only(ev.AskFreeze, gpus(ev.Ask("waiter"))) == ["idle"]
    assert only(ev.AskFreeze, gpus(ev.Tick())) == []


def test_min_awake_delays_preemption() -> None:
    gpus = Harness()
    gpus.holding("fresh", "A")
    gpus.idle("fresh", preemptible_at_ns=3 * SECOND_NS)
    gpus.member("waiter", "A")
    assert gpus(ev.Ask("waiter")) == [ev.WakeMeAt(3 * SECOND_NS)]
    assert gpus(ev.Tick(), after_ns=3 * SECOND_NS) == [ev.AskFreeze("fresh")]


def test_after_a_refusal_the_next_victim_is_asked() -> None:
    gpus = Harness(gpus=2)
    for uid, gpu in (("refuses", "A"), ("next", "B")):
        gpus.holding(uid, gpu)
        gpus.idle(uid)
        gpus.at += 1
    gpus.member("waiter", "A")
    gpus.state = replace(gpus.state, queue=(allocator.Waiter("waiter", 1, ("A", "B"), gpus.at),))
    assert only(ev.AskFreeze, gpus(ev.Tick())) == ["refuses"]
    assert only(ev.AskFreeze, gpus(ev.FreezeRefused("refuses"))) == ["next"]


def test_only_victim_is_asked_again_after_its_back_off() -> None:
    gpus = Harness()
    gpus.holding("refuses", "A")
    gpus.idle("refuses")
    gpus.member("waiter", "A")
    gpus(ev.Ask("waiter"))
    assert gpus(ev.FreezeRefused("refuses")) == [ev.WakeMeAt(gpus.at + allocator.REFUSAL_BACK_OFF_NS)]
    assert gpus(ev.Tick(), after_ns=allocator.REFUSAL_BACK_OFF_NS) == [ev.AskFreeze("refuses")]


def test_a_busy_holder_is_drained_only_after_max_hold() -> None:
    gpus = Harness()
    gpus.holding("busy", "A")
    gpus.member("waiter", "A")
    assert gpus(ev.Ask("waiter")) == [ev.WakeMeAt(HOLD)]
    assert gpus(ev.Tick(), after_ns=HOLD - MILLISECOND_NS) == [ev.WakeMeAt(HOLD)]
    assert gpus(ev.Tick(), after_ns=MILLISECOND_NS) == [ev.AskDrain("busy")]


def test_holder_that_becomes_idle_is_asked_at_once() -> None:
    gpus = Harness()
    gpus.holding("busy", "A")
    gpus.member("waiter", "A")
    gpus(ev.Ask("waiter"))
    assert gpus.idle("busy") == [ev.AskFreeze("busy")]
    assert gpus(ev.BecameBusy("busy")) == []


def test_released_gpu_is_granted_only_after_proof() -> None:
    gpus = Harness()
    gpus.holding("leaving", "A")
    gpus.member("waiter", "A")
    gpus(ev.Releasing("leaving"))
    assert gpus(ev.Ask("waiter")) == [], "it is being vacated: no holder is asked, no waiter is granted"
    assert gpus.state.devices["A"].holder == "leaving"
    assert gpus(ev.Released("leaving")) == [ev.Grant("waiter", ("A",))]


def test_last_holder_gets_its_gpu_back_without_proof() -> None:
    gpus = Harness()
    gpus.holding("a", "A")
    gpus(ev.Releasing("a"))
    assert gpus(ev.Ask("a")) == [ev.Grant("a", ("A",))], "any memory left there is its own"
    assert not gpus.state.holders["a"].leaving


def test_last_holder_queues_behind_an_earlier_waiter() -> None:
    gpus = Harness()
    gpus.holding("a", "A")
    gpus.member("first", "A")
    gpus(ev.Ask("first"))
    gpus(ev.Releasing("a"))
    assert only(ev.Grant, gpus(ev.Ask("a"))) == []
    assert only(ev.Grant, gpus(ev.Released("a"))) == ["first"]


def test_last_holder_does_not_get_a_cordoned_gpu_back() -> None:
    gpus = Harness()
    gpus.holding("a", "A")
    gpus(ev.Releasing("a"))
    gpus(ev.Cordon("A", "NVML_ERROR", "health", lasting=False))
    assert gpus(ev.Ask("a")) == []
    gpus(ev.Released("a"))
    assert gpus(ev.Uncordon("A", "health")) == [ev.Grant("a", ("A",))]


def test_withdrawn_waiter_is_not_granted() -> None:
    gpus = Harness()
    gpus.holding("now", "A")
    for uid in ("gone", "next"):
        gpus.member(uid, "A")
        gpus(ev.Ask(uid))
    gpus(ev.Leave("gone"))
    assert gpus.release("now") == [ev.Grant("next", ("A",))]


def test_cordoned_gpu_is_granted_after_the_cordon_is_lifted() -> None:
    gpus = Harness()
    gpus.member("waiter", "A")
    gpus(ev.Cordon("A", "XID 79", "xid", lasting=False))
    assert gpus(ev.Ask("waiter")) == []
    assert isinstance(gpus(ev.Assign("new", 1))[0], ev.Unassignable)
    assert gpus(ev.Uncordon("A", "xid")) == [ev.Grant("waiter", ("A",))]


def test_cordon_of_an_unknown_gpu_is_ignored() -> None:
    assert Harness()(ev.Cordon("GPU-of-another-agent", "DRIVER_STUCK", "driver", lasting=True)) == []


def test_waiter_for_a_cordoned_gpu_reserves_nothing() -> None:
    gpus = Harness(gpus=2)
    gpus.holding("idle", "A")
    gpus.idle("idle")
    gpus.member("pair", "A", "B")
    gpus.member("single", "A")
    gpus(ev.Cordon("B", "XID 79", "xid", lasting=False))
    assert gpus(ev.Ask("pair")) == [], "no holder gives way for a waiter that can't be granted"
    assert gpus(ev.Ask("single")) == [ev.AskFreeze("idle")]
    assert gpus.release("idle") == [ev.Grant("single", ("A",))]


def test_no_holder_release_to_a_waiter_behind_a_reservation() -> None:
    gpus = Harness(gpus=3)
    gpus.holding("busy", "A")
    gpus.holding("idle", "C")
    gpus.idle("idle")
    gpus.member("head", "A", "B")
    gpus.member("second", "B", "C")
    gpus(ev.Ask("head"))
    assert gpus(ev.Ask("second")) == [ev.WakeMeAt(HOLD)], "B is reserved for the head: C's holder stays awake"
    assert gpus.release("busy")[0] == ev.Grant("head", ("A", "B"))
    assert set(only(ev.AskFreeze, gpus.idle("head"))) == {"idle", "head"}, "now both can be granted"


def test_an_unknown_holder_changes_nothing() -> None:
    gpus = Harness()
    before = gpus.state
    kinds = (ev.Released, ev.Releasing, ev.FreezeRefused, ev.BecameBusy, ev.Unassign)
    for event in (kind("x") for kind in kinds):
        assert gpus(event) == []
    assert gpus.state == before


def test_gpu_is_usable_when_every_source_lifted_its_cordon() -> None:
    gpus = Harness()
    gpus.member("waiter", "A")
    gpus(ev.Cordon("A", "RELEASE_NOT_PROVEN", "i-1", lasting=False))
    gpus(ev.Cordon("A", "NVML_ERROR", "health", lasting=False))
    assert gpus.state.devices["A"].cordoned == "RELEASE_NOT_PROVEN; NVML_ERROR"
    gpus(ev.Ask("waiter"))
    assert gpus(ev.Uncordon("A", "i-1")) == []
    assert gpus(ev.Uncordon("A", "health")) == [ev.Grant("waiter", ("A",))]


def test_waiter_for_a_lost_gpu_is_unservable() -> None:
    gpus = Harness(gpus=2)
    gpus.member("early", "A")
    gpus.member("late", "A")
    gpus.holding("now", "A")
    gpus(ev.Ask("early"))
    (effect,) = gpus(ev.Cordon("A", "XID 79", "xid", lasting=True))
    assert effect == ev.Unservable("early", "A: XID 79")
    assert gpus.state.queue == ()
    assert only(ev.Unservable, gpus(ev.Ask("late"))) == ["late"]


def test_migration_grants_a_free_gpu_of_the_same_model() -> None:
    gpus = Harness(gpus=2, migrate=True)
    gpus.holding("busy", "A")
    gpus.member("frozen", "A")
    assert gpus(ev.Ask("frozen")) == [ev.Grant("frozen", ("B",))]
    assert gpus.state.assigned["frozen"] == ("B",), "its image stays assigned there"


def test_instance_that_sees_only_its_gpu_waits_for_it() -> None:
    gpus = Harness(gpus=2, migrate=True)
    gpus.holding("busy", "A")
    gpus.member("frozen", "A")
    assert only(ev.Grant, gpus(ev.Ask("frozen", stays=True))) == [], "the free GPU is invisible to it"


def test_migration_prefers_the_own_gpu_and_keeps_the_model() -> None:
    gpus = Harness(gpus=3, migrate=True)
    gpus.state = replace(gpus.state, devices={**gpus.state.devices, "C": allocator.AllocatableGpu("C", "T4")})
    gpus.member("frozen", "B")
    assert gpus(ev.Ask("frozen")) == [ev.Grant("frozen", ("B",))]
    gpus.holding("busy", "A")
    gpus.member("other", "A")
    assert only(ev.Grant, gpus(ev.Ask("other"))) == [], "C is free, but a T4"


def test_gpu_of_a_failed_restore_is_avoided_if_possible() -> None:
    gpus = Harness(gpus=2, migrate=True)
    gpus.member("moved", "A")
    assert gpus(ev.Ask("moved", avoid=("A",))) == [ev.Grant("moved", ("B",))]
    gpus.release("moved")
    gpus(ev.Cordon("A", "XID 79", "xid", lasting=True))
    assert gpus(ev.Ask("moved", avoid=("B",))) == [ev.Grant("moved", ("B",))], "better than none"


def test_second_gpu_is_granted_only_after_proof_of_the_first() -> None:
    gpus = Harness(gpus=2, migrate=True)
    gpus.holding("moved", "A")
    gpus(ev.Releasing("moved"))
    assert gpus(ev.Ask("moved", avoid=("A",))) == []
    assert gpus(ev.Released("moved")) == [ev.Grant("moved", ("B",))]
    assert gpus.state.devices["A"].holder == ""


def test_migration_leaves_a_lost_gpu() -> None:
    gpus = Harness(gpus=2, migrate=True)
    gpus.member("frozen", "A")
    gpus(ev.Cordon("A", "XID 79", "xid", lasting=True))
    assert gpus(ev.Ask("frozen")) == [ev.Grant("frozen", ("B",))]


def test_migration_bounds_sharers_over_all_gpus_of_a_model() -> None:
    gpus = Harness(gpus=2, per_gpu=1, migrate=True)
    gpus(ev.Assign("a", 1))
    gpus(ev.Assign("b", 1))
    gpus.state = replace(gpus.state, assigned={"a": ("A",), "b": ("A",)})  # b moved
    assert isinstance(gpus(ev.Assign("c", 1))[0], ev.Unassignable)
