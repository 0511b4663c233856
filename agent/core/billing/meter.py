"""One `Meter` per instance turns its requests and states into usage windows; pure, in integer nanoseconds.

Active is the union of [grant, last response byte or close] over the requests; the rest of a window has the one kind
that the `BillingPolicy` gives its state (`agent/docs/design.md`). Within a boot the windows of an instance follow each
other without a gap, and `active + idle + unbilled == end - start` in each.

The meter is mutable: a request costs a few integer operations and no allocation. Its one owner is the event loop. An
`at` before the latest one counts as the latest, so a late event can shorten a bill but never lengthen it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import assert_never

from agent.core.billing.window import UsageWindow
from agent.core.peak import Peak
from agent.core.types import FunctionSpec, InstanceState


class BilledAs(Enum):
    """The kind of a nanosecond of an instance's life."""

    ACTIVE = "active"
    IDLE = "idle"
    UNBILLED = "unbilled"


@dataclass(frozen=True, slots=True)
class BillingPolicy:
    """How the states around the work are billed, which Function Compute leaves open.

    `stopping` is the part of STOPPING without a request in flight; the part with one is always active.
    """

    starting: BilledAs = BilledAs.IDLE
    restoring: BilledAs = BilledAs.IDLE
    stopping: BilledAs = BilledAs.IDLE

    def quiet_kind(self, state: InstanceState) -> BilledAs:
        """The kind of time in `state` while no request is in flight. Terminal states are never billed."""
        match state:
            case InstanceState.STARTING:
                return self.starting
            case InstanceState.RESTORING:
                return self.restoring
            case InstanceState.STOPPING:
                return self.stopping
            case InstanceState.RUNNING | InstanceState.FREEZING | InstanceState.FROZEN:
                return BilledAs.IDLE
            case InstanceState.WAITING_GPU | InstanceState.STOPPED | InstanceState.FAILED:
                return BilledAs.UNBILLED
            case _:
                assert_never(state)


@dataclass(frozen=True, slots=True)
class Subject:
    """The billed instance and its sizes, constant within a boot.

    `gpu_count` is the function's, frozen or awake: an idle instance is billed at the idle factor of its GPUs.
    `gpu_memory_bytes` is per GPU; 0 = the function names none and is billed by the card.
    """

    instance_uid: str
    node: str
    boot_id: str
    function: str
    gpu_count: int
    gpu_memory_bytes: int
    vcpu_millis: int
    memory_bytes: int
    disk_bytes: int

    @classmethod
    def of(cls, uid: str, function: FunctionSpec, *, node: str, boot_id: str) -> Subject:
        """The subject of one instance of `function`."""
        return cls(
            instance_uid=uid,
            node=node,
            boot_id=boot_id,
            function=function.name,
            gpu_count=function.gpu.count,
            gpu_memory_bytes=function.gpu.memory_bytes,
            vcpu_millis=function.vcpu_millis,
            memory_bytes=function.memory_bytes,
            disk_bytes=function.disk_bytes,
        )


@dataclass(frozen=True, slots=True)
class Placement:
    """The GPUs that the time is billed on: those held, or those last held by a frozen or waiting instance.
    `card_bytes` is the memory of one of them, billed if the function names no GPU memory."""

    gpu_model: str = ""
    gpu_uuids: tuple[str, ...] = ()
    card_bytes: int = 0


# Only in these states can a request be in flight; in others it would not be billed as active.
_WORKING = (InstanceState.RUNNING, InstanceState.STOPPING)


