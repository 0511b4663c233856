"""The life cycle's table: every state with every event. Each test sends events to an example and checks the effects."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.core.lifecycle import events as ev
from agent.core.lifecycle import machine
from agent.core.lifecycle.machine import CANCELLED, PRE_FREEZE_FAILED, Instance
from agent.core.types import SECOND_NS, InstanceState

S = InstanceState
AT = 1000 * SECOND_NS
GPU = ("GPU-A",)
FREEZE_AFTER = 10 * SECOND_NS


def new() -> Instance:
    return Instance("ocr", freezable=True, freeze_after_ns=FREEZE_AFTER)


def after(me: Instance, *events: ev.Event, at: int = AT) -> Instance:
    for event in events:
        me, _ = machine.step(me, event, at)
    return me


def ok(me: Instance) -> Instance:
    """The current operation succeeds."""
    return after(me, ev.Succeeded(me.op_gen))


def does(me: Instance, event: ev.Event, at: int = AT) -> tuple[Instance, list[ev.Effect]]:
    return machine.step(me, event, at)


def kinds(effects: list[ev.Effect]) -> list[str]:
    return [f"Run {e.op.value}" if isinstance(e, ev.Run) else type(e).__name__ for e in effects]


PULLING = after(new(), ev.Created())
STARTING = ok(PULLING)
WARMING = after(STARTING, ev.Granted(GPU))
RUNNING = ok(WARMING)
BUSY = after(RUNNING, ev.FirstRequestStarted())
LOCKING = after(RUNNING, ev.IdleTimer(RUNNING.idle_gen))
CHECKPOINTING = ok(LOCKING)
UNLOCKING = ok(after(LOCKING, ev.WaitersAppeared()))
FROZEN = ok(CHECKPOINTING)
WAITING = after(FROZEN, ev.WaitersAppeared())
RESTORING = after(WAITING, ev.Granted(GPU))
DRAINING = after(BUSY, ev.DrainOrdered())
ENDING = after(BUSY, ev.StopAsked(30 * SECOND_NS))
STOPPING = after(RUNNING, ev.StopAsked(30 * SECOND_NS))
STOPPED = ok(STOPPING)
FAILED = after(RUNNING, ev.Exited("INSTANCE_CRASHED", "exit code 1"))
EVERY = {
    "PULLING": PULLING, "STARTING": STARTING, "WARMING": WARMING, "RUNNING": RUNNING, "BUSY": BUSY, "LOCKING": LOCKING,
    "CHECKPOINTING": CHECKPOINTING, "UNLOCKING": UNLOCKING, "FROZEN": FROZEN, "WAITING": WAITING,
    "RESTORING": RESTORING, "DRAINING": DRAINING, "ENDING": ENDING, "STOPPING": STOPPING, "STOPPED": STOPPED,
    "FAILED": FAILED,
}  # fmt: skip
EVENTS: list[ev.Event] = [
    ev.FirstRequestStarted(), ev.LastRequestEnded(), ev.WaitersAppeared(), ev.WaitersGone(), ev.WakeAsked(0, AT +
    SECOND_NS), ev.WakeExpired(), ev.ExecActive(inside=True), ev.ExecActive(inside=False), ev.FreezeAsked(),
    ev.FreezeOrdered(), ev.DrainOrdered(), ev.StopAsked(SECOND_NS), ev.StopAsked(0, force=True),
    ev.Exited("INSTANCE_CRASHED"), ev.Granted(GPU), ev.IdleTimer(0), ev.StopTimer(0), ev.Succeeded(0), ev.Refused(0,
    "NOT_READY"), ev.Broken(0, "UNKNOWN"),
]  # fmt: skip


def test_each_example_is_in_the_state_of_its_name() -> None:
    assert {name: me.state.value for name, me in EVERY.items()} == {
        "PULLING": "STARTING", "STARTING": "STARTING", "WARMING": "STARTING", "RUNNING": "RUNNING", "BUSY": "RUNNING",
        "LOCKING": "FREEZING",
        "CHECKPOINTING": "FREEZING", "UNLOCKING": "FREEZING", "FROZEN": "FROZEN", "WAITING": "WAITING_GPU",
        "RESTORING": "RESTORING", "DRAINING": "RUNNING", "ENDING": "STOPPING", "STOPPING": "STOPPING",
        "STOPPED": "STOPPED", "FAILED": "FAILED",
    }  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("event", EVENTS, ids=lambda e: type(e).__name__)
def test_each_state_with_each_event_keeps_what_always_holds(name: str, event: ev.Event) -> None:
    before = EVERY[name]
    me, effects = does(before, event)
    runs = [effect for effect in effects if isinstance(effect, ev.Run)]
    assert len(runs) <= 1
    if before.op is not None and runs:
        assert runs[0].op is ev.Operation.DESTROY, "one operation at a time; only DESTROY may interrupt"
    if before.state.terminal:
        assert me.state is before.state
        assert not runs
    if me.state in (S.FROZEN, S.WAITING_GPU):
        assert not me.holds, "a frozen instance holds no GPU"
    if me.state in (S.RUNNING, S.FREEZING, S.RESTORING):
        assert me.holds
    if before.holds and not me.holds:
        assert ev.ReleaseGpus() in effects, "a GPU no longer held is released"
    if me.state in (S.FREEZING, S.RESTORING):
        assert me.op is not None
    assert me.gate_open == (me.state is S.RUNNING and not me.draining)


@pytest.mark.parametrize("name", EVERY)
def test_exit_fails_or_stops_an_instance_in_any_state(name: str) -> None:
    me, effects = does(EVERY[name], ev.Exited("INSTANCE_CRASHED", "exit code 1"))
    if EVERY[name].state in (S.STOPPING, S.STOPPED):
        assert me.state in (S.STOPPING, S.STOPPED)
    elif EVERY[name].state is not S.FAILED:
        assert me.state is S.FAILED
        assert kinds(effects)[0] == "Run DESTROY"
        assert ev.RefuseWaiters("INSTANCE_CRASHED", "exit code 1") in effects
        assert (ev.WithdrawRequest() in effects) == (name in ("STARTING", "WAITING"))


@pytest.mark.parametrize("name", ["WARMING", "LOCKING", "CHECKPOINTING", "UNLOCKING", "RESTORING", "STOPPING"])
def test_broken_operation_fails_and_destroys_the_instance(name: str) -> None:
    before = EVERY[name]
    me, effects = does(before, ev.Broken(before.op_gen, "UNKNOWN"))
    assert (me.state, me.reason) == (S.FAILED, "UNKNOWN")
    assert kinds(effects) == ["Run DESTROY", "ReleaseGpus", "RefuseWaiters"]


@pytest.mark.parametrize("name", [n for n, me in EVERY.items() if me.op is not None])
def test_stale_answers_are_ignored(name: str) -> None:
    before = EVERY[name]
    stale = before.op_gen - 1
    for event in (ev.Succeeded(stale), ev.Refused(stale, "X"), ev.Broken(stale, "X")):
        assert does(before, event) == (before, [])


# ---- freezing -------------------------------------------------------------------------------------------------------


def test_idle_instance_freezes_after_freeze_after() -> None:
    _, effects = does(BUSY, ev.LastRequestEnded())
    assert effects == [
        ev.ReportActivity(idle=True, preemptible_at_ns=AT),
        ev.SetIdleTimer(BUSY.idle_gen + 1, AT + FREEZE_AFTER),
    ]
    assert kinds(does(RUNNING, ev.IdleTimer(RUNNING.idle_gen))[1]) == ["ClosePool", "Run LOCK"]


def test_earlier_idle_timer_is_stale() -> None:
    assert does(RUNNING, ev.IdleTimer(RUNNING.idle_gen - 1)) == (RUNNING, [])
    assert does(BUSY, ev.IdleTimer(RUNNING.idle_gen)) == (BUSY, [])


def test_instance_without_idle_mode_is_never_frozen() -> None:
    me = replace(RUNNING, freezable=False)
    assert kinds(does(after(me, ev.FirstRequestStarted()), ev.LastRequestEnded())[1]) == ["ReportActivity"], (
        "no idle timer"
    )
    assert does(me, ev.FreezeAsked()) == (me, [])
    assert does(me, ev.FreezeOrdered()) == (me, [ev.OrderedFreezeRefused()])
    assert does(me, ev.DrainOrdered()) == (me, [ev.OrderedFreezeRefused()])


def test_a_request_cancels_a_freeze_until_the_checkpoint() -> None:
    asked, effects = does(LOCKING, ev.WaitersAppeared())
    assert effects == [ev.AskCancel(LOCKING.op_gen)]
    me, effects = does(asked, ev.Refused(asked.op_gen, CANCELLED))
    assert (me.state, me.refusals, effects) == (S.RUNNING, 0, [])
    unlocking, effects = does(asked, ev.Succeeded(asked.op_gen))
    assert kinds(effects) == ["Run UNLOCK"]
    assert ok(unlocking).gate_open


def test_request_during_checkpoint_gets_a_wake_afterwards() -> None:
    me, effects = does(CHECKPOINTING, ev.WaitersAppeared())
    assert effects == []
    me, effects = does(me, ev.Succeeded(me.op_gen))
    assert me.state is S.WAITING_GPU
    assert kinds(effects) == ["ReleaseGpus", "RequestGpus"]


def test_ordered_freeze_is_not_cancelled_by_a_request() -> None:
    ordered = after(RUNNING, ev.FreezeOrdered())
    me, effects = does(ordered, ev.WaitersAppeared())
    assert effects == []
    assert kinds(does(me, ev.Succeeded(me.op_gen))[1]) == ["Run CHECKPOINT"]


def test_refused_freezes_back_off_with_a_bound_and_keep_the_reason() -> None:
    me, pauses = RUNNING, []
    for _ in range(20):
        me = after(me, ev.IdleTimer(me.idle_gen))
        me, effects = does(me, ev.Refused(me.op_gen, "HOST_MEMORY_SHORT", "1 GiB missing"))
        assert ev.Note("instance.freeze_refused", "HOST_MEMORY_SHORT: 1 GiB missing") in effects
        pauses += [(effect.at_ns - AT) // SECOND_NS for effect in effects if isinstance(effect, ev.SetIdleTimer)]
    assert pauses[:3] == [10, 10, 10], "never sooner than freezeAfter"
    assert pauses[-1] == 60
    assert (me.state, me.refusal) == (S.RUNNING, "HOST_MEMORY_SHORT: 1 GiB missing")
    frozen = ok(ok(after(me, ev.IdleTimer(me.idle_gen))))
    assert (frozen.state, frozen.refusals, frozen.refusal) == (S.FROZEN, 0, "")


def test_back_off_counts_from_the_refusal_despite_requests() -> None:
    me, _ = machine.step(after(RUNNING, ev.FreezeOrdered()), ev.Refused(RUNNING.op_gen + 1, "NVML_UNAVAILABLE"), AT)
    for n in range(1, 5):
        me, _ = machine.step(me, ev.FirstRequestStarted(), AT + n * SECOND_NS // 2)
        me, effects = machine.step(me, ev.LastRequestEnded(), AT + n * SECOND_NS // 2)
        (became,) = [effect for effect in effects if isinstance(effect, ev.ReportActivity)]
        assert became.preemptible_at_ns == AT + SECOND_NS, "the back-off counts from the refusal"


def test_refused_order_is_reported_to_the_allocator() -> None:
    ordered = after(RUNNING, ev.FreezeOrdered())
    _, effects = does(ordered, ev.Refused(ordered.op_gen, "NOT_READY"))
    assert effects[0] == ev.OrderedFreezeRefused()


def test_failed_pre_freeze_hook_stops_the_instance() -> None:
    me, effects = does(LOCKING, ev.Refused(LOCKING.op_gen, PRE_FREEZE_FAILED, "answered 500"))
    assert (me.state, me.reason) == (S.STOPPING, PRE_FREEZE_FAILED)
    assert kinds(effects) == ["RefuseWaiters", "Run STOP"]


def test_refused_unlock_fails_the_instance() -> None:
    me, effects = does(UNLOCKING, ev.Refused(UNLOCKING.op_gen, "EXTERNALLY_FROZEN"))
    assert me.state is S.FAILED
    assert kinds(effects)[0] == "Run DESTROY"


def test_drain_closes_the_gate_and_freezes_after_the_last_request() -> None:
    assert not DRAINING.gate_open
    me, effects = does(DRAINING, ev.LastRequestEnded())
    assert kinds(effects) == ["ClosePool", "Run LOCK"]
    assert me.ordered


# ---- waking ---------------------------------------------------------------------------------------------------------


def test_request_to_a_frozen_instance_waits_for_gpu_and_restore() -> None:
    assert kinds(does(FROZEN, ev.WaitersAppeared())[1]) == ["RequestGpus"]
    assert kinds(does(WAITING, ev.Granted(GPU))[1]) == ["Run WAKE"]
    me, effects = does(RESTORING, ev.Succeeded(RESTORING.op_gen))
    assert me.gate_open
    assert effects == [], "it has a waiter, so it is never reported idle"


def test_last_waiter_gone_withdraws_the_gpu_request() -> None:
    me, effects = does(WAITING, ev.WaitersGone())
    assert (me.state, effects) == (S.FROZEN, [ev.WithdrawRequest()])


def test_a_wake_by_the_api_waits_until_its_deadline() -> None:
    me = after(FROZEN, ev.WakeAsked(0, AT + SECOND_NS))
    assert me.state is S.WAITING_GPU
    assert does(me, ev.WaitersGone())[0].state is S.WAITING_GPU
    assert does(me, ev.WakeExpired(), at=AT + SECOND_NS)[0].state is S.FROZEN


def test_hold_keeps_it_awake_until_the_first_request_only() -> None:
    me = ok(after(FROZEN, ev.WakeAsked(60 * SECOND_NS, AT + SECOND_NS), ev.Granted(GPU)))
    assert me.hold_until_ns == AT + 60 * SECOND_NS
    me = after(me, ev.FirstRequestStarted())
    assert does(me, ev.LastRequestEnded())[1][1] == ev.SetIdleTimer(me.idle_gen + 1, AT + FREEZE_AFTER)


def test_hold_of_an_expired_wake_ends_with_the_next_request() -> None:
    me = after(FROZEN, ev.WakeAsked(60 * SECOND_NS, AT + 1))
    me = after(me, ev.WakeExpired(), at=AT + 1)
    me = after(me, ev.WaitersAppeared(), ev.Granted(GPU), at=AT + 2)
    me = after(ok(me), ev.FirstRequestStarted(), ev.WaitersGone())
    assert does(me, ev.LastRequestEnded())[1][1] == ev.SetIdleTimer(me.idle_gen + 1, AT + FREEZE_AFTER)


def test_api_wake_during_a_drain_wakes_after_the_freeze() -> None:
    me = after(DRAINING, ev.WakeAsked(0, AT + SECOND_NS), ev.LastRequestEnded())
    assert ok(ok(me)).state is S.WAITING_GPU


def test_refused_restore_is_retried_once() -> None:
    me, effects = does(RESTORING, ev.Refused(RESTORING.op_gen, "OUT_OF_MEMORY"))
    assert kinds(effects) == ["Note", "Run WAKE"]
    me, effects = does(me, ev.Refused(me.op_gen, "OUT_OF_MEMORY"))
    assert me.state is S.FAILED


# ---- ending ---------------------------------------------------------------------------------------------------------


def test_a_frozen_instance_is_stopped_without_waking() -> None:
    me, effects = does(FROZEN, ev.StopAsked(SECOND_NS))
    assert kinds(effects) == ["RefuseWaiters", "Run STOP"]
    assert me.stop_force


def test_busy_instance_is_drained_for_at_most_its_grace() -> None:
    me, effects = does(BUSY, ev.StopAsked(3 * SECOND_NS))
    assert kinds(effects) == ["RefuseWaiters", "SetStopTimer"]
    assert kinds(does(me, ev.LastRequestEnded())[1]) == ["Run STOP"]
    cut, effects = does(me, ev.StopTimer(me.op_gen))
    assert cut.stop_force
    assert kinds(effects) == ["Run STOP"]


@pytest.mark.parametrize("name", ["LOCKING", "CHECKPOINTING", "UNLOCKING", "RESTORING", "WARMING"])
def test_stop_during_an_operation_follows_its_end(name: str) -> None:
    me, effects = does(EVERY[name], ev.StopAsked(SECOND_NS))
    assert kinds(effects) == (["AskCancel"] if name in ("LOCKING", "WARMING") else [])
    assert me.state is EVERY[name].state
    me = ok(me)
    while me.state is S.FREEZING:
        me = ok(me)
    assert me.state is S.STOPPING


def test_cancelled_start_is_stopped_not_failed() -> None:
    me = after(WARMING, ev.StopAsked(0, reason="STOPPED_BY_USER"))
    me = after(me, ev.Refused(me.op_gen, CANCELLED))
    assert (me.state, me.stop_force) == (S.STOPPING, True)
    stopped, effects = does(me, ev.Succeeded(me.op_gen))
    assert (stopped.state, stopped.reason) == (S.STOPPED, "STOPPED_BY_USER")
    assert ev.ReleaseGpus() in effects


def test_refused_restore_before_a_pending_stop_is_not_retried() -> None:
    me = after(RESTORING, ev.StopAsked(0))
    me, effects = does(me, ev.Refused(me.op_gen, "OUT_OF_MEMORY"))
    assert (me.state, kinds(effects)) == (S.STOPPING, ["RefuseWaiters", "Run STOP"])


def test_forced_stop_cancels_a_graceful_stop() -> None:
    assert does(STOPPING, ev.StopAsked(0, force=True))[1] == [ev.AskCancel(STOPPING.op_gen)]
    assert does(STOPPING, ev.StopAsked(0))[1] == []
    assert kinds(does(ENDING, ev.StopAsked(0, force=True))[1]) == ["RefuseWaiters", "Run STOP"]


def test_grant_that_crosses_a_stop_is_released_at_its_end() -> None:
    me = after(STARTING, ev.StopAsked(0))
    me = after(me, ev.Granted(GPU))
    assert me.holds
    assert ev.ReleaseGpus() in does(me, ev.Succeeded(me.op_gen))[1]


@pytest.mark.parametrize("name", ["STOPPED", "FAILED"])
def test_terminal_instance_refuses_waiters_and_releases_grants(name: str) -> None:
    me = EVERY[name]
    assert isinstance(does(me, ev.WaitersAppeared())[1][0], ev.RefuseWaiters)
    assert does(me, ev.Granted(GPU))[1] == [ev.ReleaseGpus()]


def test_an_image_is_pulled_before_a_gpu_is_asked_for() -> None:
    me, effects = does(new(), ev.Created())
    assert kinds(effects) == ["Run PREPARE"]
    assert not me.in_gpu_queue
    me, effects = does(me, ev.Succeeded(me.op_gen))
    assert effects == [ev.RequestGpus()]
    assert me.in_gpu_queue


def test_failed_pull_fails_the_instance() -> None:
    me, effects = does(PULLING, ev.Broken(PULLING.op_gen, "IMAGE_NOT_FOUND", "there is no ocr:9"))
    assert (me.state, me.reason) == (S.FAILED, "IMAGE_NOT_FOUND")
    assert kinds(effects) == ["Run DESTROY", "RefuseWaiters"]


@pytest.mark.parametrize("pulled", [True, False])
def test_a_stop_during_the_pull_asks_for_no_gpu(pulled: bool) -> None:
    me, effects = does(PULLING, ev.StopAsked(0))
    assert effects == [ev.AskCancel(PULLING.op_gen)]
    end = ev.Succeeded(me.op_gen) if pulled else ev.Refused(me.op_gen, CANCELLED)
    me, effects = does(me, end)
    assert me.state is S.STOPPING
    assert "Run STOP" in kinds(effects)
    assert "RequestGpus" not in kinds(effects)


# ---- impossible events ----------------------------------------------------------------------------------------------

CROSSED = after(new(), ev.StopAsked(0))


def report(me: Instance, event: ev.Event) -> str:
    """The text of the note about an impossible event, which starts no operation and changes no state."""
    after_it, effects = does(me, event)
    assert (after_it.state, after_it.op, after_it.op_gen) == (me.state, me.op, me.op_gen)
    assert [type(effect) for effect in effects if isinstance(effect, (ev.Note, ev.Run))] == [ev.Note]
    note = effects[0]
    assert isinstance(note, ev.Note)
    assert note.name == ("gpu.grant_unexpected" if isinstance(event, ev.Granted) else "instance.impossible_event")
    return note.message


@pytest.mark.parametrize("name", [name for name, me in EVERY.items() if not (me.stop or me.state.terminal)])
def test_a_second_created_starts_nothing(name: str) -> None:
    report(EVERY[name], ev.Created())


def test_a_stop_that_crosses_created_wins() -> None:
    assert does(CROSSED, ev.Created()) == (CROSSED, [])
    assert does(STOPPED, ev.Created()) == (STOPPED, [])


@pytest.mark.parametrize(
    ("me", "event"),
    [
        (RUNNING, ev.Granted(GPU)),
        (PULLING, ev.GpusLost("A: XID 79")),
        (BUSY, ev.FirstRequestStarted()),
        (FROZEN, ev.FirstRequestStarted()),
        (RUNNING, ev.LastRequestEnded()),
        (RUNNING, ev.WaitersAppeared()),
        (LOCKING, ev.IdleTimer(LOCKING.idle_gen)),
        (STOPPING, ev.StopTimer(STOPPING.op_gen)),
        (RUNNING, ev.Succeeded(RUNNING.op_gen)),
        (LOCKING, ev.Refused(LOCKING.op_gen + 1, CANCELLED)),
        (FROZEN, ev.Broken(FROZEN.op_gen, "UNKNOWN")),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, Instance) else value.state.value,
)
def test_an_event_that_only_a_bug_can_send_is_reported(me: Instance, event: ev.Event) -> None:
    report(me, event)


def test_grant_during_the_pull_is_reported_and_released() -> None:
    me, effects = does(PULLING, ev.Granted(GPU))
    assert (me.holds, kinds(effects)) == (False, ["Note", "ReleaseGpus"])


def test_a_report_tells_the_fields_and_the_latest_steps() -> None:
    message = report(replace(RUNNING, refusals=2), ev.Succeeded(9))
    assert message.startswith("Succeeded(gen=9) in RUNNING: uid=ocr, ")
    assert "refusals=2" in message
    assert message.endswith("0.000 s ago Granted(gpus=('GPU-A',)) -> STARTING; 0.000 s ago Succeeded(gen=2) -> RUNNING")
    me = RUNNING
    for _ in range(20):
        me = ok(ok(after(me, ev.FreezeAsked())))
        me = ok(after(me, ev.WakeAsked(0, AT + SECOND_NS), ev.Granted(GPU)))
    assert report(me, ev.Succeeded(9999)).count(" s ago ") == 8, "bounded"
