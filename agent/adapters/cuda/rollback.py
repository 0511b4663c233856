"""Rolls back: brings processes that a failed operation left in different states to one state, step by step.

A freeze or wake that succeeds does not come here. A hung call of a lost worker may still run later, so after a loss a
state counts as reached only when it was read twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from agent.adapters.cuda.processes import BUSY, CudaProcess, living, read_states
from agent.adapters.cuda.result_codes import CudaResult, explain, is_fatal
from agent.ports import Checkpointer, CudaCall, CudaFault, CudaOp, CudaReply, CudaState

FIRST_PAUSE_S = 0.002
LAST_PAUSE_S = 0.5

_STEPS: Mapping[CudaState, Sequence[tuple[CudaOp, frozenset[CudaState]]]] = {
    # Restore all, then unlock all (agent/docs/facts/gpu-checkpoint.md, section 4).
    CudaState.RUNNING: (
        (CudaOp.RESTORE, frozenset({CudaState.CHECKPOINTED})),
        (CudaOp.UNLOCK, frozenset({CudaState.CHECKPOINTED, CudaState.LOCKED})),
    ),
    CudaState.CHECKPOINTED: (
        (CudaOp.LOCK, frozenset({CudaState.RUNNING})),
        (CudaOp.CHECKPOINT, frozenset({CudaState.RUNNING, CudaState.LOCKED})),
    ),
}


@dataclass(frozen=True, slots=True)
class RollbackGoal:
    """The state to reach, RUNNING or CHECKPOINTED, and the bounds of the attempt."""

    state: CudaState
    gpu_map: tuple[tuple[str, str], ...] = ()  # (old uuid, new uuid) for the processes still to be restored
    late_call_possible: bool = False  # a worker was lost before, so its call may still take effect
    before_round: Callable[[], Awaitable[None]] | None = None  # makes sure that the processes' cgroup is thawed
    max_attempts: int = 3
    max_failed_restores: int = 2  # retry once (agent/docs/facts/gpu-checkpoint.md, section 4)
    max_unreadable: int = 6  # readings without a result
    state_deadline_s: float = 5.0
    lock_timeout_s: float = 5.0


@dataclass(slots=True)
class RollbackResult:
    """Where the processes are: `states` by pid as last read; `reason` says why `reached` is False."""

    reached: bool = False
    states: dict[int, CudaState] = field(default_factory=dict)
    driver_ns: int = 0
    reason: str = ""
    message: str = ""

    def fail(self, reason: str, message: str) -> RollbackResult:
        self.reached, self.reason, self.message = False, reason, message
        return self


async def rollback(
    checkpointer: Checkpointer, processes: Sequence[CudaProcess], goal: RollbackGoal, deadline_s: float
) -> RollbackResult:
    """Bring all living `processes` to the goal. If that fails, only a kill is safe; the reason is CUDA_STATE_FAILED,
    CUDA_UNSETTLED, DRIVER_STUCK, or that of a fatal result."""
    result = RollbackResult()
    try:
        async with asyncio.timeout(deadline_s):
            return await _rounds(checkpointer, processes, goal, deadline_s, result)
    except TimeoutError:
        return result.fail("CUDA_UNSETTLED", f"not all processes were {goal.state.value} within {deadline_s:g} s")


async def _rounds(
    checkpointer: Checkpointer,
    processes: Sequence[CudaProcess],
    goal: RollbackGoal,
    deadline_s: float,
    result: RollbackResult,
) -> RollbackResult:
    check, pause, progress = _StateCheck(goal.late_call_possible), _Pause(), _Attempts(goal)
    while not progress.unreadable_too_often:
        if goal.before_round is not None:
            await goal.before_round()
        alive = living(processes)
        reply = await read_states(checkpointer, alive, goal.state_deadline_s, attempts=1)
        result.driver_ns += reply.driver_ns
        result.states = {answer.call.pid: answer.state or CudaState.UNKNOWN for answer in reply.answers}
        match check.judge(reply, result, goal.state, all_alive=living(alive) == alive):
            case _Verdict.REACHED:
                result.reached = True
                return result
            case _Verdict.UNRECOVERABLE:
                return result
            case _Verdict.CONFIRM:
                continue
            case _Verdict.BUSY:
                await pause.wait()  # bounded by the deadline, not by the attempts
                continue
            case _Verdict.UNREADABLE:
                progress.record_unreadable(reply)
                await pause.wait()
                continue
            case _Verdict.ACT:
                if progress.exhausted:
                    break
        reply = await checkpointer.run(_steps(alive, result.states, goal), deadline_s)
        result.driver_ns += reply.driver_ns
        progress.record(reply)
        if reply.fault is CudaFault.STUCK:
            return result.fail("DRIVER_STUCK", reply.message)
        if reply.answers and is_fatal(reply.answers[-1]) and living(alive) == alive:
            return result.fail(*explain(reply.answers[-1]))
        check.late_call_possible = check.late_call_possible or reply.fault is CudaFault.LOST
    return result.fail(
        "CUDA_UNSETTLED", f"{progress} not all processes are {goal.state.value}: {progress.last_failure}"
    )


@dataclass(slots=True)
class _Attempts:
    goal: RollbackGoal
    attempts: int = 0
    failed_restores: int = 0
    unreadable: int = 0
    last_failure: str = ""

    def record_unreadable(self, reply: CudaReply) -> None:
        self.unreadable += 1
        self.last_failure = _failure(reply)

    def record(self, reply: CudaReply) -> None:
        self.attempts += 1
        self.last_failure = _failure(reply)
        last = reply.answers[-1] if reply.answers else None
        # ILLEGAL_STATE: a hung call has restored it meanwhile; the next reading shows that.
        if last and last.call.op is CudaOp.RESTORE and last.code not in (0, CudaResult.ILLEGAL_STATE):
            self.failed_restores += 1

    @property
    def unreadable_too_often(self) -> bool:
        return self.unreadable >= self.goal.max_unreadable

    @property
    def exhausted(self) -> bool:
        return self.attempts >= self.goal.max_attempts or self.failed_restores >= self.goal.max_failed_restores

    def __str__(self) -> str:
        return f"after {self.attempts} attempts and {self.unreadable} readings without an answer"


class _Verdict(Enum):
    REACHED = auto()
    ACT = auto()
    CONFIRM = auto()
    BUSY = auto()
    UNREADABLE = auto()
    UNRECOVERABLE = auto()


@dataclass(slots=True)
class _StateCheck:
    """Decides what a reading of the states means. `agreed` counts consecutive readings that showed the goal."""

    late_call_possible: bool
    agreed: int = 0

    def judge(self, reply: CudaReply, result: RollbackResult, goal: CudaState, all_alive: bool) -> _Verdict:
        if reply.fault is CudaFault.STUCK:
            result.fail("DRIVER_STUCK", reply.message)
            return _Verdict.UNRECOVERABLE
        states = set(result.states.values())
        if reply.ok and states <= {goal}:
            self.agreed += 1
            return _Verdict.REACHED if self.agreed > self.late_call_possible else _Verdict.CONFIRM
        self.agreed = 0
        if not reply.ok or not all_alive:
            return _Verdict.UNREADABLE
        if states & {CudaState.FAILED, CudaState.UNKNOWN, CudaState.NONE}:
            names = ", ".join(sorted(state.value for state in states))
            result.fail("CUDA_STATE_FAILED", f"the driver reports the states {names}")
            return _Verdict.UNRECOVERABLE
        return _Verdict.BUSY if states & BUSY else _Verdict.ACT


@dataclass(slots=True)
class _Pause:
    """Growing pauses between readings of a state that changes by itself."""

    next_s: float = FIRST_PAUSE_S

    async def wait(self) -> None:
        await asyncio.sleep(self.next_s)
        self.next_s = min(self.next_s * 2, LAST_PAUSE_S)


def _steps(processes: Sequence[CudaProcess], states: Mapping[int, CudaState], goal: RollbackGoal) -> list[CudaCall]:
    timeout_ms = round(goal.lock_timeout_s * 1000)
    return [
        CudaCall(
            op,
            process.pid,
            timeout_ms if op is CudaOp.LOCK else 0,
            goal.gpu_map if op is CudaOp.RESTORE else (),
        )
        for op, needs in _STEPS[goal.state]
        for process in processes
        if states[process.pid] in needs
    ]


def _failure(reply: CudaReply) -> str:
    if reply.ok:
        return ""
    return reply.message or explain(reply.answers[-1])[1]
