"""The life of one instance: `step(instance, event, at) -> (instance, effects)`, the only code that changes its state.

| state | a waiting request | the operation succeeds | refused (rolled back) / broken (state unknown) |
|---|---|---|---|
| STARTING | waits | RUNNING | FAILED |
| RUNNING | is granted by the gate | - | - |
| FREEZING (lock, checkpoint) | undoes it before the checkpoint | FROZEN or WAITING_GPU | RUNNING, back-off / FAILED |
| FROZEN | WAITING_GPU | - | - |
| WAITING_GPU | waits | GPUs granted: RESTORING | last waiter left: FROZEN |
| RESTORING | waits | RUNNING | FROZEN without waiters; else one retry (elsewhere if movable), then FAILED / FAILED |
| STOPPING | is refused | STOPPED | FAILED |

One operation runs at a time. `op_gen` marks answers of earlier operations as stale, `idle_gen` earlier idle timers.
The gate reports only edges (first request started, last ended, waiters appeared, waiters gone), so most requests of a
busy instance never reach this module. An event that no correct caller sends in the current state is reported as a
`Note` with the instance's fields and latest steps.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import assert_never

from agent.core.lifecycle import events as ev
from agent.core.lifecycle.events import Effect, Event, Note, Operation
from agent.core.lifecycle.instance import Instance as Instance  # noqa: PLC0414 (re-exported)
from agent.core.types import SECOND_NS, InstanceState

MAX_RESTORES = 2
PRE_FREEZE_FAILED = "PRE_FREEZE_FAILED"
CANCELLED = "CANCELLED"
PAUSED = "EXTERNALLY_FROZEN"
_PAUSED_MESSAGE = "paused from outside (docker pause) until its cgroup is thawed; its requests go elsewhere or wait"
_STOPPING_MESSAGE = "the instance is being stopped"
_HISTORY = 8
_ADMITTING = (InstanceState.RUNNING, InstanceState.STOPPING)
_NOT_IN_QUEUE = (InstanceState.FROZEN, InstanceState.STOPPING)

Step = tuple[Instance, list[Effect]]


def step(me: Instance, event: Event, at: int) -> Step:
    """Apply `event` at monotonic time `at` (ns). Pure: the caller performs the effects in order, without awaiting."""
    if me.state.terminal:
        return _after_the_end(me, event)
    new, effects = _apply(me, event, at)
    if new.op_gen != me.op_gen or new.op is not me.op or new.state is not me.state:
        new = replace(new, history=(*me.history[1 - _HISTORY :], (at, event, new.state)))
    return (new, [_report(me, event, at), *effects]) if _is_impossible(me, event) else (new, effects)


def _is_impossible(me: Instance, event: Event) -> bool:
    """Whether only a bug can send `event` now, as opposed to a stale answer or timer, a repeat, or a crossing.

    Crossings: a grant or a GPU loss with a withdrawal (FROZEN) or a stop; `Created` with a stop.
    """
    match event:
        case ev.Created():
            return not (me.is_new or me.stop)
        case ev.Granted() | ev.GpusLost():
            return not (me.in_gpu_queue or (me.state in _NOT_IN_QUEUE and not me.holds))
        case ev.FirstRequestStarted():
            return me.busy or me.state not in _ADMITTING
        case ev.LastRequestEnded():
            return not me.busy or me.state not in _ADMITTING
        case ev.WaitersAppeared():
            return me.gate_open
        case ev.IdleTimer(gen):
            return gen >= me.idle_gen and not me.can_freeze
        case ev.StopTimer(gen):
            return gen >= me.op_gen and not (me.state is InstanceState.STOPPING and me.op is None)
        case ev.Succeeded(gen) | ev.Refused(gen) | ev.Broken(gen):
            return gen >= me.op_gen and not _current(me, gen)
        case _:
            return False


def _report(me: Instance, event: Event, at: int) -> Note:
    """The note of an impossible event: the fields of `me` that differ from their defaults, and the latest steps."""
    shown = {field.name: (getattr(me, field.name), field.default) for field in fields(me) if field.repr}
    now = ", ".join(f"{name}={value}" for name, (value, default) in shown.items() if value != default)
    past = "".join(f"; {(at - then) / SECOND_NS:.3f} s ago {e} -> {state.value}" for then, e, state in me.history)
    name = "gpu.grant_unexpected" if isinstance(event, ev.Granted) else "instance.impossible_event"
    return Note(name, f"{event} in {me.state.value}: {now}{past}")


def _apply(me: Instance, event: Event, at: int) -> Step:  # noqa: C901, PLR0911, PLR0912 - one flat table reads best
    match event:
        case ev.Created():  # PREPARE comes before the GPUs: none is held while a container image is pulled
            return _run(me, Operation.PREPARE) if me.is_new else (me, [])
        case ev.Granted(gpus):
            return _granted(me, gpus)
        case ev.FirstRequestStarted():
            me = replace(me, busy=True, idle_gen=me.idle_gen + 1, hold_ns=0, hold_until_ns=0)
            return me, [ev.ReportActivity(idle=False)]
        case ev.LastRequestEnded():
            return _when_idle(replace(me, busy=False), at)
        case ev.WaitersAppeared():
            return _with_waiters(replace(me, has_waiters=True), at)
        case ev.WaitersGone():
            return _without_waiters(replace(me, has_waiters=False), at)
        case ev.ExecActive(inside):
            me = replace(me, exec_active=inside, idle_gen=me.idle_gen + 1)
            return (me, [ev.ReportActivity(idle=False)]) if inside or me.busy else _when_idle(me, at)
        case ev.WakeAsked(hold_ns, until_ns):
            return _wake_asked(me, hold_ns, until_ns, at)
        case ev.WakeExpired():
            return _without_waiters(me, at)
        case ev.IdleTimer(gen):
            if gen != me.idle_gen or not me.can_freeze:
                return me, []
            return _begin_freeze(me, ordered=False)
        case ev.FreezeAsked():
            return _begin_freeze(me, ordered=False) if me.can_freeze else (me, [])
        case ev.FreezeOrdered():
            return _begin_freeze(me, ordered=True) if me.can_freeze else (me, [ev.OrderedFreezeRefused()])
        case ev.DrainOrdered():
            return _drain(me)
        case ev.GpusLost(message):
            return _fail(me, "GPU_LOST", message) if me.in_gpu_queue else (me, [])
        case ev.Paused(paused):
            return _paused(me, paused, at)
        case ev.StopAsked(grace_ns, force, reason, message):
            return _stop_asked(me, grace_ns, force, reason, message, at)
        case ev.StopTimer(gen):
            if me.state is InstanceState.STOPPING and me.op is None and gen == me.op_gen:
                return _run(replace(me, stop_force=True), Operation.STOP)
            return me, []
        case ev.Succeeded(gen):
            return _succeeded(me, at) if _current(me, gen) else (me, [])
        case ev.Refused(gen, reason, message):
            return _refused(me, reason, message, at) if _current(me, gen) else (me, [])
        case ev.Broken(gen, reason, message):
            return _fail(me, reason, message) if _current(me, gen) else (me, [])
        case ev.Exited(reason, message):
            return _exited(me, reason, message)
        case _:
            assert_never(event)


def _current(me: Instance, gen: int) -> bool:
    return me.op is not None and gen == me.op_gen


def _run(me: Instance, op: Operation) -> Step:
    gen = me.op_gen + 1
    return replace(me, op=op, op_gen=gen), [ev.Run(op, gen, me.gpus)]


def _after_the_end(me: Instance, event: Event) -> Step:
    """A terminal instance refuses new waiters and gives back a grant that crossed with its end; the rest is stale."""
    match event:
        case ev.WaitersAppeared():
            return me, [ev.RefuseWaiters(me.reason or "INSTANCE_GONE", me.message)]
        case ev.Granted():
            return me, [ev.ReleaseGpus()]
        case _:
            return me, []


def _granted(me: Instance, gpus: tuple[str, ...]) -> Step:
    if me.holds:
        return me, []
    me = replace(me, holds=True, gpus=gpus)
    match me.state:
        case InstanceState.STOPPING:
            return me, []  # the grant crossed with the stop: given back when the stop ends
        case InstanceState.STARTING if me.op is None:
            return _run(me, Operation.START)
        case InstanceState.WAITING_GPU:
            return _run(replace(me, state=InstanceState.RESTORING, restores=me.restores + 1), Operation.WAKE)
        case _:
            return _release(me)


def _release(me: Instance) -> Step:
    if not me.holds:
        return me, []
    return replace(me, holds=False), [ev.ReleaseGpus()]


def _with_waiters(me: Instance, at: int) -> Step:
    """A request, or a wake that was asked for, waits for this instance to be awake."""
    match me.state:
        case InstanceState.FROZEN:
            return replace(me, state=InstanceState.WAITING_GPU, restores=0), [ev.RequestGpus()]
        case InstanceState.FREEZING if not me.ordered and me.op is Operation.LOCK:
            return me, [ev.AskCancel(me.op_gen)]
        case InstanceState.STOPPING | InstanceState.RUNNING if me.stop:
            return me, [ev.RefuseWaiters("INSTANCE_STOPPING", _STOPPING_MESSAGE)]
        case InstanceState.RUNNING if me.paused:
            return me, [ev.RefuseWaiters(PAUSED, _PAUSED_MESSAGE)]
        case _:
            return me, []


def _wake_asked(me: Instance, hold_ns: int, until_ns: int, at: int) -> Step:
    me = replace(me, hold_ns=max(me.hold_ns, hold_ns), wake_until_ns=max(me.wake_until_ns, until_ns))
    if not me.gate_open:  # starting, frozen, waking, paused, stopping, or about to give up its GPUs
        return _with_waiters(me, at)
    me = replace(me, wake_until_ns=0)
    return _when_idle(me, at) if not me.busy else (replace(me, hold_ns=0), [])


def _without_waiters(me: Instance, at: int) -> Step:
    if me.state is InstanceState.WAITING_GPU and not me.awaited(at):
        return replace(me, state=InstanceState.FROZEN), [ev.WithdrawRequest()]
    if me.state is InstanceState.RUNNING and not me.busy:
        return _when_idle(me, at)
    return me, []


def _when_idle(me: Instance, at: int) -> Step:
    """Decide what follows when a RUNNING or STOPPING instance has no request inside, also right after a wake."""
    if me.state is InstanceState.STOPPING:
        return _run(me, Operation.STOP) if me.op is None else (me, [])
    if me.state is not InstanceState.RUNNING:
        return me, []
    if me.stop:
        return _begin_stop(me, at)
    if me.paused:
        return me, []  # it can't be frozen and answers no hook: decided again when it is resumed
    if me.draining and me.freezable:
        return _begin_freeze(me, ordered=True)
    if me.has_waiters or me.exec_active:
        return me, []  # waiters enter as the gate opens, or a command runs: the GPU allocator never sees it idle
    hold_until = max(me.hold_until_ns, at + me.hold_ns if me.hold_ns else 0)
    freeze_at = max(at + me.freeze_after_ns, me.retry_at_ns, hold_until)
    me = replace(me, idle_gen=me.idle_gen + 1, hold_ns=0, hold_until_ns=hold_until)
    # The back-off counts from the refused freeze: counted from here, occasional requests would renew it for ever.
    idle = ev.ReportActivity(True, max(hold_until, me.awake_since_ns + me.min_awake_ns, me.retry_at_ns))
    return me, [idle, ev.SetIdleTimer(me.idle_gen, freeze_at)] if me.freezable else [idle]


def _begin_freeze(me: Instance, *, ordered: bool) -> Step:
    me = replace(me, state=InstanceState.FREEZING, ordered=ordered, idle_gen=me.idle_gen + 1, hold_until_ns=0)
    me, effects = _run(me, Operation.LOCK)
    return me, [ev.ClosePool(), *effects]


def _drain(me: Instance) -> Step:
    if me.state is not InstanceState.RUNNING or not me.freezable or me.stop or me.paused or me.exec_active:
        return me, [ev.OrderedFreezeRefused()]
    me = replace(me, draining=True)
    return (me, []) if me.busy else _begin_freeze(me, ordered=True)


def _paused(me: Instance, paused: bool, at: int) -> Step:
    """A pause closes the gate; no driver call is made until it ends. It counts only in RUNNING: in other states the
    agent's own freeze may have stopped the threads."""
    if paused is me.paused or (paused and me.state is not InstanceState.RUNNING):
        return me, []
    was_draining = me.draining
    me = replace(me, paused=paused, draining=False, idle_gen=me.idle_gen + 1)
    if not paused:
        me, effects = (me, []) if me.busy else _when_idle(me, at)
        return me, [Note("instance.externally_thawed", ""), *effects]
    effects = [Note("instance.externally_frozen", _PAUSED_MESSAGE), ev.ClosePool()]
    if was_draining:
        effects.append(ev.OrderedFreezeRefused())
    # A pause may last for ever: the GPU allocator must not count on these GPUs.
    return me, [*effects, ev.ReportActivity(idle=False), ev.RefuseWaiters(PAUSED, _PAUSED_MESSAGE)]


