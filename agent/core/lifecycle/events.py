"""What happens to an instance (events) and what must be done about it (effects): the alphabet of `lifecycle.step`.

Every answer of an operation carries the generation it was started with; an answer with another generation is stale.
Times are monotonic ns.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Operation(Enum):
    """Operations run one at a time by the executor; each ends in Succeeded, Refused or Broken.

    PREPARE: the image, pulled where it is missing. START: container, readiness, /initialize, first health check. LOCK:
    /pre-freeze, host memory reserved, lock and second listing. CHECKPOINT: checkpoint and cgroup freeze. UNLOCK: undo
    LOCK. WAKE: thaw, restore, unlock, verify. STOP: /pre-stop, TERM, KILL, clean up. DESTROY: kill and clean up what is
    left of a failed instance.
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
    """The record is durable; the instance may ask for its GPUs."""


@dataclass(frozen=True, slots=True)
class Granted:
    """The GPU book hands over these GPUs."""

    gpus: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FirstRequestStarted:
    """The gate granted a request while none was inside."""


@dataclass(frozen=True, slots=True)
class LastRequestEnded:
    """The last request inside ended and nobody was granted in its place."""


@dataclass(frozen=True, slots=True)
class WaitersAppeared:
    """Somebody waits at the closed gate (nobody did before)."""


@dataclass(frozen=True, slots=True)
class WaitersGone:
    """Nobody waits at the gate any more."""


@dataclass(frozen=True, slots=True)
class ExecActive:
    """The first command inside (exec) is about to begin, or the last one has ended: no freeze begins in between."""

    inside: bool


@dataclass(frozen=True, slots=True)
class WakeAsked:
    """The API's Wake: be awake by `until_ns`, and hold the idle timer for `hold_ns` or until the first request."""

    hold_ns: int
    until_ns: int


@dataclass(frozen=True, slots=True)
class WakeExpired:
    """The deadline of an API wake passed."""


@dataclass(frozen=True, slots=True)
class IdleTimer:
    """The idle timer of generation `gen` fired."""

    gen: int


@dataclass(frozen=True, slots=True)
class FreezeAsked:
    """The API's Freeze. Ignored unless idle: the caller reads the state afterwards."""


@dataclass(frozen=True, slots=True)
class FreezeOrdered:
    """The GPU book needs the GPU of an idle holder."""


@dataclass(frozen=True, slots=True)
class DrainOrdered:
    """The GPU book needs the GPU of a busy holder: close the gate, freeze when the last request ended."""


@dataclass(frozen=True, slots=True)
class GpusLost:
    """The GPU book can never serve this waiter: its GPUs are out of use for good."""

    message: str


@dataclass(frozen=True, slots=True)
class Paused:
    """Somebody else stopped its threads (docker pause), or let them go on again."""

    paused: bool


@dataclass(frozen=True, slots=True)
class StopAsked:
    """Stop: drain for at most `grace_ns`, then /pre-stop, TERM, KILL; `force` goes straight to KILL."""

    grace_ns: int
    force: bool = False
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class StopTimer:
    """The drain of a stop has lasted long enough."""

    gen: int


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The operation did what it should."""

    gen: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The operation was rolled back: the instance is as before it."""

    gen: int
    reason: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Broken:
    """Nobody knows what state the instance is in: only a kill is safe."""

    gen: int
    reason: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Exited:
    """The container's main process ended."""

    reason: str
    message: str = ""


Event = (
    Created
    | Granted
    | FirstRequestStarted
    | LastRequestEnded
    | WaitersAppeared
    | WaitersGone
    | ExecActive
    | WakeAsked
    | WakeExpired
    | IdleTimer
    | FreezeAsked
    | FreezeOrdered
    | DrainOrdered
    | GpusLost
    | Paused
    | StopAsked
    | StopTimer
    | Succeeded
    | Refused
    | Broken
    | Exited
)


# ---- effects --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """Start operation `op`; answer with generation `gen`. `gpus` are the ones held."""

    op: Operation
    gen: int
    gpus: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AskCancel:
    """Operation `gen` need not go on. LOCK and START: end early, Refused CANCELLED. STOP: go straight to KILL."""

    gen: int


@dataclass(frozen=True, slots=True)
class Want:
    """Ask the GPU book for this instance's GPUs, where it may move rather not for those in `avoid`."""

    avoid: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Withdraw:
    """No longer wanted."""


@dataclass(frozen=True, slots=True)
class Release:
    """Give the GPUs back. The node loop tells the book only once NVML proves it."""


@dataclass(frozen=True, slots=True)
class OrderedFreezeRefused:
    """Tell the book that an ordered freeze or drain is not going to happen now."""


@dataclass(frozen=True, slots=True)
class Became:
    """Tell the book whether this holder is idle, and from when it may be preempted."""

    idle: bool
    preemptible_at_ns: int = 0


@dataclass(frozen=True, slots=True)
class SetIdleTimer:
    """Fire `IdleTimer(gen)` at `at_ns`, instead of any earlier timer."""

    gen: int
    at_ns: int


@dataclass(frozen=True, slots=True)
class SetStopTimer:
    """Fire `StopTimer(gen)` at `at_ns`."""

    gen: int
    at_ns: int


@dataclass(frozen=True, slots=True)
class ClosePool:
    """Close the pooled connections: their keep-alive timers would expire unseen while frozen."""


@dataclass(frozen=True, slots=True)
class RefuseWaiters:
    """Everybody at the gate is refused, so that the gateway queues them again elsewhere."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Note:
    """Something worth an event in the instance's history."""

    name: str
    message: str


Effect = (
    Run
    | AskCancel
    | Want
    | Withdraw
    | Release
    | OrderedFreezeRefused
    | Became
    | SetIdleTimer
    | SetStopTimer
    | ClosePool
    | RefuseWaiters
    | Note
)
