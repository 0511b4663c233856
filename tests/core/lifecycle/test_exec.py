"""Commands inside (exec): no freeze begins while one runs, and no other step waits for it."""

from __future__ import annotations

import pytest

from agent.core.lifecycle import events as ev
from agent.core.types import SECOND_NS, InstanceState
from tests.core.lifecycle.test_table import (
    AT,
    BUSY,
    DRAINING,
    EVERY,
    FREEZE_AFTER,
    FROZEN,
    GPU,
    LOCKING,
    RUNNING,
    after,
    does,
    kinds,
    ok,
)

S = InstanceState
IN, OUT = ev.ExecActive(inside=True), ev.ExecActive(inside=False)
IN_EXEC = after(RUNNING, IN)


@pytest.mark.parametrize("name", EVERY)
def test_exec_starts_no_operation(name: str) -> None:
    me, effects = does(EVERY[name], IN)
    assert me.state is EVERY[name].state
    assert kinds(effects) in ([], ["ReportActivity"])


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (ev.IdleTimer(RUNNING.idle_gen), []),
        (ev.FreezeAsked(), []),
        (ev.FreezeOrdered(), [ev.OrderedFreezeRefused()]),
        (ev.DrainOrdered(), [ev.OrderedFreezeRefused()]),
    ],
    ids=["earlier timer", "asked", "ordered", "drain"],
)
def test_no_freeze_begins_during_exec(event: ev.Event, expected: list[ev.Effect]) -> None:
    me, effects = does(IN_EXEC, event)
    assert (me.state, effects) == (S.RUNNING, expected)
    assert me.gate_open, "requests are served meanwhile"


def test_last_request_arms_no_idle_timer_during_exec() -> None:
    assert does(after(BUSY, IN), ev.LastRequestEnded())[1] == []
    assert does(after(IN_EXEC, ev.FirstRequestStarted()), OUT)[1] == [ev.ReportActivity(idle=False)], (
        "nor the end of exec while a request is inside"
    )


def test_idle_time_begins_after_the_last_exec() -> None:
    assert does(RUNNING, IN)[1] == [ev.ReportActivity(idle=False)]
    me, effects = does(IN_EXEC, OUT)
    assert effects == [
        ev.ReportActivity(idle=True, preemptible_at_ns=AT),
        ev.SetIdleTimer(me.idle_gen, AT + FREEZE_AFTER),
    ]


def test_exec_keeps_a_woken_instance_awake_without_idle_timer() -> None:
    me = after(FROZEN, IN, ev.WakeAsked(0, AT + SECOND_NS), ev.Granted(GPU))
    me, effects = does(me, ev.Succeeded(me.op_gen))
    assert me.gate_open
    assert effects == [], "no timer, and never reported idle"


def test_exec_cancels_a_running_freeze_only_with_a_wake() -> None:
    me = after(LOCKING, IN)
    assert kinds(does(me, ev.Succeeded(me.op_gen))[1]) == ["Run CHECKPOINT"]
    me, effects = does(me, ev.WakeAsked(0, AT + SECOND_NS))
    assert effects == [ev.AskCancel(LOCKING.op_gen)]
    assert ok(ok(me)).gate_open


def test_drain_before_exec_completes_and_exec_wakes_afterwards() -> None:
    me = after(DRAINING, IN, ev.WakeAsked(0, AT + SECOND_NS), ev.LastRequestEnded())
    assert me.state is S.FREEZING
    me = ok(ok(me))
    assert me.state is S.WAITING_GPU
    assert ok(after(me, ev.Granted(GPU))).gate_open


def test_stop_and_failure_do_not_wait_for_exec() -> None:
    assert kinds(does(IN_EXEC, ev.StopAsked(30 * SECOND_NS))[1]) == ["RefuseWaiters", "Run STOP"]
    stopping = after(IN_EXEC, ev.StopAsked(30 * SECOND_NS))
    assert does(stopping, OUT)[1] == []
    failed = after(IN_EXEC, ev.Exited("INSTANCE_CRASHED"))
    assert does(failed, OUT) == (failed, [])
