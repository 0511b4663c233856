"""The life of one instance: `step(instance, event, at) -> (instance, effects)`, the only transition code.

| state | a request waits | the operation succeeds | refused (rolled back) / broken (unknown) |
|---|---|---|---|
| STARTING | waits | RUNNING | FAILED |
| RUNNING | is granted by the gate | - | - |
| FREEZING (lock, checkpoint) | undoes it before the checkpoint | FROZEN or WAITING_GPU | RUNNING, back-off / FAILED |
| FROZEN | WAITING_GPU | - | - |
| WAITING_GPU | waits | granted: RESTORING | nobody waits any more: FROZEN |
| RESTORING | waits | RUNNING | FROZEN if nobody waits; once more (elsewhere if it may move), then FAILED / FAILED |
| STOPPING | refused | STOPPED | FAILED |

One operation at a time: `op_gen` discards the answers of operations that no longer count, `idle_gen` stale timers.
Requests reach this machine only as edges (the first granted, the last ended, the first waiting, nobody waiting), so
that a request in the middle of a busy instance costs two counter changes in `slots.py` and nothing here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from agent.core.lifecycle.events import (
    AskCancel,
    Became,
    Broken,
    ClosePool,
    Created,
    DrainOrdered,
    Effect,
    Event,
    ExecActive,
    Exited,
    FirstRequestStarted,
    FreezeAsked,
    FreezeOrdered,
    GpusLost,
    Granted,
    IdleTimer,
    LastRequestEnded,
    Note,
    Operation,
    OrderedFreezeRefused,
    Paused,
    Refused,
    RefuseWaiters,
    Release,
    Run,
    SetIdleTimer,
    SetStopTimer,
    StopAsked,
    StopTimer,
    Succeeded,
    WaitersAppeared,
    WaitersGone,
    WakeAsked,
    WakeExpired,
    Want,
    Withdraw,
)
from agent.core.lifecycle.instance import Instance as Instance  # noqa: PLC0414 (re-exported)
from agent.core.types import InstanceState

MAX_RESTORES = 2
PRE_FREEZE_FAILED = "PRE_FREEZE_FAILED"
CANCELLED = "CANCELLED"
PAUSED = "EXTERNALLY_FROZEN"
_PAUSE = "paused by somebody else until its cgroup is thawed (docker unpause); its requests go elsewhere, or wait"


Step = tuple[Instance, list[Effect]]


def step(me: Instance, event: Event, at: int) -> Step:  # noqa: C901, PLR0911, PLR0912 - one flat table is easiest to read
    """Apply `event` at monotonic time `at` (ns). Pure: the caller performs the effects in order, without awaiting."""
    if me.state.terminal:
        return _after_the_end(me, event)
    match event:
        case Created():
            return _run(me, Operation.PREPARE)  # before the GPU: nobody holds one while an image is pulled
        case Granted(gpus):
            return _granted(me, gpus)
        case FirstRequestStarted():
            me = replace(me, busy=True, idle_gen=me.idle_gen + 1, hold_ns=0, hold_until_ns=0)
            return me, [Became(idle=False)]
        case LastRequestEnded():
            return _settle(replace(me, busy=False), at)
        case WaitersAppeared():
            return _call(replace(me, wanted=True), at)
        case WaitersGone():
            return _give_up_waiting(replace(me, wanted=False), at)
        case ExecActive(inside):
            me = replace(me, visited=inside, idle_gen=me.idle_gen + 1)
            return (me, [Became(idle=False)]) if inside or me.busy else _settle(me, at)
        case WakeAsked(hold_ns, until_ns):
            return _wake_asked(me, hold_ns, until_ns, at)
        case WakeExpired():
            return _give_up_waiting(me, at)
        case IdleTimer(gen):
            if gen != me.idle_gen or not me.can_freeze:
                return me, []
            return _begin_freeze(me, ordered=False)
        case FreezeAsked():
            return _begin_freeze(me, ordered=False) if me.can_freeze else (me, [])
        case FreezeOrdered():
            return _begin_freeze(me, ordered=True) if me.can_freeze else (me, [OrderedFreezeRefused()])
        case DrainOrdered():
            return _drain(me)
        case GpusLost(message):
            return _fail(me, "GPU_LOST", message) if me.asks else (me, [])
        case Paused(paused):
            return _paused(me, paused, at)
        case StopAsked(grace_ns, force, reason, message):
            return _stop_asked(me, grace_ns, force, reason, message, at)
        case StopTimer(gen):
            if me.state is InstanceState.STOPPING and me.op is None and gen == me.op_gen:
                return _run(replace(me, stop_force=True), Operation.STOP)
            return me, []
        case Succeeded(gen):
            return _succeeded(me, at) if _current(me, gen) else (me, [])
        case Refused(gen, reason, message):
            return _refused(me, reason, message, at) if _current(me, gen) else (me, [])
        case Broken(gen, reason, message):
            return _fail(me, reason, message) if _current(me, gen) else (me, [])
        case Exited(reason, message):
            return _exited(me, reason, message)
        case _:
            assert_never(event)


def _current(me: Instance, gen: int) -> bool:
    return me.op is not None and gen == me.op_gen


def _run(me: Instance, op: Operation) -> Step:
    gen = me.op_gen + 1
    return replace(me, op=op, op_gen=gen), [Run(op, gen, me.gpus)]


def _after_the_end(me: Instance, event: Event) -> Step:
    """A terminal instance only refuses those who still come, and gives back a grant that crossed its end."""
    match event:
        case WaitersAppeared():
            return me, [RefuseWaiters(me.reason or "INSTANCE_GONE", me.message)]
        case Granted():
            return me, [Release()]
        case _:
            return me, []


def _granted(me: Instance, gpus: tuple[str, ...]) -> Step:
    if me.holds:
        return me, [Note("gpu.grant_unexpected", "")]
    me = replace(me, holds=True, gpus=gpus)
    match me.state:
        case InstanceState.STOPPING:
            return me, []  # the grant and the stop crossed: given back at the stop's end
        case InstanceState.STARTING if me.op is None:
            return _run(me, Operation.START)
        case InstanceState.WAITING_GPU:
            return _run(replace(me, state=InstanceState.RESTORING, restores=me.restores + 1), Operation.WAKE)
        case _:
            return _release(me)


def _release(me: Instance) -> Step:
    if not me.holds:
        return me, []
    return replace(me, holds=False), [Release()]


def _call(me: Instance, at: int) -> Step:
    """Somebody waits for this instance to be awake."""
    match me.state:
        case InstanceState.FROZEN:
            return replace(me, state=InstanceState.WAITING_GPU, restores=0), [Want()]
        case InstanceState.FREEZING if not me.ordered and me.op is Operation.LOCK:
            return me, [AskCancel(me.op_gen)]
        case InstanceState.STOPPING:
            return me, [RefuseWaiters("INSTANCE_STOPPING", "the instance is being stopped")]
        case InstanceState.RUNNING if me.stop:
            return me, [RefuseWaiters("INSTANCE_STOPPING", "the instance is being stopped")]
        case InstanceState.RUNNING if me.paused:
            return me, [RefuseWaiters(PAUSED, _PAUSE)]
        case _:
            return me, []


def _wake_asked(me: Instance, hold_ns: int, until_ns: int, at: int) -> Step:
    me = replace(me, hold_ns=max(me.hold_ns, hold_ns), wake_until_ns=max(me.wake_until_ns, until_ns))
    if not me.gate_open:  # asleep, on its way, or about to give up its GPU
        return _call(me, at)
    me = replace(me, wake_until_ns=0)
    return _settle(me, at) if not me.busy else (replace(me, hold_ns=0), [])


def _give_up_waiting(me: Instance, at: int) -> Step:
    if me.state is InstanceState.WAITING_GPU and not me.awaited(at):
        return replace(me, state=InstanceState.FROZEN), [Withdraw()]
    if me.state is InstanceState.RUNNING and not me.busy:
        return _settle(me, at)
    return me, []


def _settle(me: Instance, at: int) -> Step:
    """RUNNING (or STOPPING) with nobody inside: decide what comes next. Also called right after a wake."""
    if me.state is InstanceState.STOPPING:
        return _run(me, Operation.STOP) if me.op is None else (me, [])
    if me.state is not InstanceState.RUNNING:
        return me, []
    if me.stop:
        return _begin_stop(me, at)
    if me.paused:
        return me, []  # it can't be frozen, and answers nobody: looked at again when it goes on
    if me.draining and me.freezable:
        return _begin_freeze(me, ordered=True)
    if me.wanted or me.visited:
        return me, []  # the gate opens now and grants them: never idle in the eyes of the GPU book
    hold_until = max(me.hold_until_ns, at + me.hold_ns if me.hold_ns else 0)
    freeze_at = max(at + me.freeze_after_ns, me.retry_at_ns, hold_until)
    me = replace(me, idle_gen=me.idle_gen + 1, hold_ns=0, hold_until_ns=hold_until)
    # From the refusal on, not from here: with a request now and then it would else never give way to anybody.
    became = Became(idle=True, preemptible_at_ns=max(hold_until, me.awake_since_ns + me.min_awake_ns, me.retry_at_ns))
    if not me.freezable:
        return me, [became]
    return me, [became, SetIdleTimer(me.idle_gen, freeze_at)]


def _begin_freeze(me: Instance, *, ordered: bool) -> Step:
    me = replace(me, state=InstanceState.FREEZING, ordered=ordered, idle_gen=me.idle_gen + 1, hold_until_ns=0)
    me, effects = _run(me, Operation.LOCK)
    return me, [ClosePool(), *effects]


def _drain(me: Instance) -> Step:
    if me.state is not InstanceState.RUNNING or not me.freezable or me.stop or me.paused or me.visited:
        return me, [OrderedFreezeRefused()]
    me = replace(me, draining=True)
    return (me, []) if me.busy else _begin_freeze(me, ordered=True)


def _paused(me: Instance, paused: bool, at: int) -> Step:
    """A pause closes the gate; nothing is asked of the driver until it ends. Only an awake instance can tell it from
    our own freeze."""
    if paused is me.paused or (paused and me.state is not InstanceState.RUNNING):
        return me, []
    gives_way = me.draining
    me = replace(me, paused=paused, draining=False, idle_gen=me.idle_gen + 1)
    note = Note(PAUSED, _PAUSE) if paused else Note("EXTERNALLY_THAWED", "")
    if paused:  # nobody knows for how long: the book must not count on its GPUs
        refusal: list[Effect] = [OrderedFreezeRefused()] if gives_way else []
        return me, [note, ClosePool(), *refusal, Became(idle=False), RefuseWaiters(PAUSED, _PAUSE)]
    me, effects = _settle(me, at) if not me.busy else (me, [])
    return me, [note, *effects]


def _succeeded(me: Instance, at: int) -> Step:
    """The current operation did what it should."""
    op, me = me.op, replace(me, op=None)
    match op:
        case Operation.PREPARE:
            return _begin_stop(me, at) if me.stop else (me, [Want()])
        case Operation.START | Operation.WAKE:
            me = replace(me, state=InstanceState.RUNNING, awake_since_ns=at, restores=0, wake_until_ns=0)
            return _settle(replace(me, ordered=False, draining=False), at)
        case Operation.LOCK if me.stop or (me.awaited(at) and not me.ordered):
            return _run(me, Operation.UNLOCK)
        case Operation.LOCK:
            return _run(me, Operation.CHECKPOINT)
        case Operation.UNLOCK:
            return _settle(_running_again(me), at)
        case Operation.CHECKPOINT:
            return _frozen(me, at)
        case Operation.STOP:
            me = replace(me, state=InstanceState.STOPPED)
            me, effects = _release(me)
            return me, [*effects, RefuseWaiters(me.reason or "INSTANCE_STOPPED", me.message)]
        case Operation.DESTROY | None:
            return me, []
        case _:
            assert_never(op)


def _running_again(me: Instance) -> Instance:
    return replace(me, state=InstanceState.RUNNING, ordered=False, draining=False, wake_until_ns=0)


def _frozen(me: Instance, at: int) -> Step:
    me = replace(me, state=InstanceState.FROZEN, ordered=False, draining=False, refusals=0, refusal="", retry_at_ns=0)
    me, effects = _release(me)
    if me.stop:
        me, more = _begin_stop(me, at)
        return me, [*effects, *more]
    if me.awaited(at):
        return replace(me, state=InstanceState.WAITING_GPU, restores=0), [*effects, Want()]
    return me, effects


def _refused(me: Instance, reason: str, message: str, at: int) -> Step:
    """The current operation was rolled back."""
    op, me = me.op, replace(me, op=None)
    match op:
        case Operation.LOCK if reason == PRE_FREEZE_FAILED:
            return _begin_stop(replace(_running_again(me), stop=True, reason=reason, message=message), at)
        case Operation.LOCK | Operation.CHECKPOINT:
            cancelled = reason == CANCELLED
            effects: list[Effect] = [OrderedFreezeRefused()] if me.ordered or me.draining else []
            if not cancelled:
                effects.append(Note("instance.freeze_refused", f"{reason}: {message}"))
                me = replace(me, refusals=me.refusals + 1, refusal=f"{reason}: {message}")
                me = replace(me, retry_at_ns=at + me.back_off_ns)
            me = _running_again(me)
            me, more = _paused(me, True, at) if reason == PAUSED else _settle(me, at)
            return me, [*effects, *more]
        case Operation.WAKE if me.restores < MAX_RESTORES and not me.stop:
            return _restore_refused(me, f"{reason}: {message}", at)
        case Operation.PREPARE | Operation.START | Operation.WAKE if (
            me.stop
        ):  # cut short, or frozen as before: it need not be awake to end
            return _begin_stop(me, at)
        case Operation.DESTROY | None:
            return me, []
        case (
            Operation.PREPARE | Operation.UNLOCK | Operation.START | Operation.WAKE | Operation.STOP
        ):  # an instance that stays locked answers nobody
            return _fail(me, reason, message)
        case _:
            assert_never(op)


def _restore_refused(me: Instance, why: str, at: int) -> Step:
    """Frozen as before, and there is another attempt: where it may move on another GPU, else in place."""
    if not me.awaited(at):  # whom it was for has left: nobody gives a GPU up for a second attempt
        me, effects = _release(replace(me, state=InstanceState.FROZEN))
        return me, [Note("instance.restore_refused", why), *effects]
    retried = Note("instance.restore_retried", f"on {', '.join(me.gpus)}: {why}")
    if me.movable:
        me, effects = _release(replace(me, state=InstanceState.WAITING_GPU))
        return me, [retried, *effects, Want(avoid=me.gpus)]
    me, effects = _run(replace(me, restores=me.restores + 1), Operation.WAKE)
    return me, [retried, *effects]


def _fail(me: Instance, reason: str, message: str) -> Step:
    """FAILED: kill what is left, give the GPUs back on proof, send the waiters elsewhere."""
    asked = me.asks
    gen = me.op_gen + 1
    me = replace(
        me,
        state=InstanceState.FAILED,
        op=None,
        op_gen=gen,
        idle_gen=me.idle_gen + 1,
        reason=reason,
        message=message,
    )
    effects: list[Effect] = [Run(Operation.DESTROY, gen, me.gpus)]
    if asked:
        effects.append(Withdraw())
    me, released = _release(me)
    return me, [*effects, *released, RefuseWaiters(reason, message)]


def _exited(me: Instance, reason: str, message: str) -> Step:
    if me.state is InstanceState.STOPPING:
        return (me, []) if me.op is not None else _run(me, Operation.STOP)
    return _fail(me, reason, message)


def _stop_asked(me: Instance, grace_ns: int, force: bool, reason: str, message: str, at: int) -> Step:
    if me.stop and not (force and not me.stop_force):
        return me, []
    me = replace(
        me,
        stop=True,
        stop_force=me.stop_force or force,
        stop_grace_ns=grace_ns,
        reason=me.reason or reason,
        message=me.message or message,
    )
    if me.op is not None:
        short = me.op in (Operation.PREPARE, Operation.LOCK, Operation.START) or (
            me.op is Operation.STOP and me.stop_force
        )
        return me, [AskCancel(me.op_gen)] if short else []
    return _begin_stop(me, at)


def _begin_stop(me: Instance, at: int) -> Step:
    """No operation runs. A frozen instance is killed without waking it; a busy one is drained first."""
    asked = me.asks
    was_running = me.state is InstanceState.RUNNING or me.state is InstanceState.STOPPING
    stop_reason = me.reason or "INSTANCE_STOPPING"
    me = replace(
        me,
        state=InstanceState.STOPPING,
        stop=True,
        idle_gen=me.idle_gen + 1,
        stop_force=me.stop_force or not was_running or me.paused,
    )
    effects: list[Effect] = [Withdraw()] if asked else []
    effects.append(RefuseWaiters(stop_reason, me.message or "the instance is being stopped"))
    if me.busy and not me.stop_force:
        return me, [*effects, SetStopTimer(me.op_gen, at + me.stop_grace_ns)]
    me, run = _run(me, Operation.STOP)
    return me, [*effects, *run]
