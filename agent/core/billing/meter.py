"""How an instance's life becomes billable time: one `Meter` per instance, pure, fed with integer nanoseconds.

Rules (DESIGN section 5): accrue, then change. Active is the union of [grant, last response byte or close] of the
requests; everything else of a window has the one kind that its state has under the `BillingPolicy`. Windows of an
instance follow each other without a hole within a boot, and `active + idle + unbilled == end - start` in each.

The meter is mutable on purpose: a request costs a few integer operations and no allocation. It has one owner (the
event loop); time never goes back in it: an `at` before the last one counts as the last one, so that a late event
can shorten a bill, never lengthen it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import assert_never

from agent.core.billing.window import UsageWindow
from agent.core.peak import Peak
from agent.core.types import FunctionSpec, InstanceState


class BilledAs(Enum):
    """What a nanosecond of an instance's life is billed as."""

    ACTIVE = "active"
    IDLE = "idle"
    UNBILLED = "unbilled"


@dataclass(frozen=True, slots=True)
class BillingPolicy:
    """The knobs Function Compute leaves open: what the time around the work is billed as.

    `stopping` is the part of STOPPING with no request in flight; the part with one is always active.
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
    """Who is billed, and by which sizes. Constant for an instance within a boot.

    `gpu_count` is what the function asks for, frozen or not: an idle instance is billed at the idle factor of the
    GPUs it comes back to. `gpu_memory_bytes` is per GPU; 0 = the function names none and is billed by the card.
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
    """The GPUs the time is billed on: those held, or those last held while frozen or waiting. `card_bytes` is the
    memory of one of them: a function that names no GPU memory has the whole card and is billed by it."""

    gpu_model: str = ""
    gpu_uuids: tuple[str, ...] = ()
    card_bytes: int = 0


# States in which a request in flight is work done for the user. In the others none can be in flight (lifecycle's
# invariants); if one were, it would not be billed as active.
_WORKING = (InstanceState.RUNNING, InstanceState.STOPPING)


class Meter:
    """The running account of one instance. All times are CLOCK_MONOTONIC ns of one boot; `wall` is for records.

    `in_flight`: requests between grant and end, `peak`: the most of them at once. `unmatched_ends` counts
    ends without a beginning: always 0 unless a caller is wrong; they change nothing else.
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
        """A request was granted a slot at `at`: it is counted as an invocation and active until it ends."""
        if at > self._mark:
            self._mark = at
        if self.in_flight == 0:
            self._busy_since = self._mark
        self.in_flight += 1
        self.peak.note(self.in_flight, at)
        self._invocations += 1

    def request_ended(self, at: int) -> None:
        """The last byte of a response was written, or its connection closed, at `at`."""
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
        """The state that time is billed by now."""
        return self._state

    @property
    def window_start(self) -> int:
        """Monotonic ns at which the open window began."""
        return self._start

    @property
    def seq(self) -> int:
        """The number of the open window. Numbers of an instance only grow."""
        return self._seq

    def state_changed(self, state: InstanceState, at: int, wall: int, *, unbilled: bool = False) -> UsageWindow | None:
        """Close the books on the old state at `at` and open a window for the new one.

        `unbilled` overrides the kind of the quiet time: STARTING before its GPU is granted or while its image is
        pulled. Returns the sealed window, None if it would have been empty. A terminal state ends the ledger: the
        caller drops the meter and writes no open window of it.
        """
        sealed = self.seal(at, wall)
        self._enter(state, unbilled=unbilled)
        return sealed

    def placed(self, placement: Placement, at: int, wall: int) -> UsageWindow | None:
        """The instance now holds these GPUs (start, or a wake on other ones). Seals only if they differ."""
        if placement == self._placement:
            return None
        sealed = self.seal(at, wall)
        self._placement = placement
        return sealed

    def seal(self, at: int, wall: int) -> UsageWindow | None:
        """End the open window at `at` and begin the next one there; requests in flight go on in the next.

        Returns None, and keeps the window open, if nothing happened in it: no time passed and nobody was counted.
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
        """The open window, sealed as it is: for an end at the very moment of a state change, whose empty window may be
        on disk already and must not stay open there."""
        return self._window(self._mark, sealed=True)

    def open_window(self, at: int) -> UsageWindow:
        """The open window as if it ended at `at`, unsealed. Changes nothing: the snapshot the store keeps."""
        return self._window(max(at, self._mark), sealed=False)

    def _enter(self, state: InstanceState, *, unbilled: bool) -> None:
        self._state = state
        self._working = state in _WORKING
        self._quiet = BilledAs.UNBILLED if unbilled else self._policy.quiet_kind(state)

    def _not_before_mark(self, at: int, wall: int) -> tuple[int, int]:
        late = self._mark - at
        return (at, wall) if late <= 0 else (self._mark, wall + late)

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
