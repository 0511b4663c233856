"""What happens to GPUs (events) and what must be done about it (effects): the alphabet of `gpu_book.step`.

Times are monotonic ns.
"""

from __future__ import annotations

from dataclasses import dataclass

# ---- events ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Assign:
    """A new instance: choose its GPUs among those of `model` ("" = any). Answered by Assigned or Unassignable."""

    uid: str
    count: int
    model: str


@dataclass(frozen=True, slots=True)
class Adopt:
    """Recovery: this instance was assigned these GPUs, and holds them now if `holds`."""

    uid: str
    gpus: tuple[str, ...]
    holds: bool


@dataclass(frozen=True, slots=True)
class Unassign:
    """The instance is gone for good (after Released, if it held)."""

    uid: str


@dataclass(frozen=True, slots=True)
class Ask:
    """The instance wants its GPUs; where it may move, rather not those in `avoid` (a restore on them just failed).
    `stays`: it sleeps and can't move, whatever others can (it was created seeing its own GPUs only)."""

    uid: str
    avoid: tuple[str, ...] = ()
    stays: bool = False


@dataclass(frozen=True, slots=True)
class Leave:
    """The instance does not want them any more."""

    uid: str


@dataclass(frozen=True, slots=True)
class Released:
    """Proof that nothing of the instance is left on its GPUs."""

    uid: str


@dataclass(frozen=True, slots=True)
class Releasing:
    """The holder has given up its GPUs; the proof is on its way. It counts as asked: nobody else gives way for it."""

    uid: str


@dataclass(frozen=True, slots=True)
class FreezeRefused:
    """The holder was asked to freeze or drain, and did not."""

    uid: str


@dataclass(frozen=True, slots=True)
class BecameIdle:
    """Nobody is inside the holder; it may be preempted from `preemptible_at_ns` on."""

    uid: str
    preemptible_at_ns: int


@dataclass(frozen=True, slots=True)
class BecameBusy:
    """A request is inside the holder."""

    uid: str


@dataclass(frozen=True, slots=True)
class Cordon:
    """Nothing new may use this GPU. Each `source` has one cordon of its own on it; a `lasting` one is never lifted
    without a person or a reset: who can only use this GPU is given up as soon as somebody waits for it."""

    uuid: str
    reason: str
    source: str
    lasting: bool


@dataclass(frozen=True, slots=True)
class Uncordon:
    """The source's reason is gone. The GPU is usable when no source has one."""

    uuid: str
    source: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed: the timer of `WakeMeAt` fired."""


BookEvent = (
    Assign
    | Adopt
    | Unassign
    | Ask
    | Leave
    | Released
    | Releasing
    | FreezeRefused
    | BecameIdle
    | BecameBusy
    | Cordon
    | Uncordon
    | Tick
)


# ---- effects --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Assigned:
    """The instance's GPUs: for life, or until it wakes on others (`Book.migrate`)."""

    uid: str
    gpus: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unassignable:
    """No set of GPUs has room for it; `message` says what is short."""

    uid: str
    message: str


@dataclass(frozen=True, slots=True)
class Grant:
    """The instance holds these GPUs from now on."""

    uid: str
    gpus: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AskFreeze:
    """Freeze this idle holder."""

    uid: str


@dataclass(frozen=True, slots=True)
class AskDrain:
    """Close this busy holder's gate; freeze it when its last request ended."""

    uid: str


@dataclass(frozen=True, slots=True)
class Unservable:
    """The waiter can never be served: too many of its GPUs are out of use for good. It is not in the queue any more."""

    uid: str
    message: str


@dataclass(frozen=True, slots=True)
class WakeMeAt:
    """Send `Tick` at this time: something becomes possible then."""

    at_ns: int


BookEffect = Assigned | Unassignable | Grant | Unservable | AskFreeze | AskDrain | WakeMeAt