def _succeeded(me: Instance, at: int) -> Step:
    """After an operation that succeeded: begin the next one, or enter the state it leads to."""
    op, me = me.op, replace(me, op=None)
    match op:
        case Operation.PREPARE:
            return _begin_stop(me, at) if me.stop else (me, [ev.RequestGpus()])
        case Operation.START | Operation.WAKE:
            me = replace(me, state=InstanceState.RUNNING, awake_since_ns=at, restores=0, wake_until_ns=0)
            return _when_idle(replace(me, ordered=False, draining=False), at)
        case Operation.LOCK if me.stop or (me.awaited(at) and not me.ordered):
            return _run(me, Operation.UNLOCK)
        case Operation.LOCK:
            return _run(me, Operation.CHECKPOINT)
        case Operation.UNLOCK:
            return _when_idle(_running_again(me), at)
        case Operation.CHECKPOINT:
            return _frozen(me, at)
        case Operation.STOP:
            me = replace(me, state=InstanceState.STOPPED)
            me, effects = _release(me)
            return me, [*effects, ev.RefuseWaiters(me.reason or "INSTANCE_STOPPED", me.message)]
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
        return replace(me, state=InstanceState.WAITING_GPU, restores=0), [*effects, ev.RequestGpus()]
    return me, effects


def _refused(me: Instance, reason: str, message: str, at: int) -> Step:
    """After an operation that was rolled back: return to the state before it, retry, stop or fail."""
    op, me = me.op, replace(me, op=None)
    match op:
        case Operation.LOCK if reason == PRE_FREEZE_FAILED:
            return _begin_stop(replace(_running_again(me), stop=True, reason=reason, message=message), at)
        case Operation.LOCK | Operation.CHECKPOINT:
            cancelled = reason == CANCELLED
            effects: list[Effect] = [ev.OrderedFreezeRefused()] if me.ordered or me.draining else []
            if not cancelled:
                effects.append(Note("instance.freeze_refused", f"{reason}: {message}"))
                me = replace(me, refusals=me.refusals + 1, refusal=f"{reason}: {message}")
                me = replace(me, retry_at_ns=at + me.back_off_ns)
            me = _running_again(me)
            if reason != PAUSED:
                me, more = _when_idle(me, at)
            elif me.stop:  # by force, as it can answer nothing: a pause may last for ever
                me, more = _begin_stop(replace(me, paused=True), at)
            else:
                me, more = _paused(me, True, at)
            return me, [*effects, *more]
        case Operation.WAKE if me.restores < MAX_RESTORES and not me.stop:
            return _restore_refused(me, f"{reason}: {message}", at)
        case Operation.PREPARE | Operation.START | Operation.WAKE if me.stop:  # a stop needs no awake instance
            return _begin_stop(me, at)
        case Operation.DESTROY | None:
            return me, []
        case Operation.PREPARE | Operation.UNLOCK | Operation.START | Operation.WAKE | Operation.STOP:
            return _fail(me, reason, message)
        case _:
            assert_never(op)


