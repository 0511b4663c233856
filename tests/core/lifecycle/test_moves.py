"""Failed restores, lost GPUs and containers paused from outside."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.core.lifecycle import events as ev
from agent.core.lifecycle.machine import Instance
from agent.core.types import SECOND_NS
from tests.core.lifecycle.test_table import (
    AT,
    BUSY,
    CHECKPOINTING,
    DRAINING,
    FREEZE_AFTER,
    FROZEN,
    GPU,
    LOCKING,
    RESTORING,
    RUNNING,
    STARTING,
    STOPPING,
    WAITING,
    S,
    after,
    does,
    kinds,
    new,
    ok,
)

MOVABLE = replace(RESTORING, movable=True)


def refused_restore(me: Instance) -> ev.Refused:
    return ev.Refused(me.op_gen, "GPU_MEMORY_SHORT", "used by another process")


def test_failed_restore_of_movable_instance_requests_other_gpus() -> None:
    me, effects = does(MOVABLE, refused_restore(MOVABLE))
    assert (me.state, me.holds) == (S.WAITING_GPU, False)
    assert kinds(effects) == ["Note", "ReleaseGpus", "RequestGpus"]
    assert effects[-1] == ev.RequestGpus(avoid=GPU)


def test_second_failed_restore_fails_the_instance() -> None:
    me = after(MOVABLE, refused_restore(MOVABLE), ev.Granted(("GPU-B",)))
    assert (me.state, me.gpus) == (S.RESTORING, ("GPU-B",))
    me, effects = does(me, refused_restore(me))
    assert me.state is S.FAILED
    assert kinds(effects) == ["Run DESTROY", "ReleaseGpus", "RefuseWaiters"]


def test_successful_restore_elsewhere_resets_the_restore_count() -> None:
    me = after(ok(after(MOVABLE, refused_restore(MOVABLE), ev.Granted(("GPU-B",)))), ev.WaitersGone())
    me = ok(ok(after(me, ev.IdleTimer(me.idle_gen))))
    me = after(me, ev.WaitersAppeared(), ev.Granted(("GPU-B",)))
    me, _ = does(me, refused_restore(me))
    assert me.state is S.WAITING_GPU, "not FAILED: this is the first failure of this wake"


def test_failed_restore_without_waiters_withdraws_the_request() -> None:
    me, effects = does(after(MOVABLE, refused_restore(MOVABLE)), ev.WaitersGone())
    assert (me.state, kinds(effects)) == (S.FROZEN, ["WithdrawRequest"])


@pytest.mark.parametrize("me", [MOVABLE, RESTORING], ids=["may move", "may not"])
def test_restore_refused_without_waiters_is_not_retried(me: Instance) -> None:
    me, effects = does(after(me, ev.WaitersGone()), refused_restore(me))
    assert (me.state, me.holds, kinds(effects)) == (S.FROZEN, False, ["Note", "ReleaseGpus"])


@pytest.mark.parametrize("me", [STARTING, WAITING], ids=["before its start", "frozen"])
def test_lost_gpus_fail_an_instance_that_waits_for_them(me: Instance) -> None:
    me, effects = does(me, ev.GpusLost("A: XID 79"))
    assert (me.state, me.reason, me.message) == (S.FAILED, "GPU_LOST", "A: XID 79")
    assert "RefuseWaiters" in kinds(effects)


@pytest.mark.parametrize("me", [RUNNING, BUSY, LOCKING, CHECKPOINTING, FROZEN, RESTORING, STOPPING])
def test_lost_gpus_change_nothing_for_an_instance_outside_the_queue(me: Instance) -> None:
    after_it, effects = does(me, ev.GpusLost("A: XID 79"))
    assert after_it == me
    assert kinds(effects) == ([] if me is FROZEN else ["Note"]), "only a withdrawal can cross it"


def test_pause_closes_the_gate_and_forbids_preemption() -> None:
    me, effects = does(RUNNING, ev.Paused(paused=True))
    assert not me.gate_open
    assert kinds(effects) == ["Note", "ClosePool", "ReportActivity", "RefuseWaiters"]
    assert ev.ReportActivity(idle=False) in effects
    for event in (ev.IdleTimer(RUNNING.idle_gen), ev.FreezeAsked()):
        assert does(me, event) == (me, []), "the driver is never asked about it"
    assert kinds(does(me, ev.FreezeOrdered())[1]) == ["OrderedFreezeRefused"]
    assert kinds(does(me, ev.DrainOrdered())[1]) == ["OrderedFreezeRefused"]


def test_waiters_during_a_pause_are_refused() -> None:
    assert kinds(does(after(RUNNING, ev.Paused(paused=True)), ev.WaitersAppeared())[1]) == ["RefuseWaiters"]


def test_freeze_refused_by_a_pause_marks_the_instance_paused() -> None:
    me, effects = does(LOCKING, ev.Refused(LOCKING.op_gen, "EXTERNALLY_FROZEN", "paused from outside"))
    assert (me.state, me.paused) == (S.RUNNING, True)
    assert kinds(effects) == ["Note", "Note", "ClosePool", "ReportActivity", "RefuseWaiters"]


def test_idle_time_begins_anew_after_a_pause() -> None:
    me, effects = does(after(RUNNING, ev.Paused(paused=True)), ev.Paused(paused=False), at=AT + FREEZE_AFTER)
    assert me.gate_open
    assert kinds(effects) == ["Note", "ReportActivity", "SetIdleTimer"]


def test_pause_during_a_drain_refuses_the_ordered_freeze() -> None:
    me, effects = does(DRAINING, ev.Paused(paused=True))
    assert kinds(effects) == ["Note", "ClosePool", "OrderedFreezeRefused", "ReportActivity", "RefuseWaiters"]
    me = after(me, ev.LastRequestEnded())
    assert me.state is S.RUNNING
    me, effects = does(me, ev.Paused(paused=False))
    assert (me.gate_open, kinds(effects)) == (True, ["Note", "ReportActivity", "SetIdleTimer"])


@pytest.mark.parametrize("me", [LOCKING, CHECKPOINTING, FROZEN, WAITING, RESTORING, STOPPING])
def test_only_a_running_instance_counts_as_paused(me: Instance) -> None:
    assert does(me, ev.Paused(paused=True)) == (me, [])


def test_paused_instance_is_stopped_by_force() -> None:
    me, _ = does(after(RUNNING, ev.Paused(paused=True)), ev.StopAsked(30))
    assert (me.state, me.stop_force) == (S.STOPPING, True)


@pytest.mark.parametrize("me", [LOCKING, CHECKPOINTING])
def test_stop_that_crosses_a_pause_does_not_wait_for_its_end(me: Instance) -> None:
    stopping = after(me, ev.StopAsked(30 * SECOND_NS))
    stopping, effects = does(stopping, ev.Refused(me.op_gen, "EXTERNALLY_FROZEN", "paused from outside"))
    assert (stopping.state, stopping.stop_force) == (S.STOPPING, True)
    assert "Run STOP" in kinds(effects)
    assert ev.ReleaseGpus() in does(stopping, ev.Succeeded(stopping.op_gen))[1]


def test_a_new_instance_is_neither_movable_nor_paused() -> None:
    assert (new().movable, new().paused) == (False, False)
