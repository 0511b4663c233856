"""The process that calls libcuda's checkpoint functions. A stand-alone script: it imports nothing from the agent.

A call into the driver can hang in the kernel for ever, so it is made in a process that can be killed and replaced.
`driver_worker_process.py` starts it as `python -I -S driver_worker.py <socket fd> <parent pid>`. The socket is
SOCK_SEQPACKET, one JSON message each way:

    worker, once:  {"hello": <cuDriverGetVersion>, "error": ""}
    agent:         {"id": n, "init": bool, "calls": [[op, pid, timeout_ms, [[old_uuid, new_uuid], ...]], ...]}
    worker:        {"id": n, "answers": [[code, state_code, state, microseconds], ...]}

The answers end at the first failure, after which the state is read again. `state_code` and `state` are the result and
the value of a get-state, -1 where none was made. Ops: 0 state, 1 lock, 2 checkpoint, 3 restore, 4 unlock.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable

STATE, LOCK, CHECKPOINT, RESTORE, UNLOCK = range(5)
CHECKPOINT_API_VERSION = 12080  # the CUDA version that made the functions public (driver 570)
ARGS_BYTES = 64  # every args struct of the checkpoint functions (cuda.h)
MAPS_SINCE = 13000  # CUDA 13.0 (driver 580): restore reads gpuPairs; older drivers ignore the field
NOT_FOUND = 500
NOT_SUPPORTED = 801
PR_SET_PDEATHSIG = 1
MAX_MESSAGE_BYTES = 1 << 17
NO_STATE = -1
NOT_CUDA = (1, 3)  # get-state of a process without CUDA: INVALID_VALUE or NOT_INITIALIZED
SYMBOLS = {
    STATE: b"cuCheckpointProcessGetState",
    LOCK: b"cuCheckpointProcessLock",
    CHECKPOINT: b"cuCheckpointProcessCheckpoint",
    RESTORE: b"cuCheckpointProcessRestore",
    UNLOCK: b"cuCheckpointProcessUnlock",
}


class LockArgs(ctypes.Structure):
    _fields_ = (("timeout_ms", ctypes.c_uint), ("reserved", ctypes.c_ubyte * (ARGS_BYTES - 4)))


class GpuPair(ctypes.Structure):
    _fields_ = (("old", ctypes.c_ubyte * 16), ("new", ctypes.c_ubyte * 16))


class RestoreArgs(ctypes.Structure):
    _fields_ = (
        ("pairs", ctypes.POINTER(GpuPair)),
        ("pairs_count", ctypes.c_uint),
        ("reserved", ctypes.c_ubyte * (ARGS_BYTES - ctypes.sizeof(ctypes.c_void_p) - 4)),
    )


class DriverError(Exception):
    """libcuda can't be used for checkpoints here."""


def uuid_bytes(text: str) -> bytes:
    """The 16 bytes of an NVML uuid such as "GPU-8c0b8f54-...": the last 32 hex digits."""
    return bytes.fromhex(text.rpartition("GPU-")[2].replace("-", ""))


