"""One instance's actor: feeds events to `machine.step`, performs the effects, opens and closes the gate.

Everything here is synchronous and runs on the loop's thread, so there is one writer and no lock. An event raised while
effects are performed waits in `_inbox`. Long work is started, never awaited: operations by the executor, GPU grants by
the broker.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Protocol, assert_never

from agent.core.errors import DeadlineError, UnavailableError
from agent.core.instance_record import InstanceRecord
from agent.core.lifecycle import events as ev
from agent.core.lifecycle import machine
from agent.core.lifecycle.machine import Instance
from agent.core.types import FunctionSpec, Handle, InstanceState
from agent.host.instance.context import InstanceContext
from agent.host.instance.gate import AdmissionGate
from agent.host.instance.hooks import function_headers
from agent.http.pool import Pool
from agent.ports import RequestMeter, Timer

MAX_TIMEOUTS_IN_A_ROW = 2


class Executor(Protocol):
    """Runs the operations of one instance, one at a time, and posts each result as an event."""

    def run(self, op: ev.Operation, gen: int) -> None: ...

    def ask_cancel(self, gen: int) -> None: ...


class GpuRequests(Protocol):
    """The GPU broker, as an instance sees it."""

    def request(self, actor: Actor, avoid: tuple[str, ...]) -> None: ...

    def withdraw(self, actor: Actor) -> None: ...

    def release(self, actor: Actor) -> None: ...

    def freeze_refused(self, actor: Actor) -> None: ...

    def report_activity(self, actor: Actor, idle: bool, preemptible_at_ns: int) -> None: ...


class StateListener(Protocol):
    """Metering, reports and history. `state_changed` is called before the gate follows the new state."""

    def state_changed(self, actor: Actor, old: InstanceState, new: InstanceState, at: int) -> None: ...

    def fitness_changed(self, actor: Actor) -> None:
        """The instance was made or is gone for good, or the gateway should now prefer it more or less than before."""

    def load_changed(self, actor: Actor) -> None:
        """The first request is inside, or the last has left. Called on the request path."""


class Listener(StateListener, Protocol):
    """The node, which is also called when the instance has been granted its GPUs."""

    def gpus_held(self, actor: Actor) -> None: ...


@dataclass(slots=True)
class InstanceFigures:
    """What the instance has done so far. Times in ns; `idle_since_ns` is monotonic."""

    create_wall_ns: int = 0
    state_wall_ns: int = 0
    freezes: int = 0
    wakes: int = 0
    last_wake_ns: int = 0
    last_wake_driver_ns: int = 0
    wake_estimate_ns: int = 0
    image_bytes: int = 0
    vram_bytes: int = 0
    timeouts_in_a_row: int = 0
    idle_since_ns: int = 0
    progress: str = ""


class Actor:
    """Owns one instance. Public attributes are for reading (tests/host/test_owners.py checks that): `handle` changes
    the instance, the methods under "what others report" the rest.

    - `gpu_uuids`: the GPUs it was last on; `instance.gpus` are the ones granted to it.
    - `adopted`: an earlier agent started it, and may have woken it.
    - `ended`: set once nothing of it is left.
    """

    def __init__(
        self,
        record: InstanceRecord,
        instance: Instance,
        context: InstanceContext,
        *,
        meter: RequestMeter,
        broker: GpuRequests,
        listener: Listener,
        max_waiting: int,
        executor_of: Callable[[Actor], Executor],
    ) -> None:
        clock, spec = context.clock, record.spec
        self.spec: Final = spec
        self.instance = instance
        self.handle_of_container: Handle | None = None
        self.pool: Pool | None = None
        self.figures: Final = InstanceFigures(record.create_wall_ns, state_wall_ns=clock.wall_ns())
        self.gpu_uuids = record.gpu_uuids
        self.healthy = True
        self.adopted = False
        self.ended: Final = asyncio.Event()
        self.context_headers: Final = function_headers(spec.function)
        self.gate: Final = AdmissionGate(spec.function.instance_concurrency, max_waiting, clock, meter, self)
        self._clock = clock
        self._broker = broker
        self._listener = listener
        self._events = context.events
        self._inbox: deque[ev.Event] = deque()
        self._stepping = False
        self._idle_timer: Timer | None = None
        self._idle_due = (0, 0)
        self._idle_armed_ns = 0
        self._wake_timer: Timer | None = None
        self._waiters: set[asyncio.Future[None]] = set()
        self._execs = 0
        self._closed = False
        self._executor = executor_of(self)

    @property
    def uid(self) -> str:
        return self.spec.uid

    @property
    def function(self) -> FunctionSpec:
        return self.spec.function

    @property
    def state(self) -> InstanceState:
        return self.instance.state

    # ---- events in ----------------------------------------------------------------------------------------------

    def handle(self, event: ev.Event) -> None:
        """Handle one event and all that follow from it. During a step it is only queued, and handled after the step."""
        self._inbox.append(event)
        if self._stepping:
            return
        self._stepping = True
        try:
            while self._inbox:
                self._step(self._inbox.popleft())
        finally:
            self._stepping = False

    def wake(self, hold_ns: int, until_ns: int) -> None:
        """Ask for the instance to be awake: see `events.WakeAsked`."""
        self.handle(ev.WakeAsked(hold_ns, until_ns))
        if self._wake_timer is not None:
            self._wake_timer.cancel()
            self._wake_timer = None
        if self.instance.wake_until_ns:  # the latest of all open wakes
            self._wake_timer = self._clock.call_at(self.instance.wake_until_ns, lambda: self.handle(ev.WakeExpired()))

    def exec_started(self) -> None:
        """A command is about to run inside: no freeze begins before `exec_ended`."""
        self._execs += 1
        if self._execs == 1:
            self.handle(ev.ExecActive(inside=True))

    def exec_ended(self) -> None:
        """That command has ended."""
        self._execs -= 1
        if self._execs == 0 and not self._closed:
            self.handle(ev.ExecActive(inside=False))

    def set_healthy(self, healthy: bool) -> None:
        """Follow the custom health check. Reported, because the gateway then prefers other instances."""
        if healthy is not self.healthy:
            self.healthy = healthy
            self.gate.set_healthy(healthy)
            self._events.add(self.uid, "instance.healthy" if healthy else "instance.unhealthy")
            self._listener.fitness_changed(self)

    def first_request_started(self) -> None:
        self.handle(ev.FirstRequestStarted())

    def last_request_ended(self) -> None:
        self.handle(ev.LastRequestEnded())

    def waiters_appeared(self) -> None:
        self.handle(ev.WaitersAppeared())

    def waiters_gone(self) -> None:
        self.handle(ev.WaitersGone())

    # ---- what others report -------------------------------------------------------------------------------------

    def adopt(self, gpu_bytes: int, *, sees_all_gpus: bool) -> None:
        """Recovery: the instance outlived an earlier agent. `gpu_bytes`: size of its image if FROZEN, else its VRAM."""
        me, frozen = self.instance, self.state is InstanceState.FROZEN
        holds = self.state is InstanceState.RUNNING
        self.instance = replace(me, holds=holds, gpus=self.gpu_uuids, movable=me.movable and sees_all_gpus)
        self.adopted = True
        self.figures.idle_since_ns = self._clock.monotonic_ns()
        self.figures.image_bytes, self.figures.vram_bytes = (gpu_bytes, 0) if frozen else (0, gpu_bytes)

    def attach_container(self, handle: Handle, pool: Pool) -> None:
        """Its container runs, and `pool` reaches its server."""
        self.handle_of_container, self.pool = handle, pool

    def set_gpus(self, gpu_uuids: tuple[str, ...]) -> None:
        """It was started or restored on these GPUs."""
        self.gpu_uuids = gpu_uuids

    def set_progress(self, text: str) -> None:
        """What its start is doing, for users."""
        self.figures.progress = text

    def note_vram(self, vram_bytes: int) -> None:
        self.figures.vram_bytes = vram_bytes

    def note_freeze(self, image_bytes: int) -> None:
        """A checkpoint succeeded."""
        self.figures.image_bytes = image_bytes
        self.figures.freezes += 1

    def note_wake(self, took_ns: int, driver_ns: int) -> None:
        """A wake succeeded; `driver_ns` of it were the driver's own calls."""
        figures = self.figures
        figures.wakes += 1
        figures.last_wake_ns, figures.last_wake_driver_ns = took_ns, driver_ns
        average_ns = figures.wake_estimate_ns
        figures.wake_estimate_ns = (3 * average_ns + took_ns) // 4 if average_ns else took_ns
        figures.image_bytes = 0

    def note_answer(self) -> None:
        """A request was answered: see `note_timeout`."""
        self.figures.timeouts_in_a_row = 0

    def note_timeout(self) -> None:
        """A request timed out without a byte of an answer. One may be the request's fault; two in a row are the
        instance's, and it is stopped."""
        self.figures.timeouts_in_a_row += 1
        if self.figures.timeouts_in_a_row >= MAX_TIMEOUTS_IN_A_ROW:
            message = f"{MAX_TIMEOUTS_IN_A_ROW} requests in a row timed out without a byte of an answer"
            self.handle(ev.StopAsked(0, force=True, reason="INSTANCE_UNRESPONSIVE", message=message))

    # ---- stepping -----------------------------------------------------------------------------------------------

    def _step(self, event: ev.Event) -> None:
        at = self._clock.monotonic_ns()
        old = self.instance
        self.instance, effects = machine.step(old, event, at)
        new = self.instance
        if (new.state, new.busy) != (old.state, old.busy):
            self.figures.idle_since_ns = at
        if new.state is not old.state:
            self.figures.state_wall_ns = self._clock.wall_ns()
            self._listener.state_changed(self, old.state, new.state, at)
        if new.holds and not old.holds:
            self._listener.gpus_held(self)
        self.gate.set_open(new.gate_open)  # closes before any effect starts; opens in the same turn of the loop
        for effect in effects:
            self._perform(effect)
        if new.state is not old.state:
            self._notify_waiters()
        elif new.paused is not old.paused:
            self._listener.fitness_changed(self)
        elif new.busy is not old.busy:
            self._listener.load_changed(self)

    def _notify_waiters(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _perform(self, effect: ev.Effect) -> None:
        match effect:
            case ev.Run(op, gen, _):
                self._executor.run(op, gen)
            case ev.AskCancel(gen):
                self._executor.ask_cancel(gen)
            case ev.RequestGpus(avoid):
                self._broker.request(self, avoid)
            case ev.WithdrawRequest():
                self._broker.withdraw(self)
            case ev.ReleaseGpus():
                self._broker.release(self)
            case ev.OrderedFreezeRefused():
                self._broker.freeze_refused(self)
            case ev.ReportActivity(idle, preemptible_at_ns):
                self._broker.report_activity(self, idle, preemptible_at_ns)
            case ev.SetIdleTimer(gen, at_ns):
                self._arm_idle(gen, at_ns)
            case ev.SetStopTimer(gen, at_ns):
                self._clock.call_at(at_ns, lambda: self.handle(ev.StopTimer(gen)))
            case ev.ClosePool():
                if self.pool is not None:
                    self.pool.retire()
            case ev.RefuseWaiters(reason, message):
                self.gate.refuse_all(_refusal(reason, message))
            case ev.Note(name, message):
                self._events.add(self.uid, name, message)
            case _:
                assert_never(effect)

    def _arm_idle(self, gen: int, at_ns: int) -> None:
        """Keep one timer, not one per request: a timer that fires too early is armed again for the new time."""
        if self._closed:
            return  # no freeze begins while the agent stops
        self._idle_due = (gen, at_ns)
        if self._idle_timer is not None and self._idle_armed_ns > at_ns:
            self._idle_timer.cancel()
            self._idle_timer = None
        if self._idle_timer is None:
            self._idle_armed_ns = at_ns
            self._idle_timer = self._clock.call_at(at_ns, self._check_idle)

    def _check_idle(self) -> None:
        self._idle_timer = None
        gen, at_ns = self._idle_due
        if at_ns > self._clock.monotonic_ns():
            self._arm_idle(gen, at_ns)
        else:
            self.handle(ev.IdleTimer(gen))

    # ---- waiting ------------------------------------------------------------------------------------------------

    async def wait_until(self, reached: Callable[[Instance], bool], timeout_s: float, what: str) -> None:
        """Wait until `reached(instance)` is true. Raises DeadlineError `<what>_TIMEOUT`, UnavailableError
        AGENT_STOPPING."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while not reached(self.instance):
            if self._closed:
                raise _refusal("AGENT_STOPPING", "this node's agent is stopping")()
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                async with asyncio.timeout_at(deadline):
                    await waiter
            except TimeoutError:
                raise DeadlineError(
                    f"{what}_TIMEOUT",
                    f"instance {self.uid} is {self.state.value} after {timeout_s:g} s; "
                    "see `hibernode events` for the cause",
                ) from None
            finally:
                self._waiters.discard(waiter)

    def close(self) -> None:
        """The agent stops, the instance stays: cancel the timers, refuse the waiters."""
        self._closed = True
        for timer in (self._idle_timer, self._wake_timer):
            if timer is not None:
                timer.cancel()
        stopping = _refusal("AGENT_STOPPING", "this node's agent is stopping")
        self.gate.refuse_all(stopping)
        if self.gate.queue is not None:
            self.gate.queue.refuse_all(stopping())
        self._notify_waiters()


def _refusal(reason: str, message: str) -> Callable[[], UnavailableError]:
    return lambda: UnavailableError(reason, message or f"the instance can't take the request ({reason})")
