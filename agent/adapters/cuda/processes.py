"""Which processes of an instance use CUDA, each held so that its pid can't come to mean another process.

There is no list of CUDA processes to read: every process of the instance is asked for its state, one without CUDA
answers NONE, and the listing is repeated until it stays the same, since it races with forks (facts 4).
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
"""Listings of one discovery before it is said that the processes do not stop changing."""

MAX_STATES_PER_BATCH = 64
"""Processes asked for their state in one message: an instance may have hundreds, most of them without CUDA."""

CHANGING = "PROCESSES_CHANGE"
UNREADABLE = "PROCESSES_UNREADABLE"

Pids = Callable[[Handle], Awaitable[Sequence[int]]]
"""Host pids of an instance's processes (thread group leaders): `Runtime.pids`."""


@dataclass(frozen=True, slots=True)
class CudaProcess:
    """A process with CUDA. While `pidfd` is not readable it lives, and `pid` is its number and nobody else's."""

    pid: int
    start_time: int
    pidfd: int
    state: CudaState


@dataclass(frozen=True, slots=True)
class CudaProcessList:
    """What a discovery gave: the CUDA processes and all pids of the instance, or why it failed (`failure`: the
    driver's reply, or None with `reason`)."""

    processes: tuple[CudaProcess, ...] = ()
    pids: frozenset[int] = frozenset()
    failure: CudaReply | None = None
    reason: str = ""
    message: str = ""

    @property
    def ok(self) -> bool:
        return not self.reason

    @property
    def inconclusive(self) -> bool:
        """Nobody could ask, or they did not stop changing: it says nothing about the processes."""
        answered = self.failure is None or self.failure.fault is not CudaFault.NOT_BEGUN
        return self.reason in (CHANGING, UNREADABLE) or not answered


def open_process(pid: int, boot_id: str) -> CudaProcess | None:
    """Hold a process of ours; None if it is gone, or if `pid` is a mere thread (the driver would take it, and kill
    the target: NVIDIA/cuda-checkpoint issue 41). Raises OSError where it can't be looked at."""
    identity = process_table.identify(pid, boot_id)
    if identity is None or process_table.thread_group(pid) != pid:
        return None
    pidfd = process_table.open_pidfd(identity, boot_id)
    if pidfd is None:
        return None
    return CudaProcess(pid, identity.start_time, pidfd, CudaState.UNKNOWN)


def living(processes: Iterable[CudaProcess]) -> tuple[CudaProcess, ...]:
    """Those that have not ended."""
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
    """One STATE for each process that lives. To read is harmless, so a worker that was lost by it is no reason to give
    up. Without an error there is an answer for each; who ended meanwhile is not asked, its pid may be another's."""
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
    """The states, once nobody is CHECKPOINTING or RESTORING any more, and the driver's time in ns. With UNKNOWN among
    them if they can't be read, or `timeout_s` have passed."""
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
    """Finds the CUDA processes of an instance whose cgroup is thawed. `state_deadline_s` bounds each question."""

    pids: Pids
    checkpointer: Checkpointer
    boot_id: str
    state_deadline_s: float

    async def find(self, handle: Handle, known: Collection[CudaProcess] = ()) -> CudaProcessList:
        """List until two listings agree. `known` are not asked again (they may be locked), and stay the caller's;
        whoever gets the others in `CudaProcessList.processes` releases them."""
        opened: dict[int, CudaProcess] = {}
        try:
            return await self._find(handle, known, opened)
        except BaseException:  # cancelled: nobody else will close them
            release(opened.values())
            raise

    async def _find(
        self, handle: Handle, known: Collection[CudaProcess], opened: dict[int, CudaProcess]
    ) -> CudaProcessList:
        keep = {process.pid for process in known}
        listed: frozenset[int] = frozenset(keep)  # with nobody but the known, the first listing agrees already
        for _ in range(MAX_LISTINGS):
            try:
                before, listed = listed, frozenset(await self.pids(handle))
                if before == listed and listed:
                    return CudaProcessList((*living(known), *opened.values()), listed)
                answer = await self._query(listed - keep, opened)
            except OSError as error:
                answer = CudaProcessList(
                    reason=UNREADABLE, message=f"the instance's processes can't be looked at: {error}"
                )
            match answer:
                case CudaProcessList():
                    release(opened.values())
                    return answer
                case _QueryOutcome.INCOMPLETE:
                    listed = frozenset()  # somebody ended while asked, and took the others' answers along
                case _QueryOutcome.ALL:
                    if not listed:
                        return CudaProcessList()
        release(opened.values())
        return CudaProcessList(
            pids=listed,
            reason=CHANGING,
            message="the instance's processes did not stop changing while they were listed",
        )

    async def _query(self, pids: Collection[int], opened: dict[int, CudaProcess]) -> CudaProcessList | _QueryOutcome:
        """Replace `opened` by those of `pids` that have CUDA; a Found says why that was not possible."""
        release(opened.values())
        opened.clear()
        candidates = self._open(pids)
        try:
            alive = living(candidates)  # a zombie is listed too, and answers nothing
            reply = await read_states(self.checkpointer, alive, self.state_deadline_s)
            if reply.fault is not CudaFault.NONE:
                return CudaProcessList(failure=reply, reason=reply.reason, message=reply.message)
            if not reply.ok and living(alive) == alive:
                return CudaProcessList(
                    failure=reply, reason="STATE_UNREADABLE", message="the driver can't say the state"
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
