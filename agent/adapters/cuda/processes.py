"""Finds the processes of an instance that use CUDA and holds a pidfd of each, so that a reused pid is noticed.

The driver has no list of CUDA processes: every process of the instance is asked for its state, one without CUDA answers
NONE. Listings race with forks, so they are repeated until two agree (agent/docs/facts/gpu-checkpoint.md, section 4).
"""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum, auto

from agent.adapters.kernel import process_table
from agent.core.types import Handle
from agent.ports import Checkpointer, CudaAnswer, CudaCall, CudaFault, CudaOp, CudaReply, CudaState

BUSY = frozenset({CudaState.CHECKPOINTING, CudaState.RESTORING})
"""States that change by themselves."""

MAX_LISTINGS = 5
"""Listings of one discovery before it fails with PROCESSES_CHANGE."""

MAX_STATES_PER_BATCH = 64
"""Processes per batch of STATE calls: an instance may have hundreds, most of them without CUDA."""

CHANGING = "PROCESSES_CHANGE"
UNREADABLE = "PROCESSES_UNREADABLE"

Pids = Callable[[Handle], Awaitable[Sequence[int]]]
"""Host pids of an instance's processes (thread group leaders): `Runtime.pids`."""


@dataclass(frozen=True, slots=True)
class CudaProcess:
    """A process that uses CUDA. While `pidfd` is not readable the process lives, and `pid` names no other one."""

    pid: int
    start_time: int
    pidfd: int
    state: CudaState


@dataclass(frozen=True, slots=True)
class CudaProcessList:
    """Result of a discovery: the CUDA processes, or why it failed."""

    processes: tuple[CudaProcess, ...] = ()
    pids: frozenset[int] = frozenset()  # all of the instance
    failure: CudaReply | None = None  # the driver's reply, if that is the reason
    reason: str = ""
    message: str = ""

    @property
    def ok(self) -> bool:
        return not self.reason

    @property
    def inconclusive(self) -> bool:
        """The failure says nothing about the processes: the driver could not be called, or they kept changing."""
        answered = self.failure is None or self.failure.fault is not CudaFault.NOT_BEGUN
        return self.reason in (CHANGING, UNREADABLE) or not answered


def open_process(pid: int, boot_id: str) -> CudaProcess | None:
    """Open a pidfd of a process of the instance. Returns None if it is gone, or if `pid` is a mere thread: the driver
    would accept it and kill the target (NVIDIA/cuda-checkpoint issue 41). Raises OSError if it can't be read."""
    identity = process_table.identify(pid, boot_id)
    if identity is None or process_table.thread_group(pid) != pid:
        return None
    pidfd = process_table.open_pidfd(identity, boot_id)
    if pidfd is None:
        return None
    return CudaProcess(pid, identity.start_time, pidfd, CudaState.UNKNOWN)


def living(processes: Iterable[CudaProcess]) -> tuple[CudaProcess, ...]:
    """The processes that have not ended."""
    poll = select.poll()
    every = tuple(processes)
    for process in every:
        poll.register(process.pidfd, select.POLLIN)
    ended = {descriptor for descriptor, _ in poll.poll(0)}
    return tuple(process for process in every if process.pidfd not in ended)


def release(processes: Iterable[CudaProcess]) -> None:
    """Close the pidfds."""
    for process in processes:
        os.close(process.pidfd)


async def read_states(
    checkpointer: Checkpointer, processes: Sequence[CudaProcess], deadline_s: float, attempts: int = 2
) -> CudaReply:
    """Make one STATE call for each living process. Reading is harmless, so a batch whose worker was lost is repeated,
    up to `attempts` in all. A reply without an error holds one answer per process that lived when it was sent."""
    answers: list[CudaAnswer] = []
    for start in range(0, len(processes), MAX_STATES_PER_BATCH):
        batch = processes[start : start + MAX_STATES_PER_BATCH]
        reply = await _read_batch(checkpointer, batch, deadline_s)
        while reply.fault is CudaFault.LOST and attempts > 1:
            attempts -= 1
            reply = await _read_batch(checkpointer, batch, deadline_s)
        answers.extend(reply.answers)
        if not reply.ok:
            return replace(reply, answers=tuple(answers))
    return CudaReply(tuple(answers))


async def _read_batch(checkpointer: Checkpointer, processes: Sequence[CudaProcess], deadline_s: float) -> CudaReply:
    return await checkpointer.run([CudaCall(CudaOp.STATE, process.pid) for process in living(processes)], deadline_s)


