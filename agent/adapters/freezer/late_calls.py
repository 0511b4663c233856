"""Watches instances on which a driver call was lost: the call may still run, long after its caller was killed.

On the emulated driver a hung lock ran once the target was thawed, and left a program locked for ever while everything
took it for running. So the states of such an instance are read for a while, and what ran late is undone. A freshly
started agent watches every instance, because it does not know which calls its predecessor lost. No reading happens
during an operation of the freezer, or while the threads are stopped.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field

from agent.adapters.cuda.processes import release
from agent.adapters.freezer.tracked import FreezerRegistry, TrackedCudaProcesses
from agent.core.errors import HibernodeError
from agent.core.types import Handle
from agent.log import get_logger
from agent.ports import CudaReply, CudaState, FreezerState

FIRST_PAUSE_S = 0.05
LAST_PAUSE_S = 5.0

_LATE = frozenset({CudaState.LOCKED, CudaState.CHECKPOINTED})

_log = get_logger()


@dataclass(slots=True)
class _Watched:
    task: asyncio.Task[None]
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)


class LateCalls:
    """One watch for each running instance on which a call may run late."""

    def __init__(self, instances: FreezerRegistry) -> None:
        self._instances = instances
        self._watched: dict[str, _Watched] = {}

    async def suspend(self, handle: Handle) -> None:
        """Stop watching, because an operation begins. Returns once no reading or rollback is in progress; a caller that
        does not wait so long leaves the watch as it is."""
        watch = self._watched.get(handle.uid)
        if watch is not None:
            async with watch.reading:
                watch.task.cancel()
                self._end(handle, watch.task)

    def resume(self, handle: Handle) -> None:
        """The instance runs again: watch it if calls may run late."""
        until_s = self._instances.late_calls_until_s(handle)
        if until_s is not None and handle.uid not in self._watched:
            reading = asyncio.Lock()
            task = asyncio.create_task(self._watch(handle, reading, until_s), name=f"late calls of {handle.uid}")
            self._watched[handle.uid] = _Watched(task, reading)

    def forget(self, handle: Handle) -> None:
        """The instance ended."""
        watch = self._watched.pop(handle.uid, None)
        if watch is not None:
            watch.task.cancel()

    async def _watch(self, handle: Handle, reading: asyncio.Lock, until_s: float) -> None:
        """Read until `until_s`, even after a call has been undone: more than one may have been lost."""
        pause_s, loop = FIRST_PAUSE_S, asyncio.get_running_loop()
        while loop.time() < until_s and self._instances.cgroups.state(handle) is not FreezerState.GONE:
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, LAST_PAUSE_S)
            async with reading:
                await self._undo_late_call(handle)
        self._end(handle, asyncio.current_task())

    def _end(self, handle: Handle, task: asyncio.Task[None] | None) -> None:
        """Drop the watch that `task` is, but no later one of the same instance."""
        watch = self._watched.get(handle.uid)
        if watch is not None and watch.task is task:
            del self._watched[handle.uid]

    async def _undo_late_call(self, handle: Handle) -> None:
        """Unlock and restore what a late call has locked or checkpointed."""
        if self._instances.cgroups.state(handle) is not FreezerState.THAWED:
            return
        with suppress(HibernodeError, OSError):  # not readable now: retried later
            found = await self._instances.finder.find(handle)
            try:
                if not found.ok or not any(process.state in _LATE for process in found.processes):
                    return
                tracked = TrackedCudaProcesses(found.processes, vram_by_gpu=None)
                rolled_back = await self._instances.rollback(handle, tracked, CudaState.RUNNING, CudaReply())
                _log.warning(
                    "freeze.late_call_undone", instance=handle.uid, undone=rolled_back.reached, why=rolled_back.message
                )
            finally:
                release(found.processes)