class LibCuda:
    """libcuda.so.1 and the checkpoint functions that cuGetProcAddress returns."""

    def __init__(self) -> None:
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise DriverError(f"libcuda.so.1 can't be loaded ({error}): install the NVIDIA driver") from error
        self.must_init = False
        self._initialized = False
        version = ctypes.c_int(0)
        self._cuda.cuDriverGetVersion(ctypes.byref(version))
        self.version = version.value
        self._functions = {op: self._resolve(symbol) for op, symbol in SYMBOLS.items()}

    def _resolve(self, symbol: bytes) -> Callable[..., int]:
        """Look up a function by its base name, in the version in which it became public: a newer one would ask for
        arguments that are not passed here, dlsym for the oldest. Drivers answer a version that they don't have by
        INVALID_VALUE, or (550, 555) by success and a null pointer."""
        pointer = ctypes.c_void_p(None)
        arguments = [symbol, ctypes.byref(pointer), ctypes.c_int(CHECKPOINT_API_VERSION), ctypes.c_uint64(0)]
        try:
            result = self._cuda.cuGetProcAddress_v2(*arguments, ctypes.byref(ctypes.c_int(0)))
        except AttributeError:
            try:
                result = self._cuda.cuGetProcAddress(*arguments)
            except AttributeError:
                result = NOT_FOUND
        if result != 0 or not pointer.value:
            raise DriverError(self._missing(symbol.decode(), result))
        signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
        return signature(pointer.value)

    def _missing(self, name: str, result: int) -> str:
        """What the answer leaves open, the version says: whether this driver should have the function."""
        found = f"libcuda (CUDA {self.version // 1000}.{self.version % 1000 // 10}) has no {name} (answer {result})"
        if self.version < CHECKPOINT_API_VERSION:
            return f"{found}: install driver 570 or newer"
        return f"{found}, though its version should: another libcuda.so.1 is found first, or reinstall the driver"

    def state(self, pid: int) -> tuple[int, int]:
        """Result code and CUprocessState (-1 unless the code is 0)."""
        value = ctypes.c_int(NO_STATE)
        code = int(self._functions[STATE](pid, ctypes.cast(ctypes.byref(value), ctypes.c_void_p)))
        return code, value.value if code == 0 else NO_STATE

    def lock(self, pid: int, timeout_ms: int) -> int:
        return self._call(LOCK, pid, LockArgs(timeout_ms=timeout_ms))

    def checkpoint(self, pid: int) -> int:
        return self._call(CHECKPOINT, pid, (ctypes.c_ubyte * ARGS_BYTES)())

    def unlock(self, pid: int) -> int:
        return self._call(UNLOCK, pid, (ctypes.c_ubyte * ARGS_BYTES)())

    def restore(self, pid: int, pairs: list[list[str]]) -> int:
        """Restore, after cuInit if `must_init`: without persistence mode a restore needs it, and it costs seconds."""
        if pairs and self.version < MAPS_SINCE:
            return NOT_SUPPORTED
        if self.must_init and not self._initialized:
            code = int(self._cuda.cuInit(0))
            if code != 0:
                return code
            self._initialized = True
        arguments = RestoreArgs()
        if pairs:
            table = (GpuPair * len(pairs))()
            for entry, (old, new) in zip(table, pairs, strict=True):
                entry.old[:] = uuid_bytes(old)
                entry.new[:] = uuid_bytes(new)
            arguments.pairs = ctypes.cast(table, ctypes.POINTER(GpuPair))
            arguments.pairs_count = len(pairs)
        return self._call(RESTORE, pid, arguments)

    def _call(self, op: int, pid: int, arguments: ctypes.Structure | ctypes.Array[ctypes.c_ubyte]) -> int:
        return int(self._functions[op](pid, ctypes.cast(ctypes.byref(arguments), ctypes.c_void_p)))


def perform(driver: LibCuda, op: int, pid: int, timeout_ms: int, pairs: list[list[str]]) -> list[int]:
    """Make one call. Returns its result code, the state's code and value (-1: not read), and the microseconds it
    took."""
    begin = time.perf_counter_ns()
    state_code = state = NO_STATE
    if op == STATE:
        code, state = driver.state(pid)
        state_code = code
    elif op == LOCK:
        code = driver.lock(pid, timeout_ms)
    elif op == CHECKPOINT:
        code = driver.checkpoint(pid)
    elif op == RESTORE:
        code = driver.restore(pid, pairs)
    else:
        code = driver.unlock(pid)
    elapsed_us = (time.perf_counter_ns() - begin) // 1000
    if op == STATE and code in NOT_CUDA:
        code = 0  # "no CUDA" is an answer, not a failure: the batch goes on
    elif op != STATE and code != 0:
        state_code, state = driver.state(pid)
    return [code, state_code, state, elapsed_us]


def run_batch(driver: LibCuda, calls: list[tuple[int, int, int, list[list[str]]]]) -> list[list[int]]:
    """Make the calls in order, up to and including the first failure."""
    answers: list[list[int]] = []
    for op, pid, timeout_ms, pairs in calls:
        answers.append(perform(driver, op, pid, timeout_ms, pairs))
        if answers[-1][0] != 0:
            break
    return answers


def serve(channel: socket.socket) -> int:
    """Answer until the agent closes the socket."""
    try:
        driver = LibCuda()
    except DriverError as error:
        channel.send(json.dumps({"hello": 0, "error": str(error)}).encode())
        return 1
    channel.send(json.dumps({"hello": driver.version, "error": ""}).encode())
    while message := channel.recv(MAX_MESSAGE_BYTES):
        request = json.loads(message)
        driver.must_init = request.get("init", False)
        answers = run_batch(driver, request["calls"])
        channel.send(json.dumps({"id": request["id"], "answers": answers}).encode())
    return 0


def main(arguments: list[str]) -> int:
    """Arrange to die with the agent, then serve. The parent may have died before PR_SET_PDEATHSIG, so it is
    compared."""
    descriptor, parent = int(arguments[0]), int(arguments[1])
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # crashes of libcuda must not fill the root directory
    if os.getppid() != parent:
        return 1
    channel = socket.socket(fileno=descriptor)
    try:
        return serve(channel)
    except (BrokenPipeError, ConnectionResetError):
        return 0  # the agent is gone


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
