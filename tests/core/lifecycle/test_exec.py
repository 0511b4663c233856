"""Commands inside (exec): no freeze begins while somebody is in there, and nothing else waits for them."""

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
VISITED = after(RUNNING, IN)


@pytest.mark.parametrize("name", EVERY)
def test_a_visitor_begins_no_operation(name: str) -> None:
    me, effects = does(EVERY[name], IN)
    assert me.state is EVERY[name].state
    assert kinds(effects) in ([], ["ReportActivity"])


@pytest.mark.parametrize(
    ("event", "told"),
    [
        (ev.IdleTimer(RUNNING.idle_gen), []),
        (ev.FreezeAsked(), []),
        (ev.FreezeOrdered(), [ev.OrderedFreezeRefused()]),
        (ev.DrainOrdered(), [ev.OrderedFreezeRefused()]),
    ],
    ids=["earlier timer", "asked", "ordered", "drain"],
)
def test_no_freeze_begins_under_a_visitor(event: ev.Event, told: list[ev.Effect]) -> None:
    me, effects = does(VISITED, event)
    assert (me.state, effects) == (S.RUNNING, told)
    assert me.gate_open, "requests are served meanwhile"


def test_the_last_request_arms_no_timer_while_a_visitor_is_inside() -> None:
    assert does(after(BUSY, IN), ev.LastRequestEnded())[1] == []
    assert does(after(VISITED, ev.FirstRequestStarted()), OUT)[1] == [ev.ReportActivity(idle=False)], (
        "nor a visitor while a request is"
    )


def test_the_idle_time_begins_when_the_visitor_has_left() -> None:
    assert does(RUNNING, IN)[1] == [ev.ReportActivity(idle=False)]
    me, effects = does(VISITED, OUT)
    assert effects == [
        ev.ReportActivity(idle=True, preemptible_at_ns=AT),
        ev.SetIdleTimer(me.idle_gen, AT + FREEZE_AFTER),
    ]


def test_who_waits_to_enter_a_sleeper_finds_it_awake_even_without_freeze_after() -> None:
    me = after(FROZEN, IN, ev.WakeAsked(0, AT + SECOND_NS), ev.Granted(GPU))
    me, effects = does(me, ev.Succeeded(me.op_gen))
    assert me.gate_open
    assert effects == [], "no timer, and never idle in the eyes of the book"


def test_a_freeze_under_way_is_undone_for_a_visitor_only_if_he_asks() -> None:
    me = after(LOCKING, IN)
    assert kinds(does(me, ev.Succeeded(me.op_gen))[1]) == ["Run CHECKPOINT"]
    me, effects = does(me, ev.WakeAsked(0, AT + SECOND_NS))
    assert effects == [ev.AskCancel(LOCKING.op_gen)]
    assert ok(ok(me)).gate_open


def test_a_drain_that_began_before_goes_on_and_the_visitor_is_let_in_afterwards() -> None:
    me = after(DRAINING, IN, ev.WakeAsked(0, AT + SECOND_NS), ev.LastRequestEnded())
    assert me.state is S.FREEZING
    me = ok(ok(me))
    assert me.state is S.WAITING_GPU
    assert ok(after(me, ev.Granted(GPU))).gate_open


def test_an_end_waits_for_no_visitor() -> None:
    assert kinds(does(VISITED, ev.StopAsked(30 * SECOND_NS))[1]) == ["RefuseWaiters", "Run STOP"]
    stopping = after(VISITED, ev.StopAsked(30 * SECOND_NS))
    assert does(stopping, OUT)[1] == []
    failed = after(VISITED, ev.Exited("INSTANCE_CRASHED"))
    assert does(failed, OUT) == (failed, [])
