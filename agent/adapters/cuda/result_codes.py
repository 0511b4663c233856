"""The CUDA driver API's result codes and process states that the freezer reads, and what they mean.

From cuda.h (CUresult, CUprocessState) and known faults (agent/docs/facts/gpu-checkpoint.md, sections 1, 2 and 7).
`driver_worker.py` makes the calls and knows only numbers.
"""

from __future__ import annotations

from enum import IntEnum

from agent.ports import CudaAnswer, CudaFault, CudaOp, CudaReply, CudaState


class CudaResult(IntEnum):
    """Results that the checkpoint functions, and cuInit before a restore, are known to return."""

    SUCCESS = 0
    INVALID_VALUE = 1
    OUT_OF_MEMORY = 2
    NOT_INITIALIZED = 3
    NO_DEVICE = 100
    OPERATING_SYSTEM = 304
    ILLEGAL_STATE = 401
    NOT_READY = 600
    NOT_PERMITTED = 800
    NOT_SUPPORTED = 801
    SYSTEM_NOT_READY = 802
    SYSTEM_DRIVER_MISMATCH = 803


NO_CUDA = frozenset({CudaResult.INVALID_VALUE, CudaResult.NOT_INITIALIZED})
"""Results of a get-state that mean "no CUDA in this process" (CRIU reads them the same way)."""


PROCESS_STATES = {
    0: CudaState.RUNNING,
    1: CudaState.LOCKED,
    2: CudaState.CHECKPOINTED,
    3: CudaState.FAILED,
    4: CudaState.CHECKPOINTING,
    5: CudaState.RESTORING,
}

_EXPLANATIONS: dict[int, tuple[str, str]] = {
    CudaResult.INVALID_VALUE: (
        "CUDA_INVALID_VALUE",
        "the driver rejects the arguments: a GPU map must name every GPU that it sees, and pair equal models",
    ),
    CudaResult.NO_DEVICE: (
        "CUDA_NO_DEVICE",
        "no GPU can be used here: compare nvidia-smi, and CUDA_VISIBLE_DEVICES of the agent",
    ),
    CudaResult.OUT_OF_MEMORY: (
        "CUDA_OUT_OF_MEMORY",
        "not enough memory: of the host for a checkpoint, of the GPU for a restore, or the GPU is in MIG mode",
    ),
    CudaResult.NOT_INITIALIZED: ("CUDA_NOT_INITIALIZED", "the process does not use CUDA, or has ended"),
    CudaResult.OPERATING_SYSTEM: (
        "CUDA_OPERATING_SYSTEM",
        "the driver lost or could not reach the process: it has died, or the agent lacks a right (hibernode doctor)",
    ),
    CudaResult.ILLEGAL_STATE: (
        "CUDA_ILLEGAL_STATE",
        "the process is not in the state that this operation needs: does another program freeze it?",
    ),
    CudaResult.NOT_READY: (
        "CUDA_LOCK_TIMEOUT",
        "CUDA work was still running when the lock timed out; the process keeps running, the freeze is retried",
    ),
    CudaResult.NOT_PERMITTED: (
        "CUDA_NOT_PERMITTED",
        "not permitted by the driver: turn on persistence mode (nvidia-smi -pm 1) and run the agent as root",
    ),
    CudaResult.NOT_SUPPORTED: (
        "CUDA_NOT_SUPPORTED",
        "the driver can't checkpoint what the process uses: IPC, UVM, MPS, MIG, or before 580 some of PyTorch",
    ),
    CudaResult.SYSTEM_NOT_READY: (
        "CUDA_SYSTEM_NOT_READY",
        "CUDA can't be initialised; on hosts with NVSwitch: systemctl enable --now nvidia-fabricmanager",
    ),
    CudaResult.SYSTEM_DRIVER_MISMATCH: (
        "CUDA_DRIVER_MISMATCH",
        "libcuda and the kernel module have different versions, as after a driver update: reboot",
    ),
}


def is_fatal(answer: CudaAnswer) -> bool:
    """Whether nothing that the driver reports of the process can be trusted after this answer, so that only a kill is
    safe: a 304, unless it is an unlock's and the process runs (facts/gpu-checkpoint.md, section 2)."""
    runs = answer.call.op is CudaOp.UNLOCK and answer.state is CudaState.RUNNING
    return answer.code == CudaResult.OPERATING_SYSTEM and not runs


def explain(answer: CudaAnswer) -> tuple[str, str]:
    """Stable reason and message for an answer of the driver that is not success."""
    reason, sentence = _EXPLANATIONS.get(
        answer.code, (f"CUDA_ERROR_{answer.code}", "a result code that is not expected here")
    )
    operation = answer.call.op.value.lower()
    return reason, f"{operation} of process {answer.call.pid} answered {answer.code}: {sentence}"


def not_begun(reason: str, message: str) -> CudaReply:
    """The reply to a batch of which nothing was begun."""
    return CudaReply((), CudaFault.NOT_BEGUN, reason, message)


def process_state(code: int, state: int) -> CudaState:
    """The state that a get-state returned: from its result code, and from the number it wrote if that is success."""
    if code in NO_CUDA:
        return CudaState.NONE
    if code != CudaResult.SUCCESS:
        return CudaState.UNKNOWN
    return PROCESS_STATES.get(state, CudaState.UNKNOWN)


OP_NUMBERS = {
    CudaOp.STATE: 0,
    CudaOp.LOCK: 1,
    CudaOp.CHECKPOINT: 2,
    CudaOp.RESTORE: 3,
    CudaOp.UNLOCK: 4,
}
"""The operations in a worker's messages; `driver_worker.py` has the same numbers."""
