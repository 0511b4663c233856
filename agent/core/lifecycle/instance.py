"""The fields of one instance that decide its life cycle."""

from __future__ import annotations

from dataclasses import dataclass, field

from agent.core.lifecycle.events import Event, Operation
from agent.core.types import SECOND_NS, InstanceState

BACK_OFF_MIN_NS = SECOND_NS
BACK_OFF_MAX_NS = 60 * SECOND_NS


@dataclass(frozen=True, slots=True)
class Instance:
    """Immutable: `machine.step` returns a changed copy. Times are monotonic ns.

    - `op`: the operation under way, started with generation `op_gen`
    - `movable`: it may wake on other GPUs than those it was frozen on
    - `paused`: its threads are stopped from outside (docker pause)
    - `exec_active`: a command runs inside or soon will: only an earlier drain begins a freeze; a stop does not wait
    - `busy`: requests are inside; `has_waiters`: requests wait at the closed gate
    - `holds`: it holds its GPU grant
    - `ordered`: the freeze under way was ordered by the GPU allocator; no waiting request cancels it
    - `draining`: the GPU allocator needs the GPUs: the gate is closed, the freeze begins after the last request
    - `stop`: a stop was asked for; `stop_force`: without drain, /pre-stop and TERM
    - `wake_until_ns`: a wake that was asked for counts as a waiter until then
    - `hold_ns`: how long the next wake holds off the idle timer; `hold_until_ns`: when that hold ends
    - `refusals`: freezes refused in a row, the last for `refusal`; the idle timer waits for `retry_at_ns` at least
    - `restores`: restore attempts of the wake under way
    - `history`: time, event and resulting state of the latest steps that changed the state or the operation
    """

    uid: str
    freezable: bool
    freeze_after_ns: int
    min_awake_ns: int = 0
    state: InstanceState = InstanceState.STARTING
    op: Operation | None = None
    op_gen: int = 0
    idle_gen: int = 0
    movable: bool = False
    paused: bool = False
    exec_active: bool = False
    busy: bool = False
    has_waiters: bool = False
    holds: bool = False
    gpus: tuple[str, ...] = ()
    ordered: bool = False
    draining: bool = False
    stop: bool = False
    stop_force: bool = False
    stop_grace_ns: int = 0
    wake_until_ns: int = 0
    hold_ns: int = 0
    hold_until_ns: int = 0
    refusals: int = 0
    refusal: str = ""
    retry_at_ns: int = 0
    restores: int = 0
    awake_since_ns: int = 0
    reason: str = ""
    message: str = ""
    history: tuple[tuple[int, Event, InstanceState], ...] = field(default=(), repr=False, compare=False)

    @property
    def is_new(self) -> bool:
        """It has begun no operation: its record may not be durable yet."""
        return self.state is InstanceState.STARTING and self.op_gen == 0

    @property
    def gate_open(self) -> bool:
        """The gate may grant requests now."""
        return self.state is InstanceState.RUNNING and not (self.draining or self.stop or self.paused)

    @property
    def in_gpu_queue(self) -> bool:
        """It waits in the GPU allocator's queue, or is new and has not asked for GPUs yet."""
        waits = self.state in (InstanceState.STARTING, InstanceState.WAITING_GPU)
        return waits and self.op is None and not self.holds

    @property
    def can_freeze(self) -> bool:
        """A freeze may begin now."""
        ready = self.freezable and self.state is InstanceState.RUNNING
        return ready and not (self.busy or self.stop or self.paused or self.exec_active)

    @property
    def back_off_ns(self) -> int:
        """Least time from the last refused freeze to the idle timer's next attempt; it doubles with each refusal."""
        return min(BACK_OFF_MIN_NS << min(self.refusals - 1, 16), BACK_OFF_MAX_NS) if self.refusals else 0

    def awaited(self, at: int) -> bool:
        """A request waits, or a wake whose deadline has not passed, for this instance to be awake."""
        return self.has_waiters or at < self.wake_until_ns
