"""The dispatcher's rules, one story a test (agent/docs/design.md, section 9)."""

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
"""Somebody else is awake on g0: who shares it with him is asked to wake, and no request is bound to it."""


class Story:
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
    story = Story(instance("a", concurrency=2), instance("b", concurrency=2))
    first, second = story.went(1), story.went(2)
    assert {first, second} == {"a", "b"}


def test_pack_prefers_the_last_used_and_spread_the_longest_rested() -> None:
    for policy, expected in ((DispatchPolicy.PACK, "a"), (DispatchPolicy.SPREAD, "b")):
        story = Story(FunctionSet("ocr", policy=policy), instance("a"), instance("b"))
        served = {story.went(1): 1, story.went(2): 2}
        story(LeaseEnded(served["b"]))
        story(LeaseEnded(served["a"]))
        assert story.went(3) == expected


def test_pack_uses_one_instance_for_a_single_stream_of_requests() -> None:
    story = Story(instance("a"), instance("b"), instance("c"))
    used = set()
    for request in range(20):
        used.add(story.went(request))
        story(LeaseEnded(request))
    assert len(used) == 1


def test_a_freed_slot_takes_the_oldest_waiting_request() -> None:
    story = Story(instance("a"))
    assert story.went(1) == "a"
    assert story.arrive(2) == []
    assert story.arrive(3) == []
    assert story(LeaseEnded(1)) == [Dispatch(2, "a", "n1", queued_ns=2 * MILLISECOND_NS)]
    assert uids(story(LeaseEnded(2))) == ["a"]


def test_a_cancellable_freeze_is_preferred_to_a_wake() -> None:
    freezing = instance("a", InstanceState.FREEZING, cancellable=True)
    assert Story(freezing, instance("b", FROZEN)).went(1) == "a"
    story = Story(RIVAL, instance("a", InstanceState.FREEZING), instance("b", FROZEN, gpus=("g0",)))
    assert story.arrive(1) == [Wake("b", "n1")]


def test_nothing_awake_wakes_at_once_and_the_answer_frees_the_slots() -> None:
    story = Story(RIVAL, instance("a", FROZEN, concurrency=2, gpus=("g0",)))
    assert story.arrive(1) == [Wake("a", "n1")]
    assert story.arrive(2) == []
    effects = story(WakeAnswered("a"))
    assert [(e.request, e.uid) for e in effects if isinstance(e, Dispatch)] == [(1, "a"), (2, "a")]
    assert isinstance(effects[0], Dispatch)
    assert effects[0].wake_ns == 2 * MILLISECOND_NS


def test_a_report_may_bring_the_end_of_a_wake_before_its_answer() -> None:
    story = Story(RIVAL, instance("a", FROZEN, gpus=("g0",)))
    story.arrive(1)
    (effect,) = story(instance("a", gpus=("g0",)))
    assert isinstance(effect, Dispatch)
    assert effect.wake_ns == MILLISECOND_NS
    assert story(WakeAnswered("a")) == []
    story(LeaseEnded(1))
    assert story.went(2) == "a"


def test_wakes_in_progress_are_at_most_queued_over_concurrency() -> None:
    story = Story(*(instance(f"i{n}", FROZEN, concurrency=4) for n in range(5)))
    wakes = [uid for request in range(9) for uid in uids(story.arrive(request))]
    assert len(wakes) == 3


def test_an_instance_woken_by_others_counts_as_waking_capacity() -> None:
    story = Story(instance("a", InstanceState.RESTORING), instance("b", FROZEN))
    assert story.arrive(1) == []
    assert uids(story.arrive(2)) == ["b"]


def test_a_queued_request_takes_the_first_free_instance_not_the_waking_one() -> None:
    story = Story(instance("a"), instance("b", FROZEN))
    assert story.went(1) == "a"
    assert story.arrive(2) == [Wake("b", "n1")]
    assert uids(story(LeaseEnded(1))) == ["a"]
    assert story(WakeAnswered("b")) == []


def test_the_node_that_wakes_fastest_is_chosen_counting_its_wakes_in_progress() -> None:
    story = Story(NodeReported("slow"), NodeReported("fast"))
    for n in range(3):
        story(instance(f"f{n}", FROZEN, "fast", wake_estimate_ns=SECOND_NS))
        story(instance(f"s{n}", FROZEN, "slow", wake_estimate_ns=int(1.4 * SECOND_NS)))
    nodes = [e.node for request in range(4) for e in story.arrive(request) if isinstance(e, Wake | Dispatch)]
    assert nodes == ["fast", "slow", "fast", "slow"]


def test_measured_wakes_replace_the_estimate() -> None:
    story = Story(NodeReported("x"), NodeReported("y"))
    story(instance("x1", FROZEN, "x", wake_estimate_ns=MILLISECOND_NS))
    story(instance("y1", FROZEN, "y", wake_estimate_ns=SECOND_NS))
    assert uids(story.arrive(1)) == ["x1"]
    story.now += 5 * SECOND_NS
    story(LeaseAnswered(1, 5 * SECOND_NS))
    story(LeaseEnded(1))
    for _ in range(20):  # the average of x moves to what was measured
        story(instance("x1", FROZEN, "x"))
        woken = uids(story.arrive(2))
        if woken == ["y1"]:
            return
        story.now += 5 * SECOND_NS
        story(LeaseAnswered(2, 5 * SECOND_NS))
        story(LeaseEnded(2))
    raise AssertionError("x still looks faster than y")


