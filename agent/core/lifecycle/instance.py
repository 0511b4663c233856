"""One instance as the decisions about it see it. `lifecycle.step` is the only one who makes new ones."""

from __future__ import annotations

from dataclasses import dataclass

from agent.core.lifecycle.events import Operation
from agent.core.types import SECOND_NS, InstanceState

BACK_OFF_MIN_NS = SECOND_NS
BACK_OFF_MAX_NS = 60 * SECOND_NS


@dataclass(frozen=True, slots=True)
class Instance:
    """Everything the decisions about one instance depend on. Only `step` makes new ones.

    `holds`: a GPU grant is ours. `ordered`: the running freeze was ordered by the GPU book and is not cancelled.
    `draining`: the book wants the GPU, the gate is closed until the last request ended. `stop`: a stop was asked
    (`stop_force`: without drain or hooks). `wake_until_ns`: an API wake counts as somebody waiting until then.
    `movable`: it may wake on other GPUs. `paused`: somebody else stopped its threads. `visited`: somebody runs a
    command inside, or is about to (exec): no freeze begins, but a stop does not wait for it. `refusals` freezes in a
    row were refused, the last for `refusal`: why it is awake although nobody needs it; none is tried before
    `retry_at_ns`.
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
    visited: bool = False
    busy: bool = False
    wanted: bool = False
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

    @property
    def gate_open(self) -> bool:
        """May the gate grant requests now?"""
        return self.state is InstanceState.RUNNING and not (self.draining or self.stop or self.paused)

    @property
    def asks(self) -> bool:
        """Does it wait in the GPU book's queue?"""
        waits = self.state in (InstanceState.STARTING, InstanceState.WAITING_GPU)
        return waits and self.op is None and not self.holds

    @property
    def can_freeze(self) -> bool:
        """May a freeze begin now? Idle timers and the GPU book ask."""
        ready = self.freezable and self.state is InstanceState.RUNNING
        return ready and not (self.busy or self.stop or self.paused or self.visited)

    @property
    def back_off_ns(self) -> int:
        """How long after the last refused freeze the next may be tried: doubled each time."""
        return min(BACK_OFF_MIN_NS << min(self.refusals - 1, 16), BACK_OFF_MAX_NS) if self.refusals else 0

    def awaited(self, at: int) -> bool:
        """Does a request, or an API wake whose deadline has not passed, wait for this instance to be awake?"""
        return self.wanted or at < self.wake_until_ns