async def stable_states(
    checkpointer: Checkpointer, processes: Sequence[CudaProcess], deadline_s: float, timeout_s: float
) -> tuple[set[CudaState], int]:
    """Read the states until no process is CHECKPOINTING or RESTORING. Returns them and the driver's time in ns; the
    states are {UNKNOWN} if they can't be read or still change after `timeout_s`."""
    driver_ns = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            pause_s = 0.002
            while True:
                reply = await read_states(checkpointer, processes, deadline_s)
                driver_ns += reply.driver_ns
                if not reply.ok:
                    break
                states = {answer.state or CudaState.UNKNOWN for answer in reply.answers}
                if not states & BUSY:
                    return states, driver_ns
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, 0.1)
    return {CudaState.UNKNOWN}, driver_ns


@dataclass(frozen=True, slots=True)
class CudaProcessFinder:
    """Finds the CUDA processes of an instance whose cgroup is thawed. `state_deadline_s` bounds each STATE batch."""

    pids: Pids
    checkpointer: Checkpointer
    boot_id: str
    state_deadline_s: float

    async def find(self, handle: Handle, known: Collection[CudaProcess] = ()) -> CudaProcessList:
        """List until two listings agree. `known` processes are not asked again (they may be locked) and stay the
        caller's; the caller also releases the others in `CudaProcessList.processes`."""
        opened: dict[int, CudaProcess] = {}
        try:
            return await self._find(handle, known, opened)
        except BaseException:  # cancelled too: no one else closes them
            release(opened.values())
            raise

    async def _find(
        self, handle: Handle, known: Collection[CudaProcess], opened: dict[int, CudaProcess]
    ) -> CudaProcessList:
        keep = {process.pid for process in known}
        listed: frozenset[int] = frozenset(keep)  # if there are only known processes, the first listing already agrees
        for _ in range(MAX_LISTINGS):
            try:
                before, listed = listed, frozenset(await self.pids(handle))
                if before == listed and listed:
                    return CudaProcessList((*living(known), *opened.values()), listed)
                answer = await self._query(listed - keep, opened)
            except OSError as error:
                answer = CudaProcessList(reason=UNREADABLE, message=f"the instance's processes can't be read: {error}")
            match answer:
                case CudaProcessList():
                    release(opened.values())
                    return answer
                case _QueryOutcome.INCOMPLETE:
                    listed = frozenset()  # one ended during its call, which failed the others' too
                case _QueryOutcome.ALL:
                    if not listed:
                        return CudaProcessList()
        release(opened.values())
        return CudaProcessList(
            pids=listed,
            reason=CHANGING,
            message="the instance's processes kept changing while they were listed",
        )

    async def _query(self, pids: Collection[int], opened: dict[int, CudaProcess]) -> CudaProcessList | _QueryOutcome:
        """Replace `opened` by those of `pids` that use CUDA; a CudaProcessList says why that failed."""
        release(opened.values())
        opened.clear()
        candidates = self._open(pids)
        try:
            alive = living(candidates)  # zombies are listed, but answer nothing
            reply = await read_states(self.checkpointer, alive, self.state_deadline_s)
            if reply.fault is not CudaFault.NONE:
                return CudaProcessList(failure=reply, reason=reply.reason, message=reply.message)
            if not reply.ok and living(alive) == alive:
                return CudaProcessList(
                    failure=reply, reason="STATE_UNREADABLE", message="the driver can't read the state"
                )
            if not reply.ok:
                return _QueryOutcome.INCOMPLETE
            states = {answer.call.pid: answer.state or CudaState.UNKNOWN for answer in reply.answers}
            for process in candidates:
                state = states.get(process.pid, CudaState.NONE)
                if state is not CudaState.NONE:
                    opened[process.pid] = replace(process, state=state)
            return _QueryOutcome.ALL
        finally:
            release(process for process in candidates if process.pid not in opened)

    def _open(self, pids: Collection[int]) -> list[CudaProcess]:
        opened: list[CudaProcess] = []
        try:
            for pid in sorted(pids):
                process = open_process(pid, self.boot_id)
                if process is not None:
                    opened.append(process)
        except OSError:
            release(opened)
            raise
        return opened


class _QueryOutcome(Enum):
    ALL = auto()
    INCOMPLETE = auto()