def _restore_refused(me: Instance, why: str, at: int) -> Step:
    """The image is intact and one restore is left: try it, preferably on other GPUs if the instance is movable."""
    if not me.awaited(at):  # no request or wake waits: a retry might take a GPU from another instance for nothing
        me, effects = _release(replace(me, state=InstanceState.FROZEN))
        return me, [Note("instance.restore_refused", why), *effects]
    retried = Note("instance.restore_retried", f"failed on {', '.join(me.gpus)}: {why}")
    if me.movable:
        me, effects = _release(replace(me, state=InstanceState.WAITING_GPU))
        return me, [retried, *effects, ev.RequestGpus(avoid=me.gpus)]
    me, effects = _run(replace(me, restores=me.restores + 1), Operation.WAKE)
    return me, [retried, *effects]


def _fail(me: Instance, reason: str, message: str) -> Step:
    """FAILED: destroy what is left, release the GPUs, refuse the waiters so that they are dispatched elsewhere."""
    was_queued = me.in_gpu_queue
    gen = me.op_gen + 1
    me = replace(me, state=InstanceState.FAILED, op=None, op_gen=gen, idle_gen=me.idle_gen + 1)
    me = replace(me, reason=reason, message=message)
    effects: list[Effect] = [ev.Run(Operation.DESTROY, gen, me.gpus)]
    if was_queued:
        effects.append(ev.WithdrawRequest())
    me, released = _release(me)
    return me, [*effects, *released, ev.RefuseWaiters(reason, message)]