def test_wake_factor_waits_where_waiting_is_shorter_than_waking() -> None:
    story = Story(FunctionSet("ocr", wake_factor=1.0), instance("a"), instance("b", FROZEN, wake_estimate_ns=SECOND_NS))
    story.arrive(1)
    story.now += 100 * MILLISECOND_NS
    story(LeaseEnded(1))  # service takes about 0.1 s
    story.arrive(2)
    quiet = [story.arrive(request) for request in range(3, 12)]
    assert not any(quiet)
    assert uids(story.arrive(12) + story.arrive(13)) == ["b"]


def test_no_wake_that_would_freeze_an_instance_of_the_same_function() -> None:
    """Two GPUs, both held by busy instances of the function: waking the third would freeze one of them."""
    story = Story(NodeReported("n1", gpu_count=2))
    story(instance("a", gpus=("g0",)))
    story(instance("b", gpus=("g1",)))
    story(instance("c", FROZEN, gpus=("g0",)))
    story.arrive(1)
    story.arrive(2)
    assert story.arrive(3) == []
    assert uids(story(instance("b", FROZEN, gpus=("g1",)))) == ["b"]  # its GPU works for nobody now


def test_without_migration_only_an_instance_on_a_free_gpu_is_woken() -> None:
    story = Story(NodeReported("n1", gpu_count=2, migrates=False))
    story(instance("a", gpus=("g0",)))
    story(instance("c", FROZEN, gpus=("g1",)))
    story(instance("d", FROZEN, gpus=("g0",)))
    story.arrive(1)
    assert uids(story.arrive(2)) == ["c"]
    assert story.arrive(3) == []


def test_a_refused_request_goes_back_to_the_head() -> None:
    story = Story(instance("a"))
    story.arrive(1)
    story.arrive(2)
    assert story(LeaseRefused(1)) == []  # a is set aside until it is heard again
    effects = story(instance("a"))
    assert [e.request for e in effects if isinstance(e, Dispatch)] == [1]


def test_refused_requests_keep_their_order() -> None:
    story = Story(instance("a"), instance("b"))
    story.arrive(1)
    story.arrive(2)
    story.arrive(3)
    story(LeaseRefused(2))
    story(LeaseRefused(1))
    effects = story(NodeReported("n1"))
    assert [e.request for e in effects if isinstance(e, Dispatch)] == [1, 2]


def test_a_request_refused_too_often_is_answered() -> None:
    story = Story(instance("a"))
    story.arrive(1)
    for _ in range(MAX_ATTEMPTS - 1):
        story(LeaseRefused(1))
        assert uids(story(NodeReported("n1"))) == ["a"]
    assert story(LeaseRefused(1)) == [Refuse(1, RefusalReason.NO_CAPACITY)]


def test_a_refusal_after_the_deadline_is_a_queue_timeout() -> None:
    story = Story(instance("a"))
    story.arrive(1)
    story.now += 61 * SECOND_NS
    assert story(LeaseRefused(1)) == [Refuse(1, RefusalReason.QUEUE_TIMEOUT)]


def test_a_deadline_affects_only_queued_requests() -> None:
    story = Story(instance("a"))
    story.arrive(1)
    story.arrive(2)
    assert story(DeadlinePassed(1)) == []
    assert story(DeadlinePassed(2)) == [Refuse(2, RefusalReason.QUEUE_TIMEOUT)]
    assert story(LeaseEnded(1)) == []


def test_a_full_queue_refuses_until_a_client_leaves() -> None:
    story = Story(FunctionSet("ocr", queue_length=1), instance("a"))
    story.arrive(1)
    assert story.arrive(2) == []
    assert story.arrive(3) == [Refuse(3, RefusalReason.QUEUE_FULL)]
    story(RequestGone(2))
    assert story.arrive(4) == []
    assert [e.request for e in story(RequestGone(1)) if isinstance(e, Dispatch)] == [4]


def test_a_function_without_instances_that_expects_none_has_no_capacity() -> None:
    story = Story()
    assert story.arrive(1, "nobody") == [Refuse(1, RefusalReason.UNKNOWN_FUNCTION)]
    assert story.arrive(2) == []  # one is expected
    assert story(FunctionSet("ocr", expects_instances=False)) == [Refuse(2, RefusalReason.NO_CAPACITY)]
    assert story.arrive(3) == [Refuse(3, RefusalReason.NO_CAPACITY)]
    story(instance("a", InstanceState.RESTORING))
    story.arrive(4)
    assert story(InstanceGone("a")) == [Refuse(4, RefusalReason.NO_CAPACITY)]


