"""The events that `allocator.step` takes and the effects that it returns. Times are monotonic ns."""

from __future__ import annotations

from dataclasses import dataclass

# ---- events ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Assign:
    """Choose a new instance's GPUs among those with these uuids (None = any). Answered by Assigned or Unassignable.

    `wanted`: what they have in common, as words after "GPU(s)"."""

    uid: str
    count: int
    among: frozenset[str] | None = None
    wanted: str = ""


@dataclass(frozen=True, slots=True)
class Adopt:
    """Recovery: the instance was assigned these GPUs and, if `holds`, holds them now."""

    uid: str
    gpus: tuple[str, ...]
    holds: bool


@dataclass(frozen=True, slots=True)
class Unassign:
    """The instance has ended (after Released, if it held GPUs)."""

    uid: str


@dataclass(frozen=True, slots=True)
class Ask:
    """The instance requests its GPUs. If it may move it prefers others to those in `avoid` (a restore on them failed).
    `stays`: it is frozen and can't move, since its container sees only its own GPUs."""

    uid: str
    avoid: tuple[str, ...] = ()
    stays: bool = False


@dataclass(frozen=True, slots=True)
class Leave:
    """The instance withdraws its request."""

    uid: str


@dataclass(frozen=True, slots=True)
class Released:
    """NVML shows nothing of the instance on its GPUs any more."""

    uid: str


@dataclass(frozen=True, slots=True)
class Releasing:
    """The holder gave up its GPUs; the proof is pending. They count as being vacated, so no other holder is asked."""

    uid: str


@dataclass(frozen=True, slots=True)
class FreezeRefused:
    """The holder was asked to freeze or drain and refused."""

    uid: str


@dataclass(frozen=True, slots=True)
class BecameIdle:
    """No request is inside the holder; it may be preempted from `preemptible_at_ns` on."""

    uid: str
    preemptible_at_ns: int


@dataclass(frozen=True, slots=True)
class BecameBusy:
    """A request is inside the holder."""

    uid: str


@dataclass(frozen=True, slots=True)
class Cordon:
    """No other instance may use this GPU. Each `source` has at most one cordon on it. A `lasting` cordon needs a person
    or a reset: an instance that can use no other GPU fails when it waits for this one."""

    uuid: str
    reason: str
    source: str
    lasting: bool


@dataclass(frozen=True, slots=True)
class Uncordon:
    """The source lifts its cordon. The GPU is usable without any cordon."""

    uuid: str
    source: str


@dataclass(frozen=True, slots=True)
class Tick:
    """The timer of `WakeMeAt` fired."""


AllocatorEvent = (
    Assign | Adopt | Unassign | Ask | Leave | Released | Releasing | FreezeRefused | BecameIdle | BecameBusy | Cordon
    | Uncordon | Tick
)  # fmt: skip


# ---- effects --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Assigned:
    """The instance's GPUs, until it wakes on others (`GpuAllocator.migrate`)."""

    uid: str
    gpus: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unassignable:
    """No set of GPUs has room for the instance; `message` says what is short."""

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
    """Close this busy holder's gate and freeze it after its last request."""

    uid: str


@dataclass(frozen=True, slots=True)
class Unservable:
    """The waiter was removed from the queue: too many of its GPUs are out of use for good."""

    uid: str
    message: str


@dataclass(frozen=True, slots=True)
class WakeMeAt:
    """Send `Tick` at `at_ns`: a holder may be asked from then on."""

    at_ns: int


AllocatorEffect = Assigned | Unassignable | Grant | Unservable | AskFreeze | AskDrain | WakeMeAt
