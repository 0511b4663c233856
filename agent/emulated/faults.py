"""The fault plan: which checkpoint call goes wrong, and how. Pure: it decides, `checkpointing.py` acts.

Each fault is one that NVIDIA/cuda-checkpoint's issues or the driver's API know of. It is planned for one operation
and applies at the driver's own boundary: the target's restore thread does or does not do the work, and the answer
differs. A call that would be refused anyway (wrong state, no such process) uses none up.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Final

from agent.core.errors import InvalidArgumentError, PreconditionError
from agent.emulated.protocol import CuResult, MessageOp

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
KINDS: Final = (*RESULTS, DEATH, HANG, STALE, FAILED, SLOW)
_KINDS_WITH_AFTER: Final = frozenset({*RESULTS, DEATH, HANG})


@dataclass(slots=True)
class Fault:
    """A planned fault; `seen` and `hits` count the calls that matched it and those that it struck.

    kind: a CUresult's name = answered with it and not done (after: done, and then answered with it). DEATH: the target
    dies half-way (after: once it is done) and the caller is answered OPERATING_SYSTEM. HANG: no answer before the plan
    is cleared, and only then it is done (after: done at once). STALE: success, and nothing is done; for `state` the
    state before the last change. FAILED: OPERATING_SYSTEM, and the process is FAILED for good. SLOW: takes longer.
    device: index, None = any. times: how often it strikes, 0 = always. skip: that many matching calls pass unharmed
    first. delay_ms: longer than it would take, with any kind.
    """

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
        """The answer that takes the place of the work; None if the work is done."""
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
        """What is answered although the work has been done; None: how it went."""
        return RESULTS.get(self.kind) if self.after else None


def check(fault: Fault) -> None:
    """Raises InvalidArgumentError EMULATED_FAULT_INVALID: what makes no sense, and what may be said instead."""
    if fault.kind not in KINDS:
        raise _invalid(f"There is no kind of fault {fault.kind!r}; choose one of {', '.join(KINDS)}.")
    if fault.after and fault.kind not in _KINDS_WITH_AFTER:
        raise _invalid(f"after goes with {', '.join(sorted(_KINDS_WITH_AFTER))}, and not with {fault.kind}.")
    if fault.kind == SLOW and not fault.delay_ms:
        raise _invalid("SLOW needs delay_ms, the milliseconds that the operation takes longer.")
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
        raise _invalid(f"There is no operation {name!r} to go wrong; choose one of {', '.join(OPERATIONS)}.")
    return operation


def operation_name(operation: MessageOp) -> str:
    return next(name for name, op in OPERATIONS.items() if op is operation)


class FaultPlan:
    """The faults still to come, in the order they were planned. At most MAX_FAULTS."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._last_id = 0

    @property
    def empty(self) -> bool:
        return not self._faults

    def add(self, fault: Fault) -> int:
        """Plan it; its id. Raises what `check` does, and PreconditionError EMULATED_FAULTS_FULL."""
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
        """The fault that this call meets, counted; None if it goes well. The first planned one that applies counts."""
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
