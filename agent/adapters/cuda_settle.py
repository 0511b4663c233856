"""Bringing processes that are left half way to one state, step by step from what the driver says they are in.

This is rollback and recovery; the way forward (`freezer.py`) does not pass here. After a worker was lost the hung
operation may still run, so then nothing counts as reached until it was read twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from agent.adapters.cuda_api import FATAL, explain
from agent.adapters.cuda_processes import CudaProcess, living, read_states
from agent.ports import Checkpointer, CudaCall, CudaFault, CudaOp, CudaReply, CudaState

BUSY = frozenset({CudaState.CHECKPOINTING, CudaState.RESTORING})
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
class SettleLimits:
    """`rounds` of reading and acting, all of it within the caller's deadline."""

    rounds: int = 6
    state_deadline_s: float = 5.0
    lock_timeout_s: float = 5.0


@dataclass(slots=True)
class Settled:
    """Where the processes are. `states` by pid as last read; `reason` says why `reached` is False."""

    reached: bool = False
    states: dict[int, CudaState] = field(default_factory=dict)
    driver_ns: int = 0
    reason: str = ""
    message: str = ""

    def fail(self, reason: str, message: str) -> Settled:
        self.reached, self.reason, self.message = False, reason, message
        return self


async def settle(
    checkpointer: Checkpointer,
    processes: Sequence[CudaProcess],
    goal: CudaState,
    deadline_s: float,
    *,
    suspicious: bool = False,
    limits: SettleLimits | None = None,
) -> Settled:
    """Bring all living `processes` to `goal` (RUNNING or CHECKPOINTED). `suspicious`: a worker was lost before.

    Not reached: CUDA_STATE_FAILED, CUDA_STATE_UNREADABLE, CUDA_UNSETTLED, DRIVER_STUCK; only a kill is safe then.
    """
    limits = limits or SettleLimits()
    settled = Settled()
    try:
        async with asyncio.timeout(deadline_s):
            return await _rounds(checkpointer, processes, goal, deadline_s, suspicious, limits, settled)
    except TimeoutError:
        return settled.fail("CUDA_UNSETTLED", f"not all processes were {goal.value} within {deadline_s:g} s")


async def _rounds(
    checkpointer: Checkpointer,
    processes: Sequence[CudaProcess],
    goal: CudaState,
    deadline_s: float,
    suspicious: bool,
    limits: SettleLimits,
    settled: Settled,
) -> Settled:
    reading = _Reading(suspicious)
    pause = _Pause()
    attempts = 0
    last_failure = ""
    while attempts < limits.rounds:
        alive = living(processes)
        reply = await read_states(checkpointer, alive, limits.state_deadline_s, attempts=1)
        settled.driver_ns += reply.driver_ns
        settled.states = {answer.call.pid: answer.state or CudaState.UNKNOWN for answer in reply.answers}
        match reading.judge(reply, settled, goal, everybody_lives=living(alive) == alive):
            case _Verdict.REACHED:
                settled.reached = True
                return settled
            case _Verdict.HOPELESS:
                return settled
            case _Verdict.AGAIN:
                continue
            case _Verdict.BUSY:
                await pause.wait()  # bounded by the deadline, not by the attempts
                continue
            case _Verdict.UNREADABLE:
                attempts, last_failure = attempts + 1, _failure(reply)
                await pause.wait()
                continue
            case _Verdict.ACT:
                pass
        attempts += 1
        reply = await checkpointer.run(_steps(alive, settled.states, goal, limits), deadline_s)
        settled.driver_ns += reply.driver_ns
        last_failure = _failure(reply)
        if reply.fault is CudaFault.STUCK:
            return settled.fail("DRIVER_STUCK", reply.message)
        if reply.answers and reply.answers[-1].code in FATAL and living(alive) == alive:
            return settled.fail(*explain(reply.answers[-1]))
        reading.suspicious = reading.suspicious or reply.fault is CudaFault.LOST
    return settled.fail(
        "CUDA_UNSETTLED", f"after {attempts} attempts not all processes are {goal.value}: {last_failure}"
    )


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

    def judge(self, reply: CudaReply, settled: Settled, goal: CudaState, everybody_lives: bool) -> _Verdict:
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


def _steps(
    processes: Sequence[CudaProcess], states: Mapping[int, CudaState], goal: CudaState, limits: SettleLimits
) -> list[CudaCall]:
    timeout_ms = round(limits.lock_timeout_s * 1000)
    return [
        CudaCall(op, process.pid, timeout_ms if op is CudaOp.LOCK else 0)
        for op, needs in _STEPS[goal]
        for process in processes
        if states[process.pid] in needs
    ]


def _failure(reply: CudaReply) -> str:
    if reply.ok:
        return ""
    return reply.message or explain(reply.answers[-1])[1]
