"""Who holds the GPU that an instance waits for."""

from __future__ import annotations

from agent.core.gpu_holders import GpuUser, held_by, holders
from agent.core.types import SECOND_NS, InstanceState


def user(uid: str, state: InstanceState, *gpus: str, since_s: int = 0) -> GpuUser:
    return GpuUser(uid, f"f-{uid}", "n1", state, gpus, since_s * SECOND_NS)


WAITS = user("i1", InstanceState.WAITING_GPU, "g1", "g2")


def test_the_longest_holder_of_one_of_its_gpus_is_named() -> None:
    late = user("i2", InstanceState.RUNNING, "g1", since_s=9)
    early = user("i3", InstanceState.RESTORING, "g2", since_s=5)
    other = user("i4", InstanceState.RUNNING, "g3", since_s=1)
    assert holders([WAITS, late, early, other]) == {"i1": early}


def test_who_is_frozen_or_has_ended_holds_nothing() -> None:
    states = (InstanceState.FROZEN, InstanceState.STOPPED, InstanceState.FAILED, InstanceState.WAITING_GPU)
    assert holders([WAITS, *(user(state.name, state, "g1") for state in states)]) == {}


def test_who_does_not_wait_has_no_holder() -> None:
    assert holders([user("i1", InstanceState.RUNNING, "g1"), user("i2", InstanceState.FROZEN, "g1")]) == {}


def test_the_sentence_names_instance_function_state_and_time() -> None:
    holder = user("i2", InstanceState.RUNNING, "g1", since_s=10)
    assert held_by(holder, 85 * SECOND_NS) == "its GPU is held by i2 of f-i2, RUNNING for 75 s"
    assert held_by(holder, 0).endswith("for 0 s"), "a clock that went back"
