"""The dispatcher's rules (agent/docs/design.md, section 9)."""

from __future__ import annotations

from agent.core.dispatch.dispatcher import BACK_OFF_NS, MAX_ATTEMPTS, Dispatcher
from agent.core.dispatch.events import (
    DeadlinePassed,
    Dispatch,
    Effect,
    Event,
    FunctionRemoved,
    FunctionSet,
    InstanceGone,
    InstanceReported,
    InstanceRetired,
    LeaseAnswered,
    LeaseEnded,
    LeaseRefused,
    NodeLost,
    NodeReported,
    NodeSuspect,
    RefusalReason,
    Refuse,
    RequestArrived,
    RequestGone,
    Wake,
    WakeAnswered,
    WakeFailed,
)
from agent.core.types import MILLISECOND_NS, SECOND_NS, DispatchPolicy, InstanceState

FROZEN, RUNNING = InstanceState.FROZEN, InstanceState.RUNNING
RIVAL = InstanceReported("llm-1", "llm", "n1", RUNNING, gpus=("g0",))
"""An instance of another function is awake on g0, which prevents direct wakes of those that share g0."""


class DispatcherRig:
    """A dispatcher with a clock that moves a millisecond per event."""

    def __init__(self, *events: Event, early_dispatch: bool = False) -> None:
        self.dispatcher = Dispatcher(early_dispatch=early_dispatch)
        self.now = SECOND_NS
        for event in (FunctionSet("ocr"), NodeReported("n1"), *events):
            self(event)

    def __call__(self, event: Event) -> list[Effect]:
        self.now += MILLISECOND_NS
        return self.dispatcher.step(event, self.now)

    def arrive(self, request: int, function: str = "ocr") -> list[Effect]:
        return self(RequestArrived(request, function, self.now + 60 * SECOND_NS))

    def went(self, request: int) -> str:
        """Arrive, and the uid it was dispatched to."""
        (effect,) = self.arrive(request)
        assert isinstance(effect, Dispatch)
        return effect.uid


def instance(uid: str, state: InstanceState = RUNNING, node: str = "n1", **more: object) -> InstanceReported:
    return InstanceReported(uid, "ocr", node, state, **more)  # type: ignore[arg-type]


def uids(effects: list[Effect]) -> list[str]:
    return [effect.uid for effect in effects if isinstance(effect, Dispatch | Wake)]


def test_the_awake_instance_with_fewest_outstanding_is_chosen() -> None:
    rig = DispatcherRig(instance("a", concurrency=2), instance("b", concurrency=2))
    first, second = rig.went(1), rig.went(2)
    assert {first, second} == {"a", "b"}


def test_pack_prefers_the_last_used_and_spread_the_longest_rested() -> None:
    for policy, expected in ((DispatchPolicy.PACK, "a"), (DispatchPolicy.SPREAD, "b")):
        rig = DispatcherRig(FunctionSet("ocr", policy=policy), instance("a"), instance("b"))
        served = {rig.went(1): 1, rig.went(2): 2}
        rig(LeaseEnded(served["b"]))
        rig(LeaseEnded(served["a"]))
        assert rig.went(3) == expected


def test_pack_uses_one_instance_for_a_single_stream_of_requests() -> None:
    rig = DispatcherRig(instance("a"), instance("b"), instance("c"))
    used = set()
    for request in range(20):
        used.add(rig.went(request))
        rig(LeaseEnded(request))
    assert len(used) == 1


def test_a_freed_slot_takes_the_oldest_waiting_request() -> None:
    rig = DispatcherRig(instance("a"))
    assert rig.went(1) == "a"
    assert rig.arrive(2) == []
    assert rig.arrive(3) == []
    assert rig(LeaseEnded(1)) == [Dispatch(2, "a", "n1", queued_ns=2 * MILLISECOND_NS)]
    assert uids(rig(LeaseEnded(2))) == ["a"]


def test_a_cancellable_freeze_is_preferred_to_a_wake() -> None:
    freezing = instance("a", InstanceState.FREEZING, cancellable=True)
    assert DispatcherRig(freezing, instance("b", FROZEN)).went(1) == "a"
    rig = DispatcherRig(RIVAL, instance("a", InstanceState.FREEZING), instance("b", FROZEN, gpus=("g0",)))
    assert rig.arrive(1) == [Wake("b", "n1")]


