"""Calls to the CUDA driver about a process, and their answers: the data of the Checkpointer port."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class CudaState(Enum):
    """`CUprocessState` of a process (cuda.h); NONE: the process has no CUDA context."""

    RUNNING = "RUNNING"
    LOCKED = "LOCKED"
    CHECKPOINTED = "CHECKPOINTED"
    FAILED = "FAILED"
    CHECKPOINTING = "CHECKPOINTING"
    RESTORING = "RESTORING"
    NONE = "NONE"
    UNKNOWN = "UNKNOWN"


class CudaOp(Enum):
    """`cuCheckpointProcess...` (`agent/docs/facts/gpu-checkpoint.md`, section 2). RESTORE leaves the process LOCKED."""

    STATE = "STATE"
    LOCK = "LOCK"
    CHECKPOINT = "CHECKPOINT"
    RESTORE = "RESTORE"
    UNLOCK = "UNLOCK"


@dataclass(frozen=True, slots=True)
class CudaCall:
    """One operation on one process.

    - `timeout_ms`: for LOCK; 0 = none
    - `gpu_map`: (old uuid, new uuid) for RESTORE, with every GPU that the driver sees; empty = the same GPUs
    """

    op: CudaOp
    pid: int
    timeout_ms: int = 0
    gpu_map: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class CudaAnswer:
    """The driver's answer to one call.

    - `code`: CUresult, 0 = success
    - `state`: read by STATE, or by the re-read after a failure; None after any other success
    - `elapsed_us`: time inside the driver's call
    """

    call: CudaCall
    code: int
    state: CudaState | None
    elapsed_us: int


class CudaFault(Enum):
    """Why a batch was not answered in full.

    - NOT_BEGUN: nothing was done
    - LOST: the call hung or its worker died; it may still run later: thaw, read the state, unlock
    - STUCK: LOST, and the worker could not be killed
    """

    NONE = "NONE"
    NOT_BEGUN = "NOT_BEGUN"
    LOST = "LOST"
    STUCK = "STUCK"


@dataclass(frozen=True, slots=True)
class CudaReply:
    """Answers in the order of the calls, up to and including the first failure. `reason` belongs to `fault`."""

    answers: tuple[CudaAnswer, ...] = ()
    fault: CudaFault = CudaFault.NONE
    reason: str = ""
    message: str = ""

    @property
    def ok(self) -> bool:
        """All calls succeeded."""
        return self.fault is CudaFault.NONE and all(answer.code == 0 for answer in self.answers)

    @property
    def driver_ns(self) -> int:
        """Time spent inside the driver's calls."""
        return sum(answer.elapsed_us for answer in self.answers) * 1000
