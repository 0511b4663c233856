"""The Checkpointer port on NVIDIA's `cuda-checkpoint` program (driver 555 and newer): one spawn an operation.

For hosts whose driver has no public API yet; slow where cuInit is (0.4 to 7 s a spawn on hosts with several GPUs).
Separate actions only, never --toggle: it can't time out the lock and takes no device map.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agent.adapters.cuda_api import NO_CUDA, CudaResult
from agent.core.errors import ConfigError
from agent.log import get_logger
from agent.ports import CudaAnswer, CudaCall, CudaFault, CudaOp, CudaReply, CudaState

KILL_TIMEOUT_S = 5.0
MAX_TIMEOUT_MS = 2**31 - 1
UNKNOWN_ERROR = 999
"""CUDA_ERROR_UNKNOWN: for a text that is not in the table."""

_UUID = re.compile(r"GPU-[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_QUOTED = re.compile(r'"([^"]*)"')
_CODES = {
    # The texts of cuGetErrorString, which is all that the program prints of a result.
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
}
_log = get_logger()


@dataclass(frozen=True, slots=True)
class _Ended:
    """One run of the program. `fault` LOST or STUCK: it was killed at its deadline."""

    code: int = 0
    output: str = ""
    error: str = ""
    elapsed_us: int = 0
    fault: CudaFault = CudaFault.NONE


@dataclass(slots=True)
class UtilityCheckpointer:
    """`agent.ports.Checkpointer`. `path` is absolute; at most `parallel` programs run at once; `environment` decides
    which libcuda they find (None: the agent's). `on_stuck` gets the GPUs of one that survived SIGKILL."""

    path: Path
    environment: Mapping[str, str] | None = None
    parallel: int = 2
    queue_timeout_s: float = 60.0
    on_stuck: Callable[[Sequence[str]], None] | None = None
    _places: asyncio.Semaphore = field(init=False)
    _batches: set[asyncio.Task[CudaReply]] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Raises ConfigError CHECKPOINT_UTILITY_INVALID."""
        if not self.path.is_absolute() or not os.access(self.path, os.X_OK):
            raise ConfigError(
                "CHECKPOINT_UTILITY_INVALID", f"{self.path} must be the absolute path of an executable cuda-checkpoint"
            )
        self._places = asyncio.Semaphore(self.parallel)

    async def run(self, calls: Sequence[CudaCall], deadline_s: float, gpu_uuids: Sequence[str] = ()) -> CudaReply:
        """`Checkpointer.run`; here `deadline_s` bounds each operation of the batch. ValueError: see `arguments_of`."""
        commands = [arguments_of(call) for call in calls]  # all are checked before the first one is done
        batch = asyncio.create_task(self._run(calls, commands, deadline_s, gpu_uuids))
        self._batches.add(batch)
        batch.add_done_callback(self._batches.discard)
        return await asyncio.shield(batch)  # a caller that goes away leaves no program without somebody to end it

    async def _run(
        self, calls: Sequence[CudaCall], commands: Sequence[Sequence[str]], deadline_s: float, gpu_uuids: Sequence[str]
    ) -> CudaReply:
        try:
            async with asyncio.timeout(self.queue_timeout_s):
                await self._places.acquire()
        except TimeoutError:
            return CudaReply((), CudaFault.NOT_BEGUN, "DRIVER_BUSY", "too many operations are under way")
        answers: list[CudaAnswer] = []
        try:
            for call, arguments in zip(calls, commands, strict=True):
                ended = await self._spawn(arguments, deadline_s)
                if ended.fault is not CudaFault.NONE:
                    return self._lost(call, ended, gpu_uuids)
                answers.append(await self._answer(call, ended, deadline_s))
                if answers[-1].code:
                    break
            return CudaReply(tuple(answers))
        except OSError as error:
            fault = CudaFault.LOST if answers else CudaFault.NOT_BEGUN
            return CudaReply((), fault, "DRIVER_WORKERS_DOWN", f"cuda-checkpoint can't be started: {error}")
        finally:
            self._places.release()

    async def _answer(self, call: CudaCall, ended: _Ended, deadline_s: float) -> CudaAnswer:
        if call.op is CudaOp.STATE:
            code, state = _read_state(ended)
            return CudaAnswer(call, code, state, ended.elapsed_us)
        if ended.code == 0:
            return CudaAnswer(call, 0, None, ended.elapsed_us)
        again = await self._spawn(arguments_of(CudaCall(CudaOp.STATE, call.pid)), deadline_s)
        state = CudaState.UNKNOWN if again.fault is not CudaFault.NONE else _read_state(again)[1]
        return CudaAnswer(call, _error_code(ended.error), state, ended.elapsed_us)

    def _lost(self, call: CudaCall, ended: _Ended, gpu_uuids: Sequence[str]) -> CudaReply:
        if ended.fault is CudaFault.STUCK:
            _log.error("driver.utility_stuck", pid=call.pid, operation=call.op.value)
            if self.on_stuck is not None:
                self.on_stuck(gpu_uuids)
        message = f"cuda-checkpoint did not end in time: {call.op.value.lower()} of process {call.pid}"
        return CudaReply((), ended.fault, "DRIVER_OPERATION_LOST", message)

    async def _spawn(self, arguments: Sequence[str], deadline_s: float) -> _Ended:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        # Not asyncio's: with uvloop and grpc that one prints fork warnings (facts emulated-driver, pitfall 11).
        process = subprocess.Popen(  # noqa: ASYNC220
            [str(self.path), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._clean_environment(),
            cwd="/",
            start_new_session=True,
        )
        if not await _ends(process, deadline_s):
            process.kill()
            fault = CudaFault.LOST if await _ends(process, KILL_TIMEOUT_S) else CudaFault.STUCK
            if fault is CudaFault.LOST:
                process.communicate()
            return _Ended(fault=fault)
        output, error = process.communicate()  # it has ended, and what it says fits into a pipe
        elapsed_us = round((loop.time() - begin) * 1e6)
        return _Ended(process.returncode, output.decode(errors="replace"), error.decode(errors="replace"), elapsed_us)

    def _clean_environment(self) -> dict[str, str]:
        """Without LD_PRELOAD: what such libraries print gets into the output that is parsed here."""
        environment = os.environ if self.environment is None else self.environment
        return {name: value for name, value in environment.items() if name != "LD_PRELOAD"}


def arguments_of(call: CudaCall) -> list[str]:
    """The program's arguments. It does not reject bad ones itself before cuInit: raises ValueError for those."""
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


def _read_state(ended: _Ended) -> tuple[int, CudaState]:
    """A process without CUDA is an answer (code 0, NONE), as for the driver's API."""
    if ended.code == 0:
        return 0, _STATES.get(ended.output.strip(), CudaState.UNKNOWN)
    code = _error_code(ended.error)
    return (0, CudaState.NONE) if code in NO_CUDA else (code, CudaState.UNKNOWN)


def _error_code(text: str) -> int:
    quoted = _QUOTED.search(text)
    return _CODES.get(quoted.group(1), UNKNOWN_ERROR) if quoted else UNKNOWN_ERROR


async def _ends(process: subprocess.Popen[bytes], deadline_s: float) -> bool:
    """Has it ended (not yet collected) within the deadline?"""
    loop = asyncio.get_running_loop()
    pidfd = os.pidfd_open(process.pid)
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        async with asyncio.timeout(deadline_s):
            await ended.wait()
        return True
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
