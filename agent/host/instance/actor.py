"""One instance's actor: feeds events to `machine.step`, performs the effects, keeps the gate in step.

Everything here is synchronous and runs on the loop's thread, so there is one writer and no lock. An event raised
while effects are performed waits its turn in `_inbox`. What takes time is started, never awaited: operations in the
executor, GPU business in the node.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, assert_never

from agent.core.errors import DeadlineError, UnavailableError
from agent.core.lifecycle import events as ev
from agent.core.lifecycle import machine
from agent.core.lifecycle.machine import Instance
from agent.core.types import FunctionSpec, Handle, InstanceSpec, InstanceState
from agent.host.instance.events import EventLog
from agent.host.instance.gate import AdmissionGate, RequestMeter
from agent.host.instance.hooks import function_headers
from agent.http.pool import Pool
from agent.ports import Clock, Timer


class Executor(Protocol):
    """Runs the operations of one instance, one at a time, and posts their results back as events."""

    def run(self, op: ev.Operation, gen: int) -> None: ...

    def ask_cancel(self, gen: int) -> None: ...


class GpuRequests(Protocol):
    """The node loop, as an instance sees it: the GPU book's counter."""

    def want(self, actor: Actor, avoid: tuple[str, ...]) -> None: ...

    def withdraw(self, actor: Actor) -> None: ...

    def release(self, actor: Actor) -> None: ...

    def refused(self, actor: Actor) -> None: ...

    def became(self, actor: Actor, idle: bool, preemptible_at_ns: int) -> None: ...


class StateListener(Protocol):
    """Metering, reporting and history follow every state change, before the gate acts on it."""

    def state_changed(self, actor: Actor, old: InstanceState, new: InstanceState, at: int) -> None: ...

    def fitness_changed(self, actor: Actor) -> None:
        """It is made, or gone for good; or other instances are to be preferred to it from now on, or no longer."""

    def load_changed(self, actor: Actor) -> None:
        """The first request is inside, or the last has left: on the request path."""


