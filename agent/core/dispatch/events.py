"""Events that the dispatcher takes, and effects that it returns; `dispatcher.py` has the rules."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from agent.core.types import SECOND_NS, DispatchPolicy, InstanceState

WAKE_HOLD_NS = 2 * SECOND_NS
"""How long a woken instance is kept awake without a request. (The gateway sends its configured `dispatch.hold`.)"""


class RefusalReason(Enum):
    """Why the scheduler answers a request itself."""

    UNKNOWN_FUNCTION = "FUNCTION_NOT_FOUND"
    QUEUE_FULL = "QUEUE_FULL"
    QUEUE_TIMEOUT = "QUEUE_TIMEOUT"
    NO_CAPACITY = "NO_CAPACITY"
    STOPPING = "SCHEDULER_STOPPING"


# ---- events ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FunctionSet:
    """A function is deployed with these rules. `expects_instances`: instances are being created or will be; if a
    function neither has nor expects any, its requests are refused with NO_CAPACITY."""

    function: str
    expects_instances: bool = True
    policy: DispatchPolicy = DispatchPolicy.PACK
    wake_factor: float = 0.0
    queue_length: int = 1000


@dataclass(frozen=True, slots=True)
class FunctionRemoved:
    """The function was deleted: queued requests are refused, dispatched ones run to their end."""

    function: str


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """A new request; its number is never used again. The caller sends DeadlinePassed once `deadline_ns` is over."""

    request: int
    function: str
    deadline_ns: int


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """A request's queueTimeout is over; no effect unless it is queued here."""

    request: int


@dataclass(frozen=True, slots=True)
class RequestGone:
    """The client disconnected, or the request failed: its place in the queue or its lease becomes free."""

    request: int


@dataclass(frozen=True, slots=True)
class LeaseAnswered:
    """The instance of a direct wake begins to answer, so it is awake. `waited_ns`: how long the request waited there
    for the wake, 0 if it did not."""

    request: int
    waited_ns: int


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    """The response ended, complete or not. `uid`: the instance that served it, "" if unknown."""

    request: int
    uid: str = ""


@dataclass(frozen=True, slots=True)
class LeaseRefused:
    """The agent refused the request, or was gone before a byte reached the instance: the request is queued again."""

    request: int


@dataclass(frozen=True, slots=True)
class InstanceReported:
    """An agent's report of an instance. `in_flight`: all requests executing or waiting there, of any sender."""

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
    """The instance has ended; its uid is never used again."""

    uid: str


@dataclass(frozen=True, slots=True)
class InstanceRetired:
    """The instance is about to be drained and gets no new request; `retired` False: it is not drained after all."""

    uid: str
    retired: bool = True


@dataclass(frozen=True, slots=True)
class WakeAnswered:
    uid: str


@dataclass(frozen=True, slots=True)
class WakeFailed:
    """A Wake was refused, timed out or did not reach the agent; the instance is quarantined."""

    uid: str


@dataclass(frozen=True, slots=True)
class NodeReported:
    """A node reported and is ready, or `draining`; those of its quarantines whose time is over end. `epoch`: the run of
    its agent; leases of an earlier run are void."""

    node: str
    gpu_count: int = 0
    migrates: bool = True
    draining: bool = False
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class NodeSuspect:
    """The node is silent or unreachable: it gets no new work until it reports again."""

    node: str


@dataclass(frozen=True, slots=True)
class NodeLost:
    """The node is lost. Its leases are void; requests in flight there end with their own connections."""

    node: str


RequestEvent: TypeAlias = RequestArrived | DeadlinePassed | RequestGone | LeaseAnswered | LeaseEnded | LeaseRefused
InstanceEvent: TypeAlias = InstanceReported | InstanceGone | InstanceRetired | WakeAnswered | WakeFailed
NodeEvent: TypeAlias = NodeReported | NodeSuspect | NodeLost
Event: TypeAlias = FunctionSet | FunctionRemoved | RequestEvent | InstanceEvent | NodeEvent

# ---- effects --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Send `request` to instance `uid` on `node`; it holds a lease from now on.

    - `queued_ns`: how long it was queued.
    - `wake_ns`: how long the instance's last wake took if it ended while the request was queued, else 0.
    - `direct_wake`: the instance is frozen, and this request wakes it.
    - `early`: all slots are taken; the request holds no lease yet and waits at the node for any instance there.
    """

    request: int
    uid: str
    node: str
    queued_ns: int
    wake_ns: int = 0
    direct_wake: bool = False
    early: bool = False


@dataclass(frozen=True, slots=True)
class Wake:
    """Ask the agent of `node` to wake `uid`; the caller answers with WakeAnswered or WakeFailed."""

    uid: str
    node: str
    hold_ns: int = WAKE_HOLD_NS


@dataclass(frozen=True, slots=True)
class Refuse:
    request: int
    reason: RefusalReason


Effect: TypeAlias = Dispatch | Wake | Refuse