def test_a_removed_function_refuses_queued_requests_and_finishes_leased_ones() -> None:
    story = Story(instance("a"))
    story.arrive(1)
    story.arrive(2)
    assert story(FunctionRemoved("ocr")) == [Refuse(2, RefusalReason.UNKNOWN_FUNCTION)]
    assert story.arrive(3) == [Refuse(3, RefusalReason.UNKNOWN_FUNCTION)]
    assert story(LeaseEnded(1)) == []
    assert story(InstanceGone("a")) == []


def test_suspect_and_lost_nodes_get_nothing_until_they_are_back() -> None:
    for silence in (NodeSuspect("n1"), NodeLost("n1")):
        story = Story(instance("a"))
        story(silence)
        assert story.arrive(1) == []
        assert uids(story(NodeReported("n1"))) == ["a"]


def test_a_lost_nodes_leases_end_and_its_requests_end_by_themselves() -> None:
    story = Story(instance("a"))
    assert story.went(1) == "a"
    story(NodeLost("n1"))
    assert story.dispatcher.leased("a") == 0
    assert story.arrive(2) == []
    assert uids(story(NodeReported("n1"))) == ["a"], "back with all its slots, though request 1 still hangs"
    assert story(LeaseEnded(1)) == []
    assert story.dispatcher.leased("a") == 1, "the late end of a void lease takes nobody else's"


def test_leases_of_an_earlier_run_of_the_agent_are_void() -> None:
    story = Story(NodeReported("n1", epoch=7), instance("a"))
    assert story.went(1) == "a"
    assert story(NodeReported("n1", epoch=7)) == []
    assert story.dispatcher.leased("a") == 1
    story(NodeReported("n1", epoch=8))
    assert story.dispatcher.leased("a") == 0
    assert uids(story(LeaseRefused(1))) == ["a"], "refused by the old one: the new one may have it"


def test_lease_time_is_summed_without_queueing() -> None:
    story = Story(instance("a"))
    story.went(1)
    began = story.now
    story.arrive(2)
    story(LeaseEnded(1))  # 2 ms later; request 2 has the slot from now on
    story(LeaseEnded(2))
    assert story.dispatcher.lease_time_ns("ocr", story.now) == story.now - began
    assert story.dispatcher.lease_time_ns("ocr", story.now + SECOND_NS) == story.now - began
    assert story.dispatcher.lease_time_ns("nobody", story.now) == 0


def test_a_draining_node_gets_nothing_new() -> None:
    story = Story(instance("a"), NodeReported("n1", draining=True))
    assert story.arrive(1) == []


def test_retired_and_unhealthy_instances_get_nothing() -> None:
    story = Story(instance("a"), instance("b", healthy=False))
    story(InstanceRetired("a"))
    story(instance("a"))
    assert story.arrive(1) == []
    assert uids(story(instance("b"))) == ["b"]


def test_an_instance_that_could_not_be_stopped_serves_on() -> None:
    story = Story(instance("a"))
    story(InstanceRetired("a"))
    assert story.arrive(1) == []
    assert uids(story(InstanceRetired("a", retired=False))) == ["a"]


def test_a_failed_wake_is_retried_elsewhere_and_later_on_the_same_node() -> None:
    story = Story(RIVAL, *(instance(uid, FROZEN, gpus=("g0",)) for uid in "ab"))
    (first,) = uids(story.arrive(1))
    (second,) = uids(story(WakeFailed(first)))
    assert {first, second} == {"a", "b"}
    assert story(WakeFailed(second)) == []
    assert story(NodeReported("n1")) == [], "not at once: it would fail again"
    story.now += BACK_OFF_NS
    assert len(uids(story(NodeReported("n1")))) == 1


def test_an_instance_that_fails_to_wake_is_asked_less_and_less_often() -> None:
    story = Story(RIVAL, instance("a", FROZEN, gpus=("g0",)))
    assert uids(story.arrive(1)) == ["a"]
    asked = []
    for second in range(59):
        story(WakeFailed("a"))
        story.now += SECOND_NS
        if uids(story(NodeReported("n1"))):
            asked.append(second)
    assert 4 <= len(asked) <= 8
    assert asked[-1] - asked[-2] > asked[1] - asked[0]


def test_requests_of_others_take_slots_once_our_leases_have_been_quiet() -> None:
    story = Story(instance("a"))
    story.arrive(1)
    story(LeaseEnded(1))
    story(instance("a", in_flight=1))  # the report was written before our lease ended: a race, not a stranger
    assert story.went(2) == "a"
    story(LeaseEnded(2))
    story.now += 2 * SECOND_NS
    story(instance("a", in_flight=1))
    assert story.arrive(3) == []
    assert uids(story(instance("a", in_flight=0))) == ["a"]


def test_an_instance_that_goes_takes_no_lease_with_it() -> None:
    story = Story(instance("a"))
    story.arrive(1)
    story(InstanceGone("a"))
    story(instance("b"))
    assert uids(story(LeaseRefused(1))) == ["b"]  # its connection failed: it goes on elsewhere
    assert story(LeaseEnded(1)) == []
    assert story.dispatcher.leased("b") == 0