class Listener(StateListener, Protocol):
    """The node itself also hears when GPUs are held."""

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
    """See the module. Public attributes are for reading; `handle` is the only way to change the instance."""

    def __init__(
        self,
        spec: InstanceSpec,
        instance: Instance,
        *,
        clock: Clock,
        meter: RequestMeter,
        desk: GpuRequests,
        listener: Listener,
        events: EventLog,
        max_waiting: int,
    ) -> None:
        self.spec = spec
        self.instance = instance
        self.handle_of_container: Handle | None = None
        self.pool: Pool | None = None
        self.figures = InstanceFigures(create_wall_ns=clock.wall_ns(), state_wall_ns=clock.wall_ns())
        self.gpu_uuids: tuple[str, ...] = ()
        self.healthy = True
        self.adopted = False
        """An earlier agent started it, and may have woken it."""
        self.ended = asyncio.Event()
        self.context_headers = function_headers(spec.function)
        self.executor: Executor
        self.gate = AdmissionGate(
            spec.function.instance_concurrency,
            max_waiting,
            spec.function.queue_timeout_ns,
            clock,
            meter,
            self,
        )
        self._clock = clock
        self._desk = desk
        self._listener = listener
        self._events = events
        self._inbox: deque[ev.Event] = deque()
        self._stepping = False
        self._idle_timer: Timer | None = None
        self._idle_due = (0, 0)
        self._idle_armed_ns = 0
        self._wake_timer: Timer | None = None
        self._waiters: set[asyncio.Future[None]] = set()
        self._visitors = 0
        self._closed = False

    @property
    def uid(self) -> str:
        """The instance's uid, never used again."""
        return self.spec.uid

    @property
    def function(self) -> FunctionSpec:
        """What it is an instance of."""
        return self.spec.function

    @property
    def state(self) -> InstanceState:
        """Where it is in its life."""
        return self.instance.state

    # ---- events in ----------------------------------------------------------------------------------------------

    def handle(self, event: ev.Event) -> None:
        """Take one event; when this returns, it and all that followed from it have been dealt with."""
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
        """An API wake: see `machine.WakeAsked`."""
        self.handle(ev.WakeAsked(hold_ns, until_ns))
        if self._wake_timer is not None:
            self._wake_timer.cancel()
            self._wake_timer = None
        if self.instance.wake_until_ns:  # the latest of all wakes that are not answered yet
            self._wake_timer = self._clock.call_at(self.instance.wake_until_ns, lambda: self.handle(ev.WakeExpired()))

    def enter(self) -> None:
        """One more command is about to run inside: the instance is not frozen until the `leave` that follows."""
        self._visitors += 1
        if self._visitors == 1:
            self.handle(ev.ExecActive(inside=True))

    def leave(self) -> None:
        """That command has ended."""
        self._visitors -= 1
        if self._visitors == 0 and not self._closed:
            self.handle(ev.ExecActive(inside=False))

    def set_healthy(self, healthy: bool) -> None:
        """What the custom health check found; others get the requests meanwhile, so it is reported."""
        if healthy is not self.healthy:
            self.healthy = healthy
            self.gate.shunned = not healthy
            self.gate.offer()
            if self.gate.line is not None:
                self.gate.line.look()
            self._events.add(self.uid, "instance.healthy" if healthy else "instance.unhealthy")
            self._listener.fitness_changed(self)

    def gate_busy(self) -> None:
        self.handle(ev.FirstRequestStarted())

    def gate_quiet(self) -> None:
        self.handle(ev.LastRequestEnded())

    def gate_wanted(self) -> None:
        self.handle(ev.WaitersAppeared())

    def gate_unwanted(self) -> None:
        self.handle(ev.WaitersGone())

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
        self.gate.set_open(new.gate_open)  # closes before any effect starts; opens in the same turn
        for effect in effects:
            self._perform(effect)
        if new.state is not old.state:
            self._tell_waiters()
        elif new.paused is not old.paused:
            self._listener.fitness_changed(self)
        elif new.busy is not old.busy:
            self._listener.load_changed(self)

    def _tell_waiters(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _perform(self, effect: ev.Effect) -> None:
        match effect:
            case ev.Run(op, gen, _):
                self.executor.run(op, gen)
            case ev.AskCancel(gen):
                self.executor.ask_cancel(gen)
            case ev.RequestGpus(avoid):
                self._desk.want(self, avoid)
            case ev.WithdrawRequest():
                self._desk.withdraw(self)
            case ev.ReleaseGpus():
                self._desk.release(self)
            case ev.OrderedFreezeRefused():
                self._desk.refused(self)
            case ev.ReportActivity(idle, preemptible_at_ns):
                self._desk.became(self, idle, preemptible_at_ns)
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
        """One timer at most, and not one for each request: what is armed for an earlier time goes on to the new one."""
        if self._closed:
            return  # nothing begins that the agent would not see the end of
        self._idle_due = (gen, at_ns)
        if self._idle_timer is not None and self._idle_armed_ns > at_ns:
            self._idle_timer.cancel()
            self._idle_timer = None
        if self._idle_timer is None:
            self._idle_armed_ns = at_ns
            self._idle_timer = self._clock.call_at(at_ns, self._look_idle)

    def _look_idle(self) -> None:
        self._idle_timer = None
        gen, at_ns = self._idle_due
        if at_ns > self._clock.monotonic_ns():
            self._arm_idle(gen, at_ns)
        else:
            self.handle(ev.IdleTimer(gen))

    # ---- waiting ------------------------------------------------------------------------------------------------

    async def wait_until(self, reached: Callable[[Instance], bool], timeout_s: float, what: str) -> None:
        """Wait until `reached` holds. Raises DeadlineError `<what>_TIMEOUT`, UnavailableError AGENT_STOPPING."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while not reached(self.instance):
            if self._closed:
                raise _refusal("AGENT_STOPPING", "this node's agent is going away")()
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                async with asyncio.timeout_at(deadline):
                    await waiter
            except TimeoutError:
                raise DeadlineError(
                    f"{what}_TIMEOUT",
                    f"instance {self.uid} is {self.state.value} after {timeout_s:g} s; "
                    "see `hibernode events` for what holds it up",
                ) from None
            finally:
                self._waiters.discard(waiter)

    def close(self) -> None:
        """The agent goes away (the instance stays): stop the timers, turn the waiters away."""
        self._closed = True
        for timer in (self._idle_timer, self._wake_timer):
            if timer is not None:
                timer.cancel()
        leaving = _refusal("AGENT_STOPPING", "this node's agent is going away")
        self.gate.refuse_all(leaving)
        if self.gate.line is not None:
            self.gate.line.refuse_all(leaving())
        self._tell_waiters()


def _refusal(reason: str, message: str) -> Callable[[], UnavailableError]:
    return lambda: UnavailableError(reason, message or f"the instance can't take the request ({reason})")
