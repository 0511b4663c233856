"""Direct wakes: a lone request is dispatched to the frozen instance (`FunctionQueueState.direct_wake_candidate`)."""

from __future__ import annotations

import pytest

from agent.core.dispatch.dispatcher import BACK_OFF_NS
from agent.core.dispatch.events import (
    Dispatch,
    Effect,
    Event,
    FunctionSet,
    InstanceGone,
    InstanceReported,
    LeaseAnswered,
    LeaseEnded,
    LeaseRefused,
    NodeReported,
    NodeSuspect,
    RequestGone,
    Wake,
    WakeAnswered,
)
from agent.core.types import MILLISECOND_NS, SECOND_NS, InstanceState
from tests.core.dispatch.test_dispatcher import FROZEN, RUNNING, DispatcherRig, instance, uids


def direct_wake(effects: list[Effect]) -> str:
    """The uid of the instance that the one request was dispatched to and wakes."""
    (effect,) = effects
    assert isinstance(effect, Dispatch)
    assert effect.direct_wake
    return effect.uid


def other(uid: str, state: InstanceState, *gpus: str) -> InstanceReported:
    return InstanceReported(uid, "llm", "n1", state, gpus=gpus)


def test_a_lone_request_is_dispatched_to_the_instance_that_it_wakes() -> None:
    rig = DispatcherRig(instance("a", FROZEN))
    assert rig.arrive(1) == [Dispatch(1, "a", "n1", queued_ns=0, direct_wake=True)]
    assert rig.dispatcher.leased("a") == 1
    assert rig.dispatcher.queue_state("ocr").waking == 1


def test_later_requests_are_queued_until_the_direct_wake_is_answered() -> None:
    rig = DispatcherRig(instance("a", FROZEN, concurrency=3))
    direct_wake(rig.arrive(1))
    assert rig.arrive(2) == []
    (effect,) = rig(LeaseAnswered(1, 5 * MILLISECOND_NS))
    assert effect == Dispatch(2, "a", "n1", queued_ns=MILLISECOND_NS, wake_ns=5 * MILLISECOND_NS)
    assert rig.went(3) == "a"


def test_a_report_that_it_runs_frees_its_other_slots_before_the_answer() -> None:
    rig = DispatcherRig(instance("a", FROZEN, concurrency=2))
    direct_wake(rig.arrive(1))
    assert rig.arrive(2) == []
    assert uids(rig(instance("a", RUNNING, concurrency=2))) == ["a"]
    assert rig(LeaseAnswered(1, MILLISECOND_NS)) == []
    assert rig.arrive(3) == []
    assert uids(rig(LeaseEnded(1))) == ["a"]


def test_a_direct_wake_counts_as_queued_so_that_no_instance_is_woken_too_many() -> None:
    rig = DispatcherRig(instance("a", FROZEN, concurrency=2), instance("b", FROZEN, concurrency=2))
    first = direct_wake(rig.arrive(1))
    assert rig.arrive(2) == []
    (second,) = rig.arrive(3)
    assert isinstance(second, Wake)
    assert second.uid != first
    assert rig.arrive(4) == []


@pytest.mark.parametrize(
    "busy",
    [
        [instance("b")],
        [instance("b", InstanceState.RESTORING)],
        [instance("b", InstanceState.WAITING_GPU)],
        [other("x", RUNNING, "g0")],
        [other("x", InstanceState.STARTING, "g0", "g1")],
        [other("x", InstanceState.FREEZING, "g0")],
        [other("x", InstanceState.WAITING_GPU, "g0")],
    ],
    ids=lambda events: f"{events[0].function} is {events[0].state.value}",
)
def test_no_direct_wake_if_another_instance_may_be_free_sooner(busy: list[Event]) -> None:
    """An instance of the function is waking, or another one may hold the GPU for long."""
    rig = DispatcherRig(*busy, instance("a", FROZEN, gpus=("g0",)))
    if busy[0] == instance("b"):
        assert rig.went(1) == "b"
    assert not any(isinstance(effect, Dispatch) for effect in rig.arrive(2) + rig.arrive(3))
    assert rig.dispatcher.leased("a") == 0


