"""The Checkpointer port on NVIDIA's `cuda-checkpoint` program (driver 555 and newer): one process per operation.

For hosts whose driver has no public API yet. Slow where cuInit is slow (0.4 to 7 s per start on hosts with several
GPUs). Uses separate actions only: the combined action can't time out the lock and takes no device map. A program
outlives a killed agent and completes its operation; recovery reads states until they are stable.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from agent.adapters.cuda.program_runner import KILL_TIMEOUT_S, BoundedProgram, Ending, ProgramResult
from agent.adapters.cuda.result_codes import not_begun
from agent.adapters.cuda.utility_program import arguments_of, error_code, find_utility, init_error, read_state
from agent.core.errors import ConfigError, UnavailableError
from agent.log import get_logger
from agent.ports import CudaAnswer, CudaCall, CudaFault, CudaOp, CudaReply, CudaState

MAX_QUEUE = 256
HELP_DEADLINE_S = 20.0

_log = get_logger()


class UtilityCheckpointer:
    """`agent.ports.Checkpointer`. Create, `start()`, use and `close()` it on one loop's thread."""

    def __init__(
        self,
        path: Path,
        environment: Mapping[str, str] | None = None,
        *,
        parallel: int = 2,
        queue_timeout_s: float = 60.0,
        spawn_s: float = 0.0,
        on_stuck: Callable[[Sequence[str]], None] | None = None,
    ) -> None:
        """Parameters:

        - `parallel`: programs that run at once.
        - `environment` decides which libcuda they load; None: the agent's own environment.
        - `spawn_s`: time added to each deadline for the program's start (cuInit).
        - `on_stuck` gets the uuids of the GPUs whose program survived SIGKILL.
        """
        self._path = path
        self._environment = environment
        self._permits = asyncio.Semaphore(parallel)
        self._queue_timeout_s = queue_timeout_s
        self._spawn_s = spawn_s
        self._on_stuck = on_stuck
        self._waiting = 0
        self._batches: set[asyncio.Task[CudaReply]] = set()
        self._running: set[BoundedProgram] = set()
        self._closed = False

    async def start(self) -> None:
        """Check that the program exists, may be trusted, and that its driver has separate actions. Raises ConfigError
        CHECKPOINT_UTILITY_INVALID, UnavailableError CHECKPOINT_UTILITY_UNAVAILABLE."""
        real, problem = find_utility(self._path)
        if real is None:
            raise ConfigError("CHECKPOINT_UTILITY_INVALID", f"gpu.utility_path: {problem}")
        self._path = real
        try:
            ended = await self._spawn(["--help"], HELP_DEADLINE_S)
        except OSError as error:
            raise ConfigError(
                "CHECKPOINT_UTILITY_INVALID", f"gpu.utility_path: {real} does not run: {error}"
            ) from error
        if ended.ending is not Ending.ENDED:
            raise UnavailableError(
                "CHECKPOINT_UTILITY_UNAVAILABLE", f"{real} --help did not end; is the driver healthy?"
            )
        if "--action" not in ended.output:
            raise UnavailableError(
                "CHECKPOINT_UTILITY_UNAVAILABLE",
                f"{real} has no separate actions here (exit code {ended.code}); install driver 580 or newer",
            )

    async def run(self, calls: Sequence[CudaCall], deadline_s: float, gpu_uuids: Sequence[str] = ()) -> CudaReply:
        """`Checkpointer.run`; `deadline_s` bounds each operation of the batch. Raises ValueError as `arguments_of`.
        Reasons with NOT_BEGUN: DRIVER_QUEUE_FULL, DRIVER_BUSY, DRIVER_WORKERS_DOWN, CUDA_INIT_FAILED; with LOST and
        STUCK: DRIVER_OPERATION_LOST, and with LOST also the former if part of the batch was done."""
        commands = [arguments_of(call) for call in calls]  # checks all before the first is run
        if not calls:
            return CudaReply()
        if self._closed:
            return not_begun("DRIVER_WORKERS_DOWN", "the agent is stopping")
        if self._waiting >= MAX_QUEUE:
            return not_begun("DRIVER_QUEUE_FULL", f"{self._waiting} operations already wait for the driver")
        batch = asyncio.create_task(self._run(calls, commands, deadline_s, gpu_uuids))
        self._batches.add(batch)
        batch.add_done_callback(self._batches.discard)
        return await asyncio.shield(batch)  # a cancelled caller must not orphan the program

    def on_persistence_off(self) -> None:
        """Does nothing: the program calls cuInit itself where the driver supports it (570 and newer)."""

    async def close(self) -> None:
        """Kill the running programs and wait until they are reaped or abandoned; their kill timeout bounds the wait."""
        self._closed = True
        for program in self._running:
            program.kill()
        if self._batches:
            await asyncio.wait(self._batches, timeout=KILL_TIMEOUT_S + 1)

    async def _run(
        self, calls: Sequence[CudaCall], commands: Sequence[Sequence[str]], deadline_s: float, gpu_uuids: Sequence[str]
    ) -> CudaReply:
        self._waiting += 1
        try:
            async with asyncio.timeout(self._queue_timeout_s):
                await self._permits.acquire()
        except TimeoutError:
            return not_begun("DRIVER_BUSY", "too many operations are in progress")
        finally:
            self._waiting -= 1
        try:
            return await self._perform(calls, commands, deadline_s, gpu_uuids)
        finally:
            self._permits.release()

    async def _perform(
        self, calls: Sequence[CudaCall], commands: Sequence[Sequence[str]], deadline_s: float, gpu_uuids: Sequence[str]
    ) -> CudaReply:
        answers: list[CudaAnswer] = []
        for call, arguments in zip(calls, commands, strict=True):
            # A program that does not start leaves its own operation undone, but earlier ones are done.
            fault = CudaFault.LOST if answers else CudaFault.NOT_BEGUN
            if self._closed:
                return CudaReply((), fault, "DRIVER_WORKERS_DOWN", "the agent is stopping")
            try:
                ended = await self._spawn(arguments, deadline_s)
            except OSError as error:
                return CudaReply((), fault, "DRIVER_WORKERS_DOWN", f"cuda-checkpoint can't be started: {error}")
            if ended.ending is not Ending.ENDED:
                return self._lost(call, ended, gpu_uuids)
            if ended.code and (message := init_error(ended.error)):
                return CudaReply((), fault, "CUDA_INIT_FAILED", f"cuda-checkpoint can't initialise CUDA: {message}")
            answers.append(await self._answer(call, ended, deadline_s))
            if answers[-1].code:
                break
        return CudaReply(tuple(answers))

    async def _answer(self, call: CudaCall, ended: ProgramResult, deadline_s: float) -> CudaAnswer:
        if call.op is CudaOp.STATE:
            code, state = read_state(ended.code, ended.output, ended.error)
            return CudaAnswer(call, code, state, ended.elapsed_us)
        if ended.code == 0:
            return CudaAnswer(call, 0, None, ended.elapsed_us)
        state = await self._state_of(call.pid, deadline_s)
        return CudaAnswer(call, error_code(ended.error), state, ended.elapsed_us)

    async def _state_of(self, pid: int, deadline_s: float) -> CudaState:
        """The state after a failure; UNKNOWN if it can't be read."""
        try:
            again = await self._spawn(arguments_of(CudaCall(CudaOp.STATE, pid)), deadline_s)
        except OSError:
            return CudaState.UNKNOWN
        if again.ending is not Ending.ENDED or init_error(again.error):
            return CudaState.UNKNOWN
        return read_state(again.code, again.output, again.error)[1]

    def _lost(self, call: CudaCall, ended: ProgramResult, gpu_uuids: Sequence[str]) -> CudaReply:
        stuck = ended.ending is Ending.STUCK
        if stuck:
            _log.error("driver.utility_stuck", pid=call.pid, operation=call.op.value)
            if self._on_stuck is not None:
                self._on_stuck(gpu_uuids)
        message = f"cuda-checkpoint did not end in time: {call.op.value.lower()} of process {call.pid}"
        return CudaReply((), CudaFault.STUCK if stuck else CudaFault.LOST, "DRIVER_OPERATION_LOST", message)

    async def _spawn(self, arguments: Sequence[str], deadline_s: float) -> ProgramResult:
        program = BoundedProgram([str(self._path), *arguments], self._clean_environment())
        self._running.add(program)
        try:
            return await program.wait(deadline_s + self._spawn_s)
        finally:
            self._running.discard(program)

    def _clean_environment(self) -> dict[str, str]:
        """The environment without LD_PRELOAD: preloaded libraries may print into the output that is parsed.
        (/etc/ld.so.preload still applies; `utility_program` copes with it.)"""
        environment = os.environ if self._environment is None else self._environment
        return {name: value for name, value in environment.items() if name != "LD_PRELOAD"}
