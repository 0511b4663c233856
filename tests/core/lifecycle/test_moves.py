"""What GPUs that fail and people who pause containers do to the life of an instance."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.core.lifecycle import events as ev
from agent.core.lifecycle.machine import Instance
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


def no_room(me: Instance) -> ev.Refused:
    return ev.Refused(me.op_gen, "GPU_MEMORY_SHORT", "an outsider has it")


def test_a_failed_restore_goes_to_the_end_of_the_line_for_another_gpu() -> None:
    me, effects = does(MOVABLE, no_room(MOVABLE))
    assert (me.state, me.holds) == (S.WAITING_GPU, False)
    assert kinds(effects) == ["Note", "ReleaseGpus", "RequestGpus"]
    assert effects[-1] == ev.RequestGpus(avoid=GPU)


def test_the_second_restore_is_the_last_wherever_it_fails() -> None:
    me = after(MOVABLE, no_room(MOVABLE), ev.Granted(("GPU-B",)))
    assert (me.state, me.gpus) == (S.RESTORING, ("GPU-B",))
    me, effects = does(me, no_room(me))
    assert me.state is S.FAILED
    assert kinds(effects) == ["Run DESTROY", "ReleaseGpus", "RefuseWaiters"]


def test_a_wake_that_succeeds_elsewhere_begins_a_new_count() -> None:
    me = after(ok(after(MOVABLE, no_room(MOVABLE), ev.Granted(("GPU-B",)))), ev.WaitersGone())
    me = ok(ok(after(me, ev.IdleTimer(me.idle_gen))))
    me = after(me, ev.WaitersAppeared(), ev.Granted(("GPU-B",)))
    me, _ = does(me, no_room(me))
    assert me.state is S.WAITING_GPU, "not FAILED: this is the first failure of this wake"


def test_who_waits_no_more_sleeps_on_after_a_failed_restore() -> None:
    me, effects = does(after(MOVABLE, no_room(MOVABLE)), ev.WaitersGone())
    assert (me.state, kinds(effects)) == (S.FROZEN, ["WithdrawRequest"])


@pytest.mark.parametrize("me", [MOVABLE, RESTORING], ids=["may move", "may not"])
def test_a_restore_that_fails_when_nobody_waits_any_more_is_not_tried_again(me: Instance) -> None:
    me, effects = does(after(me, ev.WaitersGone()), no_room(me))
    assert (me.state, me.holds, kinds(effects)) == (S.FROZEN, False, ["Note", "ReleaseGpus"])


@pytest.mark.parametrize("me", [STARTING, WAITING], ids=["before its start", "asleep"])
def test_who_waits_for_gpus_that_are_lost_is_given_up(me: Instance) -> None:
    me, effects = does(me, ev.GpusLost("A: XID 79"))
    assert (me.state, me.reason, me.message) == (S.FAILED, "GPU_LOST", "A: XID 79")
    assert "RefuseWaiters" in kinds(effects)


@pytest.mark.parametrize("me", [RUNNING, BUSY, LOCKING, CHECKPOINTING, FROZEN, RESTORING, STOPPING])
def test_lost_gpus_change_nothing_for_an_instance_outside_the_queue(me: Instance) -> None:
    after_it, effects = does(me, ev.GpusLost("A: XID 79"))
    assert after_it == me
    assert kinds(effects) == ([] if me is FROZEN else ["Note"]), "only a withdrawal can cross it"


def test_a_pause_closes_the_gate_and_takes_the_instance_from_the_books_victims() -> None:
    me, effects = does(RUNNING, ev.Paused(paused=True))
    assert not me.gate_open
    assert kinds(effects) == ["Note", "ClosePool", "ReportActivity", "RefuseWaiters"]
    assert ev.ReportActivity(idle=False) in effects
    for event in (ev.IdleTimer(RUNNING.idle_gen), ev.FreezeAsked()):
        assert does(me, event) == (me, []), "the driver is never asked about it"
    assert kinds(does(me, ev.FreezeOrdered())[1]) == ["OrderedFreezeRefused"]
    assert kinds(does(me, ev.DrainOrdered())[1]) == ["OrderedFreezeRefused"]


def test_who_comes_during_a_pause_is_sent_elsewhere() -> None:
    assert kinds(does(after(RUNNING, ev.Paused(paused=True)), ev.WaitersAppeared())[1]) == ["RefuseWaiters"]


def test_a_freeze_that_finds_it_paused_knows_it_at_once() -> None:
    me, effects = does(LOCKING, ev.Refused(LOCKING.op_gen, "EXTERNALLY_FROZEN", "somebody else has paused it"))
    assert (me.state, me.paused) == (S.RUNNING, True)
    assert kinds(effects) == ["Note", "Note", "ClosePool", "ReportActivity", "RefuseWaiters"]


def test_after_a_pause_it_is_idle_from_then_on() -> None:
    me, effects = does(after(RUNNING, ev.Paused(paused=True)), ev.Paused(paused=False), at=AT + FREEZE_AFTER)
    assert me.gate_open
    assert kinds(effects) == ["Note", "ReportActivity", "SetIdleTimer"]


def test_one_paused_while_it_drains_gives_nothing_up_and_the_book_is_told_so() -> None:
    me, effects = does(DRAINING, ev.Paused(paused=True))
    assert kinds(effects) == ["Note", "ClosePool", "OrderedFreezeRefused", "ReportActivity", "RefuseWaiters"]
    me = after(me, ev.LastRequestEnded())
    assert me.state is S.RUNNING
    me, effects = does(me, ev.Paused(paused=False))
    assert (me.gate_open, kinds(effects)) == (True, ["Note", "ReportActivity", "SetIdleTimer"]), "the book asks again"


@pytest.mark.parametrize("me", [LOCKING, CHECKPOINTING, FROZEN, WAITING, RESTORING, STOPPING])
def test_only_a_running_instance_can_be_paused_by_others(me: Instance) -> None:
    assert does(me, ev.Paused(paused=True)) == (me, [])


def test_a_paused_instance_is_stopped_by_force_for_it_answers_nobody() -> None:
    me, _ = does(after(RUNNING, ev.Paused(paused=True)), ev.StopAsked(30))
    assert (me.state, me.stop_force) == (S.STOPPING, True)


def test_a_new_instance_is_neither_movable_nor_paused() -> None:
    assert (new().movable, new().paused) == (False, False)
