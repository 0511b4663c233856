"""Plans faults: which checkpoint call fails, and how. Pure; `checkpointing.py` applies them.

Each kind of fault is known from NVIDIA/cuda-checkpoint's issues or the driver's API. A fault is planned for one
operation: the target's restore thread does or does not do the work, and the answer differs. A call that would be
refused anyway (wrong state, no such process) uses up no fault.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Final

from agent.core.errors import InvalidArgumentError, PreconditionError
from agent.emulated.protocol import CuResult, MessageOp, State

MAX_FAULTS = 64
MAX_DELAY_MS = 3_600_000
_MAX_COUNT = 1_000_000

OPERATIONS: Final = {
    "lock": MessageOp.LOCK,
    "checkpoint": MessageOp.CHECKPOINT,
    "restore": MessageOp.RESTORE,
    "unlock": MessageOp.UNLOCK,
    "state": MessageOp.GET_STATE,
}
RESULTS: Final = {
    result.name: result
    for result in (
        CuResult.NOT_READY,
        CuResult.NOT_SUPPORTED,
        CuResult.OPERATING_SYSTEM,
        CuResult.OUT_OF_MEMORY,
        CuResult.INVALID_VALUE,
        CuResult.ILLEGAL_STATE,
        CuResult.NOT_INITIALIZED,
        CuResult.NOT_PERMITTED,
    )
}
DEATH: Final = "DEATH"
HANG: Final = "HANG"
STALE: Final = "STALE"
FAILED: Final = "FAILED"
SLOW: Final = "SLOW"
UNDER_WAY: Final = {"CHECKPOINTING": State.CHECKPOINTING, "RESTORING": State.RESTORING}
"""Answers to `state`, named as in cuda.h."""

KINDS: Final = (*RESULTS, DEATH, HANG, STALE, FAILED, SLOW, *UNDER_WAY)
_KINDS_WITH_AFTER: Final = frozenset({*RESULTS, DEATH, HANG})


@dataclass(slots=True)
class Fault:
    """A planned fault. `seen` and `hits` count the calls that matched and those that failed.

    kind: what happens. With `after`, the operation is done first.
    - a CUresult's name: answered with it.
    - DEATH: the target dies half-way, and the caller gets OPERATING_SYSTEM.
    - HANG: no answer until the plan is cleared; without `after`, the operation is only done then.
    - STALE: success, but nothing is done; for `state` the state before the last change.
    - FAILED: OPERATING_SYSTEM, and the process is FAILED for good.
    - CHECKPOINTING, RESTORING: of `state` only, which answers so.
    - SLOW: takes `delay_ms` longer, which any other kind may too.
    device: index, None = any. times: number of hits, 0 = unlimited. skip: matching calls to let pass first."""

    id: int
    operation: MessageOp
    kind: str
    pid: int | None = None
    device: int | None = None
    times: int = 1
    skip: int = 0
    after: bool = False
    delay_ms: int = 0
    seen: int = 0
    hits: int = 0

    @property
    def hangs_before(self) -> bool:
        return self.kind == HANG and not self.after

    @property
    def hangs_after(self) -> bool:
        return self.kind == HANG and self.after

    @property
    def kills_before(self) -> bool:
        return self.kind == DEATH and not self.after

    @property
    def kills_after(self) -> bool:
        return self.kind == DEATH and self.after

    @property
    def instead(self) -> CuResult | None:
        """The answer that replaces the operation; None if it is done."""
        if self.after:
            return None
        match self.kind:
            case "FAILED":
                return CuResult.OPERATING_SYSTEM
            case "STALE":
                return CuResult.SUCCESS
            case kind:
                return RESULTS.get(kind)

    @property
    def answer_after(self) -> CuResult | None:
        """The answer after the operation is done; None = its real result."""
        return RESULTS.get(self.kind) if self.after else None


def check(fault: Fault) -> None:
    """Raises InvalidArgumentError EMULATED_FAULT_INVALID, naming the valid values."""
    if fault.kind not in KINDS:
        raise _invalid(f"There is no kind of fault {fault.kind!r}; choose one of {', '.join(KINDS)}.")
    if fault.after and fault.kind not in _KINDS_WITH_AFTER:
        raise _invalid(f"after goes with {', '.join(sorted(_KINDS_WITH_AFTER))}, but not with {fault.kind}.")
    if fault.kind in UNDER_WAY and fault.operation is not MessageOp.GET_STATE:
        raise _invalid(f"{fault.kind} is an answer to state only.")
    if fault.kind == SLOW and not fault.delay_ms:
        raise _invalid("SLOW needs delay_ms, the extra milliseconds of the operation.")
    bounds = {
        "times": (fault.times, _MAX_COUNT),
        "skip": (fault.skip, _MAX_COUNT),
        "delay_ms": (fault.delay_ms, MAX_DELAY_MS),
    }
    for name, (value, most) in bounds.items():
        if not 0 <= value <= most:
            raise _invalid(f"{name} must be 0 to {most}.")


def find_operation(name: str) -> MessageOp:
    """Raises InvalidArgumentError EMULATED_FAULT_INVALID."""
    operation = OPERATIONS.get(name)
    if operation is None:
        raise _invalid(f"There is no operation {name!r}; choose one of {', '.join(OPERATIONS)}.")
    return operation


def operation_name(operation: MessageOp) -> str:
    return next(name for name, op in OPERATIONS.items() if op is operation)


class FaultPlan:
    """The pending faults in planned order, at most MAX_FAULTS."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._last_id = 0

    @property
    def empty(self) -> bool:
        return not self._faults

    def add(self, fault: Fault) -> int:
        """Plan a fault and return its id. Raises as `check`, and PreconditionError EMULATED_FAULTS_FULL."""
        check(fault)
        if len(self._faults) >= MAX_FAULTS:
            raise PreconditionError(
                "EMULATED_FAULTS_FULL", f"{MAX_FAULTS} faults are planned already; clear them before you plan more."
            )
        self._last_id += 1
        fault.id = self._last_id
        self._faults.append(fault)
        return fault.id

    def strike(self, operation: MessageOp, pid: int, devices: Set[int]) -> Fault | None:
        """Count this call, and return the first planned fault that applies to it; None if none does."""
        for fault in self._faults:
            if fault.operation is not operation or fault.pid not in (None, pid):
                continue
            if fault.device is not None and fault.device not in devices:
                continue
            fault.seen += 1
            if fault.seen <= fault.skip:
                continue
            fault.hits += 1
            if fault.hits == fault.times:
                self._faults.remove(fault)
            return fault
        return None

    def pending(self) -> tuple[Fault, ...]:
        return tuple(self._faults)

    def clear(self) -> None:
        self._faults.clear()


def _invalid(message: str) -> InvalidArgumentError:
    return InvalidArgumentError("EMULATED_FAULT_INVALID", message)
