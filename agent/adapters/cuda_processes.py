"""Which processes of an instance use CUDA, each held so that its pid can't come to mean another process.

There is no list of CUDA processes to read: every process of the instance is asked for its state, one without CUDA
answers NONE, and the listing is repeated until it stays the same, since it races with forks (facts 4).
"""

from __future__ import annotations

import os
import select
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from agent.adapters import process_table
from agent.core.types import Handle
from agent.ports import Checkpointer, CudaCall, CudaFault, CudaOp, CudaReply, CudaState

MAX_LISTINGS = 5
"""Listings of one discovery before it is said that the processes do not stop changing."""

CHANGING = "PROCESSES_CHANGE"

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
class Found:
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
    def not_begun(self) -> bool:
        """Nobody could ask, or they did not stop changing: it says nothing about the processes."""
        return self.reason == CHANGING or (self.failure is not None and self.failure.fault is CudaFault.NOT_BEGUN)


def open_process(pid: int, boot_id: str) -> CudaProcess | None:
    """Hold a process of ours; None if it is gone, or if `pid` is a mere thread (the driver would take it, and kill
    the target: NVIDIA/cuda-checkpoint issue 41)."""
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
    """One STATE for each process. To read is harmless, so a worker that was lost by it is no reason to give up."""
    calls = [CudaCall(CudaOp.STATE, process.pid) for process in processes]
    reply = await checkpointer.run(calls, deadline_s)
    while reply.fault is CudaFault.LOST and attempts > 1:
        attempts -= 1
        reply = await checkpointer.run(calls, deadline_s)
    return reply


@dataclass(frozen=True, slots=True)
class CudaProcessFinder:
    """Finds the CUDA processes of an instance whose cgroup is thawed. `state_deadline_s` bounds each question."""

    pids: Pids
    checkpointer: Checkpointer
    boot_id: str
    state_deadline_s: float

    async def find(self, handle: Handle, known: Collection[CudaProcess] = ()) -> Found:
        """List until two listings agree. `known` are not asked again (they may be locked), and stay the caller's;
        whoever gets the others in `Found.processes` releases them."""
        opened: dict[int, CudaProcess] = {}
        keep = {process.pid for process in known}
        listed: frozenset[int] = frozenset(keep)  # with nobody but the known, the first listing agrees already
        for _ in range(MAX_LISTINGS):
            before, listed = listed, frozenset(await self.pids(handle))
            if before == listed and listed:
                return Found((*living(known), *opened.values()), listed)
            failure = await self._ask(listed - keep, opened)
            if failure is not None:
                release(opened.values())
                return failure
            if not listed:
                return Found()
        release(opened.values())
        return Found(
            pids=listed,
            reason=CHANGING,
            message="the instance's processes did not stop changing while they were listed",
        )

    async def _ask(self, pids: Collection[int], opened: dict[int, CudaProcess]) -> Found | None:
        """Replace `opened` by those of `pids` that have CUDA; a Found says why that was not possible."""
        release(opened.values())
        opened.clear()
        held = [process for pid in sorted(pids) if (process := open_process(pid, self.boot_id)) is not None]
        reply = await read_states(self.checkpointer, held, self.state_deadline_s)
        if reply.fault is not CudaFault.NONE:
            release(held)
            return Found(failure=reply, reason=reply.reason, message=reply.message)
        states = {answer.call.pid: answer.state or CudaState.UNKNOWN for answer in reply.answers}
        if not reply.ok and living(held) == tuple(held):
            release(held)
            return Found(failure=reply, reason="STATE_UNREADABLE", message="the driver can't say the state")
        for process in held:
            state = states.get(process.pid, CudaState.NONE)
            if state is CudaState.NONE:
                os.close(process.pidfd)
            else:
                opened[process.pid] = CudaProcess(process.pid, process.start_time, process.pidfd, state)
        return None