def _exited(me: Instance, reason: str, message: str) -> Step:
    if me.state is InstanceState.STOPPING:
        return (me, []) if me.op is not None else _run(me, Operation.STOP)
    return _fail(me, reason, message)


def _stop_asked(me: Instance, grace_ns: int, force: bool, reason: str, message: str, at: int) -> Step:
    if me.stop and not (force and not me.stop_force):
        return me, []
    me = replace(me, stop=True, stop_force=me.stop_force or force, stop_grace_ns=grace_ns)
    me = replace(me, reason=me.reason or reason, message=me.message or message)
    if me.op is not None:
        hurry = me.op is Operation.STOP and me.stop_force
        cancel = hurry or me.op in (Operation.PREPARE, Operation.LOCK, Operation.START)
        return me, [ev.AskCancel(me.op_gen)] if cancel else []
    return _begin_stop(me, at)


def _begin_stop(me: Instance, at: int) -> Step:
    """Stop, with no operation under way: a frozen instance is killed without a wake, a busy one is drained first."""
    was_queued = me.in_gpu_queue
    force = me.stop_force or me.paused or me.state not in _ADMITTING
    me = replace(me, state=InstanceState.STOPPING, stop=True, stop_force=force, idle_gen=me.idle_gen + 1)
    effects: list[Effect] = [ev.WithdrawRequest()] if was_queued else []
    effects.append(ev.RefuseWaiters(me.reason or "INSTANCE_STOPPING", me.message or _STOPPING_MESSAGE))
    if me.busy and not me.stop_force:
        return me, [*effects, ev.SetStopTimer(me.op_gen, at + me.stop_grace_ns)]
    me, run = _run(me, Operation.STOP)
    return me, [*effects, *run]
