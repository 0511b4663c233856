"""The command line of `cuda-checkpoint`: its arguments and output, and whether a file may be trusted to be it.

Texts from NVIDIA/cuda-checkpoint with drivers 550 to 580 (agent/docs/facts/gpu-checkpoint.md, section 1). Preloaded
libraries may print between them, so known texts are searched anywhere and everything else is ignored.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from agent.adapters.cuda.result_codes import NO_CUDA, CudaResult
from agent.ports import CudaCall, CudaOp, CudaState

MAX_TIMEOUT_MS = 2**31 - 1
UNKNOWN_ERROR = 999
"""CUDA_ERROR_UNKNOWN, for a text that is not in the table."""

_UUID = re.compile(r"GPU-[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_RESULT_TEXT = re.compile(
    r'(?:Could not (?:lock|checkpoint|restore|unlock) on|Error getting process state for) process ID \d+: "([^"\n]*)"'
)
_INIT_FAILED = re.compile(r'Error initializing CUDA: "([^"\n]*)"')
_TOO_OLD = ("Insufficient driver", "Invalid option(s) or option(s) not supported by this CUDA Driver")
"""Our arguments are valid, so an unsupported option means that the driver is too old."""

_CODES = {
    # Texts of cuGetErrorString: the program prints nothing else of a result.
    "invalid argument": CudaResult.INVALID_VALUE,
    "out of memory": CudaResult.OUT_OF_MEMORY,
    "initialization error": CudaResult.NOT_INITIALIZED,
    "OS call failed or operation not supported on this OS": CudaResult.OPERATING_SYSTEM,
    "the operation cannot be performed in the present state": CudaResult.ILLEGAL_STATE,
    "device not ready": CudaResult.NOT_READY,
    "operation not permitted": CudaResult.NOT_PERMITTED,
    "operation not supported": CudaResult.NOT_SUPPORTED,
}
_STATES = {
    "running": CudaState.RUNNING,
    "locked": CudaState.LOCKED,
    "checkpointed": CudaState.CHECKPOINTED,
    "failed": CudaState.FAILED,
    "checkpointing": CudaState.CHECKPOINTING,
    "restoring": CudaState.RESTORING,
    "unknown": CudaState.UNKNOWN,
}


def arguments_of(call: CudaCall) -> list[str]:
    """The program's arguments for a call. Raises ValueError for invalid ones, which it would check only after
    cuInit."""
    if call.pid <= 0 or not 0 <= call.timeout_ms <= MAX_TIMEOUT_MS:
        raise ValueError(f"pid {call.pid} or timeout {call.timeout_ms} ms is out of range")
    pid = ["--pid", str(call.pid)]
    if call.op is CudaOp.STATE:
        return ["--get-state", *pid]
    arguments = ["--action", call.op.value.lower(), *pid]
    if call.op is CudaOp.LOCK and call.timeout_ms:
        arguments += ["--timeout", str(call.timeout_ms)]
    if call.op is CudaOp.RESTORE and call.gpu_map:
        if not all(_UUID.fullmatch(uuid) for pair in call.gpu_map for uuid in pair):
            raise ValueError("a GPU map holds something that is no GPU uuid")
        arguments += ["--device-map", ",".join(f"{old}={new}" for old, new in call.gpu_map)]
    return arguments


def init_error(text: str) -> str:
    """Why cuInit failed, before anything was done to the target; "" if it did not fail. Not an answer about the target:
    of a target, `initialization error` means that it does not use CUDA."""
    found = _INIT_FAILED.findall(text)
    return (found[-1] or "no message") if found else ""


def error_code(text: str) -> int:
    """The result code behind the output of a failed call."""
    results = _RESULT_TEXT.findall(text)
    if results:
        return _CODES.get(results[-1], UNKNOWN_ERROR)
    return CudaResult.NOT_SUPPORTED if any(marker in text for marker in _TOO_OLD) else UNKNOWN_ERROR


def read_state(returncode: int, output: str, error: str) -> tuple[int, CudaState]:
    """Result and state of a --get-state: the last line that names a state. A process without CUDA is an answer (code 0,
    NONE), as with the driver's API."""
    if returncode == 0:
        lines = (_STATES.get(line.strip()) for line in reversed(output.splitlines()))
        return 0, next((state for state in lines if state is not None), CudaState.UNKNOWN)
    code = error_code(error)
    return (0, CudaState.NONE) if code in NO_CUDA else (code, CudaState.UNKNOWN)


def find_utility(path: Path) -> tuple[Path | None, str]:
    """The program behind `path` (links followed), or None and the reason not to run it. It gets the agent's rights over
    every process, so only root and the agent's own user may be able to replace it."""
    try:
        real = path.resolve(strict=True)
        entry = real.stat()
    except (OSError, RuntimeError):
        return None, f"there is no program {path}"
    if not path.is_absolute() or not stat.S_ISREG(entry.st_mode) or not os.access(real, os.X_OK):
        return None, f"{path} is not an executable file"
    for folder in (real, *real.parents):
        found = folder.stat()
        if found.st_uid not in (0, os.geteuid()):
            return None, f"{folder} belongs to user {found.st_uid}, who could replace the program: chown root {folder}"
        # In a sticky folder such as /tmp others may add files but not replace ours.
        if found.st_mode & 0o022 and not (folder != real and found.st_mode & stat.S_ISVTX):
            return None, f"{folder} can be written by others, who could replace the program: chmod go-w {folder}"
    return real, ""