def test_nothing_awake_wakes_at_once_and_the_answer_frees_the_slots() -> None:
    rig = DispatcherRig(RIVAL, instance("a", FROZEN, concurrency=2, gpus=("g0",)))
    assert rig.arrive(1) == [Wake("a", "n1")]
    assert rig.arrive(2) == []
    effects = rig(WakeAnswered("a"))
    assert [(e.request, e.uid) for e in effects if isinstance(e, Dispatch)] == [(1, "a"), (2, "a")]
    assert isinstance(effects[0], Dispatch)
    assert effects[0].wake_ns == 2 * MILLISECOND_NS


def test_a_report_may_bring_the_end_of_a_wake_before_its_answer() -> None:
    rig = DispatcherRig(RIVAL, instance("a", FROZEN, gpus=("g0",)))
    rig.arrive(1)
    (effect,) = rig(instance("a", gpus=("g0",)))
    assert isinstance(effect, Dispatch)
    assert effect.wake_ns == MILLISECOND_NS
    assert rig(WakeAnswered("a")) == []
    rig(LeaseEnded(1))
    assert rig.went(2) == "a"


def test_wakes_in_progress_are_at_most_queued_over_concurrency() -> None:
    rig = DispatcherRig(*(instance(f"i{n}", FROZEN, concurrency=4) for n in range(5)))
    wakes = [uid for request in range(9) for uid in uids(rig.arrive(request))]
    assert len(wakes) == 3


def test_an_instance_woken_by_others_counts_as_waking_capacity() -> None:
    rig = DispatcherRig(instance("a", InstanceState.RESTORING), instance("b", FROZEN))
    assert rig.arrive(1) == []
    assert uids(rig.arrive(2)) == ["b"]


def test_a_queued_request_takes_the_first_free_instance_not_the_waking_one() -> None:
    rig = DispatcherRig(instance("a"), instance("b", FROZEN))
    assert rig.went(1) == "a"
    assert rig.arrive(2) == [Wake("b", "n1")]
    assert uids(rig(LeaseEnded(1))) == ["a"]
    assert rig(WakeAnswered("b")) == []


def test_the_node_that_wakes_fastest_is_chosen_counting_its_wakes_in_progress() -> None:
    rig = DispatcherRig(NodeReported("slow"), NodeReported("fast"))
    for n in range(3):
        rig(instance(f"f{n}", FROZEN, "fast", wake_estimate_ns=SECOND_NS))
        rig(instance(f"s{n}", FROZEN, "slow", wake_estimate_ns=int(1.4 * SECOND_NS)))
    nodes = [e.node for request in range(4) for e in rig.arrive(request) if isinstance(e, Wake | Dispatch)]
    assert nodes == ["fast", "slow", "fast", "slow"]


def test_measured_wakes_replace_the_estimate() -> None:
    rig = DispatcherRig(NodeReported("x"), NodeReported("y"))
    rig(instance("x1", FROZEN, "x", wake_estimate_ns=MILLISECOND_NS))
    rig(instance("y1", FROZEN, "y", wake_estimate_ns=SECOND_NS))
    assert uids(rig.arrive(1)) == ["x1"]
    rig.now += 5 * SECOND_NS
    rig(LeaseAnswered(1, 5 * SECOND_NS))
    rig(LeaseEnded(1))
    for _ in range(20):  # the average of x moves to what was measured
        rig(instance("x1", FROZEN, "x"))
        woken = uids(rig.arrive(2))
        if woken == ["y1"]:
            return
        rig.now += 5 * SECOND_NS
        rig(LeaseAnswered(2, 5 * SECOND_NS))
        rig(LeaseEnded(2))
    raise AssertionError("x still looks faster than y")


def test_wake_factor_waits_where_waiting_is_shorter_than_waking() -> None:
    frozen = instance("b", FROZEN, wake_estimate_ns=SECOND_NS)
    rig = DispatcherRig(FunctionSet("ocr", wake_factor=1.0), instance("a"), frozen)
    rig.arrive(1)
    rig.now += 100 * MILLISECOND_NS
    rig(LeaseEnded(1))  # service takes about 0.1 s
    rig.arrive(2)
    quiet = [rig.arrive(request) for request in range(3, 12)]
    assert not any(quiet)
    assert uids(rig.arrive(12) + rig.arrive(13)) == ["b"]


def test_no_wake_that_would_freeze_an_instance_of_the_same_function() -> None:
    """Two GPUs, both held by busy instances of the function: waking the third would freeze one of them."""
    rig = DispatcherRig(NodeReported("n1", gpu_count=2))
    rig(instance("a", gpus=("g0",)))
    rig(instance("b", gpus=("g1",)))
    rig(instance("c", FROZEN, gpus=("g0",)))
    rig.arrive(1)
    rig.arrive(2)
    assert rig.arrive(3) == []
    assert uids(rig(instance("b", FROZEN, gpus=("g1",)))) == ["b"]  # its GPU is free now