class Meter:
    """The running account of one instance. Times are CLOCK_MONOTONIC ns of one boot; `wall` is for records.

    - `in_flight`: requests between grant and end; `peak`: most of them at once
    - `unmatched_ends`: ends without a beginning, 0 unless a caller has a bug; they change nothing else
    """

    __slots__ = (
        "_busy_ns", "_busy_since", "_estimated", "_invocations", "_mark", "_placement", "_policy", "_quiet", "_seq",
        "_start", "_start_wall", "_state", "_working", "in_flight", "peak", "subject", "unmatched_ends",
    )  # fmt: skip

    def __init__(
        self,
        subject: Subject,
        policy: BillingPolicy,
        *,
        state: InstanceState,
        at: int,
        wall: int,
        seq: int = 0,
        placement: Placement | None = None,
        unbilled: bool = False,
    ) -> None:
        """Open the first window at `at`. `unbilled` as in `state_changed`; `seq` > 0 continues a recovered ledger."""
        self.subject = subject
        self.in_flight = 0
        self.peak = Peak()
        self.unmatched_ends = 0
        self._policy = policy
        self._placement = placement or Placement()
        self._seq = seq
        self._start = at
        self._start_wall = wall
        self._mark = at
        self._busy_ns = 0
        self._busy_since = at
        self._invocations = 0
        self._enter(state, unbilled=unbilled)

    # ---- the fast path: called once per request each ------------------------------------------------------------

    def request_began(self, at: int) -> None:
        """A request was granted a slot: it is an invocation, and active until it ends."""
        if at > self._mark:
            self._mark = at
        if self.in_flight == 0:
            self._busy_since = self._mark
        self.in_flight += 1
        self.peak.note(self.in_flight, at)
        self._invocations += 1

    def request_ended(self, at: int) -> None:
        """The last byte of a response was written, or its connection was closed."""
        if at > self._mark:
            self._mark = at
        if self.in_flight == 0:
            self.unmatched_ends += 1
            return
        self.in_flight -= 1
        if self.in_flight == 0:
            self._busy_ns += self._mark - self._busy_since

    # ---- the slow path: state changes, sealing, snapshots --------------------------------------------------------

    @property
    def state(self) -> InstanceState:
        """The state of the open window."""
        return self._state

    @property
    def window_start(self) -> int:
        """Monotonic ns at which the open window began."""
        return self._start

    @property
    def seq(self) -> int:
        """The number of the open window; numbers of an instance only grow."""
        return self._seq

    def state_changed(self, state: InstanceState, at: int, wall: int, *, unbilled: bool = False) -> UsageWindow | None:
        """Seal the old state's window at `at` and open one for the new state.

        `unbilled` overrides the policy for time without requests: STARTING before the GPU grant or during a pull.
        Returns the sealed window, None if it would have been empty. A terminal state ends the ledger: the caller drops
        the meter and writes no open window of it.
        """
        sealed = self.seal(at, wall)
        self._enter(state, unbilled=unbilled)
        return sealed

    def placed(self, placement: Placement, at: int, wall: int) -> UsageWindow | None:
        """The instance now holds these GPUs (start, or a wake on others). Seals the window only if they differ."""
        if placement == self._placement:
            return None
        sealed = self.seal(at, wall)
        self._placement = placement
        return sealed

    def seal(self, at: int, wall: int) -> UsageWindow | None:
        """End the open window at `at` and begin the next one, in which requests in flight continue.

        Returns None, and keeps the window open, if no time passed in it and no request was counted.
        """
        at, wall = self._not_before_mark(at, wall)
        if at == self._start and not self._invocations:
            return None
        sealed = self._window(at, sealed=True)
        self._seq += 1
        self._start = self._mark = self._busy_since = at
        self._start_wall = wall
        self._busy_ns = 0
        self._invocations = 0
        return sealed

    def ended_empty(self) -> UsageWindow:
        """The open window, sealed as it is: an instance that ends at the moment of a state change may have an empty
        window on disk, which must not stay open there."""
        return self._window(self._mark, sealed=True)

    def open_window(self, at: int) -> UsageWindow:
        """The open window as if it ended at `at`, unsealed: the snapshot that the store keeps. Changes nothing."""
        return self._window(max(at, self._mark), sealed=False)

    def _enter(self, state: InstanceState, *, unbilled: bool) -> None:
        self._state = state
        self._working = state in _WORKING
        self._quiet = BilledAs.UNBILLED if unbilled else self._policy.quiet_kind(state)

    def _not_before_mark(self, at: int, wall: int) -> tuple[int, int]:
        behind = self._mark - at
        return (at, wall) if behind <= 0 else (self._mark, wall + behind)

    def _window(self, end: int, *, sealed: bool) -> UsageWindow:
        busy = self._busy_ns + (end - self._busy_since if self.in_flight else 0)
        active = busy if self._working else 0
        quiet = end - self._start - active
        subject = self.subject
        return UsageWindow(
            instance_uid=subject.instance_uid,
            seq=self._seq,
            node=subject.node,
            boot_id=subject.boot_id,
            function=subject.function,
            state=self._state.value,
            gpu_model=self._placement.gpu_model,
            gpu_uuids=self._placement.gpu_uuids,
            gpu_count=subject.gpu_count,
            gpu_memory_bytes=subject.gpu_memory_bytes or self._placement.card_bytes,
            vcpu_millis=subject.vcpu_millis,
            memory_bytes=subject.memory_bytes,
            disk_bytes=subject.disk_bytes,
            start_mono_ns=self._start,
            end_mono_ns=end,
            start_wall_ns=self._start_wall,
            active_ns=active + quiet if self._quiet is BilledAs.ACTIVE else active,
            idle_ns=quiet if self._quiet is BilledAs.IDLE else 0,
            unbilled_ns=quiet if self._quiet is BilledAs.UNBILLED else 0,
            invocations=self._invocations,
            estimated=False,
            sealed=sealed,
        )
