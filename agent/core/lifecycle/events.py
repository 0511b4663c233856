"""The events that `machine.step` takes and the effects that it returns.

The answer of an operation carries the generation with which the operation was started. Times are monotonic ns.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Operation(Enum):
    """What the executor runs, one at a time; each ends in Succeeded, Refused or Broken.

    - PREPARE: pull the container image if it is missing
    - START: container, readiness, /initialize, first health check
    - LOCK: /pre-freeze, host memory reservation, lock, second listing of the CUDA processes
    - CHECKPOINT: checkpoint and cgroup freeze
    - UNLOCK: undo LOCK
    - WAKE: thaw, restore, unlock, verify
    - STOP: /pre-stop, TERM, KILL, clean up
    - DESTROY: kill and clean up what is left of a failed instance
    """

    PREPARE = "PREPARE"
    START = "START"
    LOCK = "LOCK"
    CHECKPOINT = "CHECKPOINT"
    UNLOCK = "UNLOCK"
    WAKE = "WAKE"
    STOP = "STOP"
    DESTROY = "DESTROY"


# ---- events ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Created:
    """The record is durable: the start may begin."""


@dataclass(frozen=True, slots=True)
class Granted:
    """The GPU allocator grants these GPUs."""

    gpus: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FirstRequestStarted:
    """The gate granted a request while none was inside."""


@dataclass(frozen=True, slots=True)
class LastRequestEnded:
    """The last request inside ended and no other was granted in its place."""


@dataclass(frozen=True, slots=True)
class WaitersAppeared:
    """Requests now wait at the closed gate."""


@dataclass(frozen=True, slots=True)
class WaitersGone:
    """No request waits at a closed gate any more: all are gone, or the gate has opened."""


@dataclass(frozen=True, slots=True)
class ExecActive:
    """The first command inside (exec) is about to begin, or the last one has ended."""

    inside: bool


@dataclass(frozen=True, slots=True)
class WakeAsked:
    """The API or scheduler asks: wake by `until_ns`, then hold off the idle timer for `hold_ns` or until a request."""

    hold_ns: int
    until_ns: int


@dataclass(frozen=True, slots=True)
class WakeExpired:
    """The deadline of a wake that was asked for has passed."""


@dataclass(frozen=True, slots=True)
class IdleTimer:
    """The idle timer of generation `gen` fired."""

    gen: int


@dataclass(frozen=True, slots=True)
class FreezeAsked:
    """The API's Freeze. Ignored unless the instance is idle: the caller reads the state afterwards."""


@dataclass(frozen=True, slots=True)
class FreezeOrdered:
    """The GPU allocator needs the GPUs of this idle holder."""


@dataclass(frozen=True, slots=True)
class DrainOrdered:
    """The GPU allocator needs the GPUs of this busy holder: close the gate, freeze after the last request."""


@dataclass(frozen=True, slots=True)
class GpusLost:
    """The GPU allocator can never grant what the instance asked for: the GPUs are out of use for good."""

    message: str


@dataclass(frozen=True, slots=True)
class Paused:
    """The instance's threads were stopped or resumed from outside (docker pause, unpause)."""

    paused: bool


@dataclass(frozen=True, slots=True)
class StopAsked:
    """Stop: drain for at most `grace_ns`, then /pre-stop, TERM, KILL; with `force` KILL at once."""

    grace_ns: int
    force: bool = False
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class StopTimer:
    """The time that a stop allows for the drain is over."""

    gen: int


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The operation succeeded."""

    gen: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The operation was rolled back: the instance is as it was before."""

    gen: int
    reason: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Broken:
    """The instance's state is unknown: only a kill is safe."""

    gen: int
    reason: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Exited:
    """The container's main process ended."""

    reason: str
    message: str = ""


Event = (
    Created | Granted | FirstRequestStarted | LastRequestEnded | WaitersAppeared | WaitersGone | ExecActive | WakeAsked
    | WakeExpired | IdleTimer | FreezeAsked | FreezeOrdered | DrainOrdered | GpusLost | Paused | StopAsked | StopTimer
    | Succeeded | Refused | Broken | Exited
)  # fmt: skip


# ---- effects --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """Start operation `op` on the held `gpus`; its answer carries `gen`."""

    op: Operation
    gen: int
    gpus: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AskCancel:
    """Ask operation `gen` to end early: PREPARE, LOCK, START as Refused CANCELLED if they still can, STOP by KILL."""

    gen: int


@dataclass(frozen=True, slots=True)
class RequestGpus:
    """Ask the GPU allocator for this instance's GPUs; a movable instance prefers others to those in `avoid`."""

    avoid: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WithdrawRequest:
    """Take back the request for GPUs."""


@dataclass(frozen=True, slots=True)
class ReleaseGpus:
    """Give the GPUs back. Others may have them once NVML shows that they hold no memory of this instance."""


@dataclass(frozen=True, slots=True)
class OrderedFreezeRefused:
    """Tell the GPU allocator that an ordered freeze or drain does not happen now."""


@dataclass(frozen=True, slots=True)
class ReportActivity:
    """Tell the GPU allocator whether this holder is idle, and from when it may be preempted."""

    idle: bool
    preemptible_at_ns: int = 0


@dataclass(frozen=True, slots=True)
class SetIdleTimer:
    """Fire `IdleTimer(gen)` at `at_ns`, in place of any earlier timer."""

    gen: int
    at_ns: int


@dataclass(frozen=True, slots=True)
class SetStopTimer:
    """Fire `StopTimer(gen)` at `at_ns`."""

    gen: int
    at_ns: int


@dataclass(frozen=True, slots=True)
class ClosePool:
    """Close the pooled connections: their keep-alive timers would expire unnoticed during a freeze."""


@dataclass(frozen=True, slots=True)
class RefuseWaiters:
    """Refuse all waiting requests, so that the gateway queues them again."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Note:
    """Add an event to the instance's event log."""

    name: str
    message: str


Effect = (
    Run | AskCancel | RequestGpus | WithdrawRequest | ReleaseGpus | OrderedFreezeRefused | ReportActivity | SetIdleTimer
    | SetStopTimer | ClosePool | RefuseWaiters | Note
)  # fmt: skip
