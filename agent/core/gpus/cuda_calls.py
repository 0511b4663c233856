"""What is asked of the CUDA driver about a process, and what it answers: the data of the Checkpointer port."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class CudaState(Enum):
    """`CUprocessState` of a process (cuda.h), and NONE: the driver says it has no CUDA."""

    RUNNING = "RUNNING"
    LOCKED = "LOCKED"
    CHECKPOINTED = "CHECKPOINTED"
    FAILED = "FAILED"
    CHECKPOINTING = "CHECKPOINTING"
    RESTORING = "RESTORING"
    NONE = "NONE"
    UNKNOWN = "UNKNOWN"


class CudaOp(Enum):
    """`cuCheckpointProcess...`: what it needs and gives is in facts 2 (RESTORE leaves the process LOCKED)."""

    STATE = "STATE"
    LOCK = "LOCK"
    CHECKPOINT = "CHECKPOINT"
    RESTORE = "RESTORE"
    UNLOCK = "UNLOCK"


@dataclass(frozen=True, slots=True)
class CudaCall:
    """One operation on one process. `timeout_ms` is for LOCK (0 = none), `gpu_map` (old uuid, new uuid) for
    RESTORE; a map must name every GPU the driver sees, an empty one means the same GPUs."""

    op: CudaOp
    pid: int
    timeout_ms: int = 0
    gpu_map: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class CudaAnswer:
    """`code` is the driver's CUresult (0 = success), `elapsed_us` the time inside the driver's call. `state` is
    what was read: by STATE, or by the re-read after a failure; None after any other success (ask with STATE)."""

    call: CudaCall
    code: int
    state: CudaState | None
    elapsed_us: int


class CudaFault(Enum):
    """What kept a batch from being answered. NOT_BEGUN: nothing was done. LOST: the operation hung or its
    worker died; it may still run later: thaw, re-read, unlock. STUCK: LOST, and the worker did not even die."""

    NONE = "NONE"
    NOT_BEGUN = "NOT_BEGUN"
    LOST = "LOST"
    STUCK = "STUCK"


@dataclass(frozen=True, slots=True)
class CudaReply:
    """Answers in the order of the calls, to the first failure inclusive. `reason` belongs to `fault`."""

    answers: tuple[CudaAnswer, ...] = ()
    fault: CudaFault = CudaFault.NONE
    reason: str = ""
    message: str = ""

    @property
    def ok(self) -> bool:
        """Everything asked was done and answered with success."""
        return self.fault is CudaFault.NONE and all(answer.code == 0 for answer in self.answers)

    @property
    def driver_ns(self) -> int:
        """Time spent inside the driver's calls."""
        return sum(answer.elapsed_us for answer in self.answers) * 1000