def test_without_migration_only_an_instance_on_a_free_gpu_is_woken() -> None:
    rig = DispatcherRig(NodeReported("n1", gpu_count=2, migrates=False))
    rig(instance("a", gpus=("g0",)))
    rig(instance("c", FROZEN, gpus=("g1",)))
    rig(instance("d", FROZEN, gpus=("g0",)))
    rig.arrive(1)
    assert uids(rig.arrive(2)) == ["c"]
    assert rig.arrive(3) == []


def test_a_refused_request_goes_back_to_the_head() -> None:
    rig = DispatcherRig(instance("a"))
    rig.arrive(1)
    rig.arrive(2)
    assert rig(LeaseRefused(1)) == []  # a is quarantined until its next report
    effects = rig(instance("a"))
    assert [e.request for e in effects if isinstance(e, Dispatch)] == [1]


def test_refused_requests_keep_their_order() -> None:
    rig = DispatcherRig(instance("a"), instance("b"))
    rig.arrive(1)
    rig.arrive(2)
    rig.arrive(3)
    rig(LeaseRefused(2))
    rig(LeaseRefused(1))
    effects = rig(NodeReported("n1"))
    assert [e.request for e in effects if isinstance(e, Dispatch)] == [1, 2]


def test_a_request_refused_too_often_is_answered() -> None:
    rig = DispatcherRig(instance("a"))
    rig.arrive(1)
    for _ in range(MAX_ATTEMPTS - 1):
        rig(LeaseRefused(1))
        assert uids(rig(NodeReported("n1"))) == ["a"]
    assert rig(LeaseRefused(1)) == [Refuse(1, RefusalReason.NO_CAPACITY)]


def test_a_refusal_after_the_deadline_is_a_queue_timeout() -> None:
    rig = DispatcherRig(instance("a"))
    rig.arrive(1)
    rig.now += 61 * SECOND_NS
    assert rig(LeaseRefused(1)) == [Refuse(1, RefusalReason.QUEUE_TIMEOUT)]


def test_a_deadline_affects_only_queued_requests() -> None:
    rig = DispatcherRig(instance("a"))
    rig.arrive(1)
    rig.arrive(2)
    assert rig(DeadlinePassed(1)) == []
    assert rig(DeadlinePassed(2)) == [Refuse(2, RefusalReason.QUEUE_TIMEOUT)]
    assert rig(LeaseEnded(1)) == []


def test_a_full_queue_refuses_until_a_client_leaves() -> None:
    rig = DispatcherRig(FunctionSet("ocr", queue_length=1), instance("a"))
    rig.arrive(1)
    assert rig.arrive(2) == []
    assert rig.arrive(3) == [Refuse(3, RefusalReason.QUEUE_FULL)]
    rig(RequestGone(2))
    assert rig.arrive(4) == []
    assert [e.request for e in rig(RequestGone(1)) if isinstance(e, Dispatch)] == [4]


def test_a_function_without_instances_that_expects_none_has_no_capacity() -> None:
    rig = DispatcherRig()
    assert rig.arrive(1, "nobody") == [Refuse(1, RefusalReason.UNKNOWN_FUNCTION)]
    assert rig.arrive(2) == []  # one is expected
    assert rig(FunctionSet("ocr", expects_instances=False)) == [Refuse(2, RefusalReason.NO_CAPACITY)]
    assert rig.arrive(3) == [Refuse(3, RefusalReason.NO_CAPACITY)]
    rig(instance("a", InstanceState.RESTORING))
    rig.arrive(4)
    assert rig(InstanceGone("a")) == [Refuse(4, RefusalReason.NO_CAPACITY)]


def test_a_removed_function_refuses_queued_requests_and_finishes_leased_ones() -> None:
    rig = DispatcherRig(instance("a"))
    rig.arrive(1)
    rig.arrive(2)
    assert rig(FunctionRemoved("ocr")) == [Refuse(2, RefusalReason.UNKNOWN_FUNCTION)]
    assert rig.arrive(3) == [Refuse(3, RefusalReason.UNKNOWN_FUNCTION)]
    assert rig(LeaseEnded(1)) == []
    assert rig(InstanceGone("a")) == []


def test_suspect_and_lost_nodes_get_nothing_until_they_are_back() -> None:
    for silence in (NodeSuspect("n1"), NodeLost("n1")):
        rig = DispatcherRig(instance("a"))
        rig(silence)
        assert rig.arrive(1) == []
        assert uids(rig(NodeReported("n1"))) == ["a"]


