"""A fake of the driver's checkpoint API: the rules of cuda.h on a table of processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from agent.adapters.cuda.result_codes import CudaResult
from agent.core.types import MIB, GpuProcess
from agent.ports import CudaAnswer, CudaCall, CudaFault, CudaOp, CudaReply, CudaState

_RULES: dict[CudaOp, tuple[CudaState, CudaState]] = {
    CudaOp.LOCK: (CudaState.RUNNING, CudaState.LOCKED),
    CudaOp.CHECKPOINT: (CudaState.LOCKED, CudaState.CHECKPOINTED),
    CudaOp.RESTORE: (CudaState.CHECKPOINTED, CudaState.LOCKED),
    CudaOp.UNLOCK: (CudaState.LOCKED, CudaState.RUNNING),
}


@dataclass
class FakeCudaProcess:
    """One process for the driver. `thawed` is cleared while its cgroup is frozen: then it can't answer."""

    state: CudaState = CudaState.RUNNING
    vram_bytes: int = 16 * MIB
    gpu_uuid: str = "GPU-00000000-0000-4000-8000-000000000000"
    thawed: asyncio.Event = field(default_factory=asyncio.Event)
    stale_operations: list[CudaCall] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.thawed.set()

    def thaw(self) -> None:
        """Let it run: calls that hung on it run now, although their caller was killed."""
        self.thawed.set()
        for call in self.stale_operations:
            if self.state is _RULES[call.op][0]:
                self.perform(call)
        self.stale_operations.clear()

    def perform(self, call: CudaCall) -> None:
        """What the operation does when it succeeds."""
        self.state = _RULES[call.op][1]
        if call.op is CudaOp.RESTORE:
            self.gpu_uuid = dict(call.gpu_map).get(self.gpu_uuid, self.gpu_uuid)


@dataclass(frozen=True)
class Fault:
    """What goes wrong, once, at the next `op`: answer `code` (with `executes` it is done all the same), or report
    success without doing it (`stale`), or hang until the deadline (`hang`; with `executes` it is done at once, with
    `later` at the next thaw), leaving the process in `leaves`; `dies`: the target ends of it."""

    op: CudaOp
    code: int = 0
    stale: bool = False
    hang: bool = False
    stuck: bool = False
    executes: bool = False
    later: bool = False
    dies: bool = False
    leaves: CudaState | None = None
    pid: int = 0


@dataclass
class FakeCheckpointer:
    """Knobs: `processes` by pid, `faults`, `keeps_vram` (NVML still shows memory after a checkpoint), `not_begun` (no
    worker is free), `gpu_uuids` (a GPU map must name all of them, if any are given), `kill` (ends a process).
    `batches` records all calls, `frozen_calls` those on a frozen target; a hang takes `hang_s` at most."""

    processes: dict[int, FakeCudaProcess] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    keeps_vram: bool = False
    not_begun: str = ""
    hang_s: float = 0.01
    elapsed_us: int = 100
    batches: list[tuple[CudaCall, ...]] = field(default_factory=list)
    gpu_uuids: tuple[str, ...] = ()
    kill: Callable[[int], None] | None = None
    stuck_gpus: list[tuple[str, ...]] = field(default_factory=list)
    frozen_calls: list[CudaCall] = field(default_factory=list)

    async def run(self, calls: Sequence[CudaCall], deadline_s: float, gpu_uuids: Sequence[str] = ()) -> CudaReply:
        if not calls:
            return CudaReply()
        self.batches.append(tuple(calls))
        if self.not_begun:
            return CudaReply((), CudaFault.NOT_BEGUN, self.not_begun, "no worker is free (fake)")
        answers: list[CudaAnswer] = []
        for call in calls:
            answer = await self._perform(call, min(deadline_s, self.hang_s))
            if isinstance(answer, CudaFault):
                if answer is CudaFault.STUCK:
                    self.stuck_gpus.append(tuple(gpu_uuids))
                return CudaReply((), answer, "DRIVER_OPERATION_LOST", "the driver did not answer (fake)")
            answers.append(answer)
            if answer.code:
                break
        return CudaReply(tuple(answers))

    @property
    def operations(self) -> list[tuple[CudaOp, int]]:
        """What was asked, but for STATE, in order."""
        return [(call.op, call.pid) for batch in self.batches for call in batch if call.op is not CudaOp.STATE]

    def gpu_processes(self) -> list[GpuProcess]:
        """For `FakeGpus.processes_now`: a checkpointed process holds no GPU memory."""
        return [
            GpuProcess(process.gpu_uuid, pid, process.vram_bytes)
            for pid, process in self.processes.items()
            if self.keeps_vram or process.state is not CudaState.CHECKPOINTED
        ]

    async def _perform(self, call: CudaCall, patience_s: float) -> CudaAnswer | CudaFault:
        process = self.processes.get(call.pid)
        if process is None:
            code = CudaResult.SUCCESS if call.op is CudaOp.STATE else CudaResult.NOT_INITIALIZED
            return CudaAnswer(call, code, CudaState.NONE, self.elapsed_us)
        if not process.thawed.is_set():
            self.frozen_calls.append(call)
            try:
                await asyncio.wait_for(process.thawed.wait(), patience_s)
            except TimeoutError:
                if call.op is not CudaOp.STATE:
                    process.stale_operations.append(call)
                return CudaFault.LOST
        refusal = self._refusal(call, process)
        fault = None if refusal else self._fault_for(call)
        if fault is not None:
            return self._go_wrong(fault, call, process)
        if refusal:
            return CudaAnswer(call, refusal, process.state, self.elapsed_us)
        if call.op is CudaOp.STATE:
            return CudaAnswer(call, 0, process.state, self.elapsed_us)
        process.perform(call)
        return CudaAnswer(call, 0, None, self.elapsed_us)

    def _refusal(self, call: CudaCall, process: FakeCudaProcess) -> int:
        if call.op is CudaOp.STATE:
            return 0
        if process.state is not _RULES[call.op][0]:
            return CudaResult.ILLEGAL_STATE
        incomplete = call.gpu_map and self.gpu_uuids and {old for old, _ in call.gpu_map} != set(self.gpu_uuids)
        return CudaResult.INVALID_VALUE if incomplete else 0

    def _go_wrong(self, fault: Fault, call: CudaCall, process: FakeCudaProcess) -> CudaAnswer | CudaFault:
        if fault.executes and call.op is not CudaOp.STATE:
            process.perform(call)
        if fault.leaves is not None:
            process.state = fault.leaves
        if fault.dies:
            if self.kill is not None:
                self.kill(call.pid)
            del self.processes[call.pid]
            return CudaAnswer(call, CudaResult.OPERATING_SYSTEM, CudaState.NONE, self.elapsed_us)
        if fault.later:
            process.stale_operations.append(call)
        if fault.hang or fault.stuck or fault.later:
            return CudaFault.STUCK if fault.stuck else CudaFault.LOST
        if call.op is CudaOp.STATE:
            return CudaAnswer(call, fault.code, CudaState.UNKNOWN if fault.code else process.state, self.elapsed_us)
        return CudaAnswer(call, fault.code, process.state if fault.code else None, self.elapsed_us)

    def _fault_for(self, call: CudaCall) -> Fault | None:
        for fault in self.faults:
            if fault.op is call.op and fault.pid in (0, call.pid):
                self.faults.remove(fault)
                return fault
        return None