def test_instances_on_the_same_gpu_allow_a_direct_wake_if_frozen_or_gone() -> None:
    for quiet in (other("x", FROZEN, "g0"), InstanceGone("x"), other("x", RUNNING, "g1")):
        rig = DispatcherRig(other("x", RUNNING, "g0"), quiet, instance("a", FROZEN, gpus=("g0",)))
        assert direct_wake(rig.arrive(1)) == "a"


def test_a_second_wake_on_the_same_gpu_is_asked_for() -> None:
    """Two functions share g0: the second wake waits for the first instance, for an unknown time."""
    rig = DispatcherRig(FunctionSet("llm"), other("x", FROZEN, "g0"), instance("a", FROZEN, gpus=("g0",)))
    assert direct_wake(rig.arrive(1)) == "a"
    assert rig.arrive(2, "llm") == [Wake("x", "n1")]
    rig(WakeAnswered("x"))
    rig(LeaseEnded(2))
    rig(other("x", FROZEN, "g0"))
    assert rig(RequestGone(1)) == [], "its client left before the wake: both are frozen"
    assert direct_wake(rig.arrive(3, "llm")) == "x"


def test_a_refused_direct_wake_is_queued_for_the_first_free_instance() -> None:
    rig = DispatcherRig(instance("a", FROZEN), instance("b", FROZEN))
    first = direct_wake(rig.arrive(1))
    (wake,) = rig(LeaseRefused(1))
    assert isinstance(wake, Wake)
    assert wake.uid != first
    assert [e.request for e in rig(WakeAnswered(wake.uid)) if isinstance(e, Dispatch)] == [1]


def test_a_wake_that_failed_is_not_tried_again_at_once() -> None:
    rig = DispatcherRig(instance("a", FROZEN))
    direct_wake(rig.arrive(1))
    assert rig(LeaseRefused(1)) == []
    assert rig(NodeReported("n1")) == []
    rig.now += BACK_OFF_NS
    assert rig(NodeReported("n1")) == [Wake("a", "n1")]
    rig(RequestGone(1))
    assert rig(WakeAnswered("a")) == []
    assert rig.went(2) == "a"


def test_a_direct_wake_survives_the_end_of_its_instance_and_a_silent_node() -> None:
    for end in (InstanceGone("a"), NodeSuspect("n1")):
        rig = DispatcherRig(instance("a", FROZEN), NodeReported("n2"), instance("b", FROZEN, "n2"))
        rig(instance("b", InstanceState.STARTING, "n2"))
        assert direct_wake(rig.arrive(1)) == "a"
        rig(end)
        rig(instance("b", RUNNING, "n2"))
        assert uids(rig(LeaseRefused(1))) == ["b"], "its connection broke before a byte was sent"
        assert rig(LeaseEnded(1)) == []


def test_an_answer_without_a_wait_teaches_nothing_about_wakes() -> None:
    """It was awake already, and its report was late: a wake of 0 ns must not enter the average."""
    rig = DispatcherRig(NodeReported("n2"))
    rig(instance("a", FROZEN, wake_estimate_ns=2 * SECOND_NS))
    rig(instance("b", FROZEN, "n2", wake_estimate_ns=SECOND_NS))
    assert direct_wake(rig.arrive(1)) == "b"
    rig(LeaseAnswered(1, 11 * SECOND_NS))  # 3 s on average now, where a is predicted to take 2
    rig(LeaseEnded(1))
    rig(instance("b", FROZEN, "n2"))
    assert direct_wake(rig.arrive(2)) == "a"
    rig(LeaseAnswered(2, 0))
    rig(LeaseEnded(2))
    rig(instance("a", FROZEN))
    assert direct_wake(rig.arrive(3)) == "a"
    rig(LeaseAnswered(3, 8 * SECOND_NS))  # 3.2 s on average, if the answer before it did not count
    rig(LeaseEnded(3))
    rig(instance("a", FROZEN))
    assert direct_wake(rig.arrive(4)) == "b"