def test_a_lost_nodes_leases_end_and_its_requests_end_by_themselves() -> None:
    rig = DispatcherRig(instance("a"))
    assert rig.went(1) == "a"
    rig(NodeLost("n1"))
    assert rig.dispatcher.leased("a") == 0
    assert rig.arrive(2) == []
    assert uids(rig(NodeReported("n1"))) == ["a"], "all its slots are free again, though request 1 still hangs"
    assert rig(LeaseEnded(1)) == []
    assert rig.dispatcher.leased("a") == 1, "the end of a void lease frees no other lease"


def test_leases_of_an_earlier_run_of_the_agent_are_void() -> None:
    rig = DispatcherRig(NodeReported("n1", epoch=7), instance("a"))
    assert rig.went(1) == "a"
    assert rig(NodeReported("n1", epoch=7)) == []
    assert rig.dispatcher.leased("a") == 1
    rig(NodeReported("n1", epoch=8))
    assert rig.dispatcher.leased("a") == 0
    assert uids(rig(LeaseRefused(1))) == ["a"], "refused by the earlier run, dispatched to the new one"


def test_lease_time_is_summed_without_queueing() -> None:
    rig = DispatcherRig(instance("a"))
    rig.went(1)
    began = rig.now
    rig.arrive(2)
    rig(LeaseEnded(1))  # 2 ms later; request 2 has the slot from now on
    rig(LeaseEnded(2))
    assert rig.dispatcher.lease_time_ns("ocr", rig.now) == rig.now - began
    assert rig.dispatcher.lease_time_ns("ocr", rig.now + SECOND_NS) == rig.now - began
    assert rig.dispatcher.lease_time_ns("nobody", rig.now) == 0


def test_a_draining_node_gets_nothing_new() -> None:
    rig = DispatcherRig(instance("a"), NodeReported("n1", draining=True))
    assert rig.arrive(1) == []


def test_retired_and_unhealthy_instances_get_nothing() -> None:
    rig = DispatcherRig(instance("a"), instance("b", healthy=False))
    rig(InstanceRetired("a"))
    rig(instance("a"))
    assert rig.arrive(1) == []
    assert uids(rig(instance("b"))) == ["b"]


def test_an_instance_that_could_not_be_stopped_serves_on() -> None:
    rig = DispatcherRig(instance("a"))
    rig(InstanceRetired("a"))
    assert rig.arrive(1) == []
    assert uids(rig(InstanceRetired("a", retired=False))) == ["a"]


def test_a_failed_wake_is_retried_elsewhere_and_later_on_the_same_node() -> None:
    rig = DispatcherRig(RIVAL, *(instance(uid, FROZEN, gpus=("g0",)) for uid in "ab"))
    (first,) = uids(rig.arrive(1))
    (second,) = uids(rig(WakeFailed(first)))
    assert {first, second} == {"a", "b"}
    assert rig(WakeFailed(second)) == []
    assert rig(NodeReported("n1")) == [], "not at once: it would fail again"
    rig.now += BACK_OFF_NS
    assert len(uids(rig(NodeReported("n1")))) == 1


def test_an_instance_that_fails_to_wake_is_asked_less_and_less_often() -> None:
    rig = DispatcherRig(RIVAL, instance("a", FROZEN, gpus=("g0",)))
    assert uids(rig.arrive(1)) == ["a"]
    asked = []
    for second in range(59):
        rig(WakeFailed("a"))
        rig.now += SECOND_NS
        if uids(rig(NodeReported("n1"))):
            asked.append(second)
    assert 4 <= len(asked) <= 8
    assert asked[-1] - asked[-2] > asked[1] - asked[0]


def test_requests_of_others_take_slots_once_our_leases_have_been_quiet() -> None:
    rig = DispatcherRig(instance("a"))
    rig.arrive(1)
    rig(LeaseEnded(1))
    rig(instance("a", in_flight=1))  # the report is older than the end of our lease
    assert rig.went(2) == "a"
    rig(LeaseEnded(2))
    rig.now += 2 * SECOND_NS
    rig(instance("a", in_flight=1))
    assert rig.arrive(3) == []
    assert uids(rig(instance("a", in_flight=0))) == ["a"]


def test_an_instance_that_goes_takes_no_lease_with_it() -> None:
    rig = DispatcherRig(instance("a"))
    rig.arrive(1)
    rig(InstanceGone("a"))
    rig(instance("b"))
    assert uids(rig(LeaseRefused(1))) == ["b"]  # its connection failed
    assert rig(LeaseEnded(1)) == []
    assert rig.dispatcher.leased("b") == 0
