"""The fault plan alone, without a driver or processes: which call meets which fault."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import InvalidArgumentError, PreconditionError
from agent.emulated.faults import (
    KINDS,
    MAX_FAULTS,
    OPERATIONS,
    UNDER_WAY,
    Fault,
    FaultPlan,
    find_operation,
    operation_name,
)
from agent.emulated.protocol import MessageOp


def fault(kind: str = "NOT_READY", operation: MessageOp = MessageOp.LOCK, **rest: int | bool | None) -> Fault:
    return Fault(0, operation, kind, **rest)  # type: ignore[arg-type]


def struck(plan: FaultPlan, calls: int, pid: int = 7, devices: frozenset[int] = frozenset({0})) -> list[str]:
    found = [plan.strike(MessageOp.LOCK, pid, devices) for _ in range(calls)]
    return [one.kind if one else "-" for one in found]


def test_fault_applies_once_by_default() -> None:
    plan = FaultPlan()
    plan.add(fault())
    assert struck(plan, 3) == ["NOT_READY", "-", "-"]
    assert plan.empty
    plan.add(fault(times=0))
    assert struck(plan, 3) == ["NOT_READY"] * 3
    assert not plan.empty


def test_skipped_calls_pass_to_the_next_fault() -> None:
    plan = FaultPlan()
    plan.add(fault("NOT_SUPPORTED", skip=2))
    plan.add(fault("NOT_READY", skip=1, times=2))
    assert struck(plan, 5) == ["-", "NOT_READY", "NOT_SUPPORTED", "NOT_READY", "-"]


def test_fault_applies_only_to_its_process_operation_and_gpu() -> None:
    plan = FaultPlan()
    plan.add(fault("NOT_READY", pid=8))
    plan.add(fault("NOT_SUPPORTED", device=1))
    plan.add(fault("DEATH", MessageOp.UNLOCK))
    assert struck(plan, 1) == ["-"]
    assert struck(plan, 1, pid=8) == ["NOT_READY"]
    assert struck(plan, 1, devices=frozenset({0, 1})) == ["NOT_SUPPORTED"]
    assert [one.kind for one in plan.pending()] == ["DEATH"]
    assert [(one.seen, one.hits) for one in plan.pending()] == [(0, 0)]


def test_plan_is_bounded_and_ids_are_unique() -> None:
    plan = FaultPlan()
    ids = [plan.add(fault()) for _ in range(MAX_FAULTS)]
    with pytest.raises(PreconditionError, match="EMULATED_FAULTS_FULL"):
        plan.add(fault())
    plan.clear()
    assert plan.empty
    assert plan.add(fault()) == ids[-1] + 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (fault("EXPLODE"), "choose one of NOT_READY"),
        (fault("STALE", after=True), "after goes with"),
        (fault("SLOW", after=True, delay_ms=5), "not with SLOW"),
        (fault("FAILED", after=True), "not with FAILED"),
        (fault("CHECKPOINTING"), "an answer to state only"),
        (fault("SLOW"), "SLOW needs delay_ms"),
        (fault(times=-1), "times must be 0 to"),
        (fault(skip=10**9), "skip must be 0 to"),
        (fault(delay_ms=10**9), "delay_ms must be 0 to"),
    ],
)
def test_invalid_fault_is_refused(wrong: Fault, said: str) -> None:
    with pytest.raises(InvalidArgumentError, match="EMULATED_FAULT_INVALID") as refused:
        FaultPlan().add(wrong)
    assert said in refused.value.message


def test_operations_by_name() -> None:
    assert {operation_name(find_operation(name)) for name in OPERATIONS} == set(OPERATIONS)
    with pytest.raises(InvalidArgumentError, match="choose one of lock, checkpoint, restore, unlock, state"):
        find_operation("explode")


faults_to_plan = st.builds(
    fault,
    st.sampled_from([kind for kind in KINDS if kind != "SLOW" and kind not in UNDER_WAY]),
    st.sampled_from(list(OPERATIONS.values())),
    pid=st.none() | st.integers(1, 3),
    device=st.none() | st.integers(0, 2),
    times=st.integers(1, 4),
    skip=st.integers(0, 4),
)
calls = st.tuples(st.sampled_from(list(OPERATIONS.values())), st.integers(1, 3), st.frozensets(st.integers(0, 2)))


@given(st.lists(faults_to_plan, max_size=8), st.lists(calls, max_size=60))
def test_random_faults_apply_where_planned_and_never_too_often(
    planned: list[Fault], made: list[tuple[MessageOp, int, frozenset[int]]]
) -> None:
    plan = FaultPlan()
    for one in planned:
        plan.add(one)
    strikes: Counter[int] = Counter()
    for operation, pid, devices in made:
        met = plan.strike(operation, pid, devices)
        if met is not None:
            assert met.operation is operation
            assert met.pid in (None, pid)
            assert met.device is None or met.device in devices
            strikes[met.id] += 1
    for one in planned:
        assert strikes[one.id] == one.hits <= one.times
        assert one.hits <= max(0, one.seen - one.skip)
        assert (one in plan.pending()) == (one.hits < one.times)
