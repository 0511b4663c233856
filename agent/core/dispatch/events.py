"""What the dispatcher hears and says: events in, effects out (`dispatch.py` has the rules)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from agent.core.types import SECOND_NS, DispatchPolicy, InstanceState

WAKE_HOLD_NS = 2 * SECOND_NS
"""The agent's idle timer is suspended for so long after a wake, until the first request."""


class RefusalReason(Enum):
    """Why a request is answered by the scheduler itself."""

    UNKNOWN_FUNCTION = "FUNCTION_NOT_FOUND"
    QUEUE_FULL = "QUEUE_FULL"
    QUEUE_TIMEOUT = "QUEUE_TIMEOUT"
    NO_CAPACITY = "NO_CAPACITY"
    STOPPING = "SCHEDULER_STOPPING"


# ---- events ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FunctionSet:
    """A function exists with these rules. `expects_instances`: some are, or will be, on their way; without any and
    without hope requests are refused NO_CAPACITY instead of waiting."""

    function: str
    expects_instances: bool = True
    policy: DispatchPolicy = DispatchPolicy.PACK
    wake_factor: float = 0.0
    queue_length: int = 1000


@dataclass(frozen=True, slots=True)
class FunctionRemoved:
    """The function is gone: what waits is refused, what runs ends."""

    function: str


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """`request` is a number never used again. The shell sends DeadlinePassed when `deadline_ns` is over."""

    request: int
    function: str
    deadline_ns: int


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """queueTimeout of a request; without effect unless it waits."""

    request: int


@dataclass(frozen=True, slots=True)
class RequestGone:
    """The client left; its place in the queue or its lease is free."""

    request: int


@dataclass(frozen=True, slots=True)
class LeaseAnswered:
    """Its instance begins to answer: it is awake. `waited_ns`: how long the request waited there for that, 0 if it did
    not. Told of a Dispatch with `wakes` only."""

    request: int
    waited_ns: int


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    """The response ended, well or badly. `uid`: the instance that served it, where it is known."""

    request: int
    uid: str = ""


@dataclass(frozen=True, slots=True)
class LeaseRefused:
    """The agent refused it, or could not be reached, before a byte reached the instance: it waits again."""

    request: int


@dataclass(frozen=True, slots=True)
class InstanceReported:
    """What an agent says of an instance. `in_flight` counts requests executing or waiting there, anybody's."""

    uid: str
    function: str
    node: str
    state: InstanceState
    concurrency: int = 1
    in_flight: int = 0
    cancellable: bool = False
    healthy: bool = True
    wake_estimate_ns: int = 0
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class InstanceGone:
    """It ended or was forgotten; its uid never comes back."""

    uid: str


@dataclass(frozen=True, slots=True)
class InstanceRetired:
    """It is about to be drained: nothing new goes there. `retired` false: it could not be, and serves on."""

    uid: str
    retired: bool = True


@dataclass(frozen=True, slots=True)
class WakeAnswered:
    """Our Wake succeeded: the instance is RUNNING."""

    uid: str


@dataclass(frozen=True, slots=True)
class WakeFailed:
    """Our Wake was refused or timed out; the instance gets no other until its node is heard again."""

    uid: str


@dataclass(frozen=True, slots=True)
class NodeReported:
    """A node was heard and is ready (or only drains). Instances that had refused are tried again. `epoch` is the run of
    its agent: what was leased in an earlier one has ended."""

    node: str
    gpu_count: int = 0
    migrates: bool = True
    draining: bool = False
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class NodeSuspect:
    """Silent, or not to be reached: no new work until it is heard again."""

    node: str


@dataclass(frozen=True, slots=True)
class NodeLost:
    """Counted out. Requests inside follow their own connections."""

    node: str


Event: TypeAlias = (
    FunctionSet
    | FunctionRemoved
    | RequestArrived
    | DeadlinePassed
    | RequestGone
    | LeaseAnswered
    | LeaseEnded
    | LeaseRefused
    | InstanceReported
    | InstanceGone
    | InstanceRetired
    | WakeAnswered
    | WakeFailed
    | NodeReported
    | NodeSuspect
    | NodeLost
)

# ---- effects --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Send `request` to instance `uid` on `node`; it holds a lease from now on. `wake_ns`: the wake that the
    instance went through while the request waited, 0 for none. `wakes`: it sleeps, and the request wakes it. `ahead`:
    no slot is free yet; the request holds no lease and waits at the node for any instance of the function there."""

    request: int
    uid: str
    node: str
    queued_ns: int
    wake_ns: int = 0
    wakes: bool = False
    ahead: bool = False


@dataclass(frozen=True, slots=True)
class Wake:
    """Ask the agent of `node` to wake `uid`; answer WakeAnswered or WakeFailed."""

    uid: str
    node: str
    hold_ns: int = WAKE_HOLD_NS


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer `request` without an instance."""

    request: int
    reason: RefusalReason


Effect: TypeAlias = Dispatch | Wake | Refuse
