"""Bringing processes that are left half way to one state, step by step from what the driver says they are in.

This is rollback and recovery; the way forward (`freezer.py`) does not pass here. After a worker was lost the hung
operation may still run, so then nothing counts as reached until it was read twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from agent.adapters.cuda.processes import BUSY, CudaProcess, living, read_states
from agent.adapters.cuda.result_codes import FATAL, CudaResult, explain
from agent.ports import Checkpointer, CudaCall, CudaFault, CudaOp, CudaReply, CudaState

FIRST_PAUSE_S = 0.002
LAST_PAUSE_S = 0.5

_STEPS: Mapping[CudaState, Sequence[tuple[CudaOp, frozenset[CudaState]]]] = {
    # All of one operation before any of the next: restore all, then unlock all (facts 4).
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
class RollbackLimits:
    """How often it is tried, all of it within the caller's deadline: `acts` times something is done about the states,
    `failed_restores` of them may end in a restore that fails (facts 4: once more and no further), and `unreadable`
    readings may give nothing."""

    acts: int = 3
    failed_restores: int = 2
    unreadable: int = 6
    state_deadline_s: float = 5.0
    lock_timeout_s: float = 5.0


@dataclass(frozen=True, slots=True)
class RollbackGoal:
    """Where to bring the processes: RUNNING or CHECKPOINTED, those still to be restored by `gpu_map`. `suspicious`: a
    worker was lost before. `ask_first` makes sure that they can answer (their cgroup is thawed) before each round."""

    state: CudaState
    gpu_map: tuple[tuple[str, str], ...] = ()
    suspicious: bool = False
    ask_first: Callable[[], Awaitable[None]] | None = None
    limits: RollbackLimits = RollbackLimits()


@dataclass(slots=True)
class RollbackResult:
    """Where the processes are. `states` by pid as last read; `reason` says why `reached` is False."""

    reached: bool = False
    states: dict[int, CudaState] = field(default_factory=dict)
    driver_ns: int = 0
    reason: str = ""
    message: str = ""

    def fail(self, reason: str, message: str) -> RollbackResult:
        self.reached, self.reason, self.message = False, reason, message
        return self


async def rollback(
    checkpointer: Checkpointer, processes: Sequence[CudaProcess], aim: RollbackGoal, deadline_s: float
) -> RollbackResult:
    """Bring all living `processes` to the aim.

    Not reached: CUDA_STATE_FAILED, CUDA_STATE_UNREADABLE, CUDA_UNSETTLED, DRIVER_STUCK; only a kill is safe then.
    """
    settled = RollbackResult()
    try:
        async with asyncio.timeout(deadline_s):
            return await _rounds(checkpointer, processes, aim, deadline_s, settled)
    except TimeoutError:
        return settled.fail("CUDA_UNSETTLED", f"not all processes were {aim.state.value} within {deadline_s:g} s")


async def _rounds(
    checkpointer: Checkpointer,
    processes: Sequence[CudaProcess],
    aim: RollbackGoal,
    deadline_s: float,
    settled: RollbackResult,
) -> RollbackResult:
    reading, pause, tried = _Reading(aim.suspicious), _Pause(), _Tried(aim.limits)
    while not tried.enough:
        if aim.ask_first is not None:
            await aim.ask_first()
        alive = living(processes)
        reply = await read_states(checkpointer, alive, aim.limits.state_deadline_s, attempts=1)
        settled.driver_ns += reply.driver_ns
        settled.states = {answer.call.pid: answer.state or CudaState.UNKNOWN for answer in reply.answers}
        match reading.judge(reply, settled, aim.state, everybody_lives=living(alive) == alive):
            case _Verdict.REACHED:
                settled.reached = True
                return settled
            case _Verdict.HOPELESS:
                return settled
            case _Verdict.AGAIN:
                continue
            case _Verdict.BUSY:
                await pause.wait()  # bounded by the deadline, not by what was tried
                continue
            case _Verdict.UNREADABLE:
                tried.read_nothing(reply)
                await pause.wait()
                continue
            case _Verdict.ACT:
                if tried.acted_enough:
                    break
        reply = await checkpointer.run(_steps(alive, settled.states, aim), deadline_s)
        settled.driver_ns += reply.driver_ns
        tried.acted(reply)
        if reply.fault is CudaFault.STUCK:
            return settled.fail("DRIVER_STUCK", reply.message)
        if reply.answers and reply.answers[-1].code in FATAL and living(alive) == alive:
            return settled.fail(*explain(reply.answers[-1]))
        reading.suspicious = reading.suspicious or reply.fault is CudaFault.LOST
    return settled.fail("CUDA_UNSETTLED", f"{tried} not all processes are {aim.state.value}: {tried.last_failure}")


@dataclass(slots=True)
class _Tried:
    limits: RollbackLimits
    acts: int = 0
    failed_restores: int = 0
    unreadable: int = 0
    last_failure: str = ""

    def read_nothing(self, reply: CudaReply) -> None:
        self.unreadable += 1
        self.last_failure = _failure(reply)

    def acted(self, reply: CudaReply) -> None:
        self.acts += 1
        self.last_failure = _failure(reply)
        last = reply.answers[-1] if reply.answers else None
        # ILLEGAL_STATE: a hung one has done it meanwhile, which the next reading shows.
        if last and last.call.op is CudaOp.RESTORE and last.code not in (0, CudaResult.ILLEGAL_STATE):
            self.failed_restores += 1

    @property
    def enough(self) -> bool:
        return self.unreadable >= self.limits.unreadable

    @property
    def acted_enough(self) -> bool:
        return self.acts >= self.limits.acts or self.failed_restores >= self.limits.failed_restores

    def __str__(self) -> str:
        return f"after {self.acts} attempts and {self.unreadable} readings without an answer"


class _Verdict(Enum):
    REACHED = auto()
    ACT = auto()
    AGAIN = auto()
    BUSY = auto()
    UNREADABLE = auto()
    HOPELESS = auto()


@dataclass(slots=True)
class _Reading:
    """What a reading of the states means. `agreed` counts the readings in a row that showed the goal."""

    suspicious: bool
    agreed: int = 0

    def judge(self, reply: CudaReply, settled: RollbackResult, goal: CudaState, everybody_lives: bool) -> _Verdict:
        if reply.fault is CudaFault.STUCK:
            settled.fail("DRIVER_STUCK", reply.message)
            return _Verdict.HOPELESS
        states = set(settled.states.values())
        if reply.ok and states <= {goal}:
            self.agreed += 1
            return _Verdict.REACHED if self.agreed > self.suspicious else _Verdict.AGAIN
        self.agreed = 0
        if not reply.ok or not everybody_lives:
            return _Verdict.UNREADABLE
        if states & {CudaState.FAILED, CudaState.UNKNOWN, CudaState.NONE}:
            names = ", ".join(sorted(state.value for state in states))
            settled.fail("CUDA_STATE_FAILED", f"the driver says of the processes: {names}")
            return _Verdict.HOPELESS
        return _Verdict.BUSY if states & BUSY else _Verdict.ACT


@dataclass(slots=True)
class _Pause:
    """Growing pauses between readings of a state that takes its time."""

    next_s: float = FIRST_PAUSE_S

    async def wait(self) -> None:
        await asyncio.sleep(self.next_s)
        self.next_s = min(self.next_s * 2, LAST_PAUSE_S)


def _steps(processes: Sequence[CudaProcess], states: Mapping[int, CudaState], aim: RollbackGoal) -> list[CudaCall]:
    timeout_ms = round(aim.limits.lock_timeout_s * 1000)
    return [
        CudaCall(
            op,
            process.pid,
            timeout_ms if op is CudaOp.LOCK else 0,
            aim.gpu_map if op is CudaOp.RESTORE else (),
        )
        for op, needs in _STEPS[aim.state]
        for process in processes
        if states[process.pid] in needs
    ]


def _failure(reply: CudaReply) -> str:
    if reply.ok:
        return ""
    return reply.message or explain(reply.answers[-1])[1]
