"""Finds the real state of an instance for an agent that has just started, and makes a kill safe.

The cgroup is read before any driver call, because a frozen target can't answer. Nothing is known of the time before the
agent's start, so an instance found thawed counts as restored.
"""

from __future__ import annotations

import asyncio

from agent.adapters.cuda.checkpointers import WORKERS_DOWN
from agent.adapters.cuda.processes import CudaProcess, release, stable_states
from agent.adapters.freezer.tracked import FreezerRegistry
from agent.adapters.freezer.vram_check import VramProbe
from agent.adapters.kernel import process_table
from agent.core.errors import HibernodeError, UnavailableError
from agent.core.types import Handle
from agent.log import get_logger
from agent.ports import Condition, CudaCall, CudaOp, CudaState, FreezerState

KILL_LOCK_TIMEOUT_S = 1.0
"""Time for running kernels before a kill; their results are lost anyway."""

_log = get_logger()


class FreezerRecovery:
    """`Freezer.condition` and `prepare_kill`."""

    def __init__(self, instances: FreezerRegistry, vram_probe: VramProbe, boot_id: str) -> None:
        self._instances = instances
        self._vram_probe = vram_probe
        self._boot_id = boot_id
        self._limits = instances.limits

    async def condition(self, handle: Handle) -> Condition:
        """`Freezer.condition`. Raises UnavailableError (NVML_UNAVAILABLE, DRIVER_BUSY ...) if the state could not be
        read. Where the driver's API can't be used at all, a thawed instance is AWAKE."""
        pids = frozenset(await self._instances.finder.pids(handle))
        if not process_table.is_alive(handle.process, self._boot_id) or not pids:
            return Condition.GONE
        match self._instances.cgroups.state(handle):
            case FreezerState.GONE:
                return Condition.GONE
            case FreezerState.FROZEN:
                if await self._vram_probe.bytes_of(pids):  # on any GPU: it may have woken on another one
                    return Condition.PAUSED_BY_OTHERS
                self._instances.note_frozen_by_us(handle)
                return Condition.FROZEN
            case FreezerState.FREEZING:
                return Condition.PAUSED_BY_OTHERS
            case FreezerState.THAWED:
                return await self._ask(handle)

    async def _ask(self, handle: Handle) -> Condition:
        found = await self._instances.finder.find(handle)
        if found.reason == WORKERS_DOWN:
            return Condition.AWAKE  # a host that can't freeze: this instance was never frozen, and is not paused
        if found.inconclusive:
            raise UnavailableError(found.reason, f"the driver could not be called: {found.message}", uid=handle.uid)
        if not found.ok:
            return Condition.BROKEN
        self._instances.restored.add(handle.uid)
        try:
            return self._judge(await self._states(found.processes))
        finally:
            release(found.processes)

    def _judge(self, states: set[CudaState]) -> Condition:
        """A mixture is an interrupted freeze or wake. A freeze can always be finished. A wake can't where instances
        migrate: the restored processes may be on GPUs other than those of the rest's images."""
        if not states <= {CudaState.RUNNING, CudaState.LOCKED, CudaState.CHECKPOINTED}:
            return Condition.BROKEN
        if CudaState.CHECKPOINTED in states:
            mixed = len(states) > 1
            return Condition.BROKEN if mixed and self._limits.migrates else Condition.CHECKPOINTED
        return Condition.LOCKED if CudaState.LOCKED in states else Condition.AWAKE

    async def _states(self, processes: tuple[CudaProcess, ...]) -> set[CudaState]:
        """The states as found, read again while one is CHECKPOINTING or RESTORING."""
        states = {process.state for process in processes}
        if not states & {CudaState.CHECKPOINTING, CudaState.RESTORING}:
            return states
        states, _ = await stable_states(
            self._instances.checkpointer, processes, self._limits.state_query_s, self._limits.rollback_s
        )
        return states

    async def prepare_kill(self, handle: Handle) -> None:
        """`Freezer.prepare_kill`: takes at most `memory_query_s`, `prepare_kill_s` and the copy's time together. Skips
        an instance that is not thawed or was never restored."""
        if handle.uid not in self._instances.restored:
            return
        try:
            if self._instances.cgroups.state(handle) is not FreezerState.THAWED:
                return
            pids = frozenset(await self._instances.finder.pids(handle))
            deadline_s = self._limits.prepare_kill_s + await self._vram(pids) / self._limits.copy_bytes_per_s
            async with asyncio.timeout(deadline_s):
                await self._checkpoint_all(handle, deadline_s)
        except (HibernodeError, OSError) as error:  # TimeoutError is an OSError
            _log.warning("kill.unprepared", instance=handle.uid, error=str(error) or type(error).__name__)

    async def _vram(self, pids: frozenset[int]) -> int:
        try:
            async with asyncio.timeout(self._limits.memory_query_s):
                return await self._vram_probe.bytes_of(pids)
        except (HibernodeError, TimeoutError):
            return 0

    async def _checkpoint_all(self, handle: Handle, deadline_s: float) -> None:
        found = await self._instances.finder.find(handle)
        try:
            timeout_ms = round(min(self._limits.lock_timeout_s, KILL_LOCK_TIMEOUT_S) * 1000)
            running = [process for process in found.processes if process.state is CudaState.RUNNING]
            locked = [process for process in found.processes if process.state is CudaState.LOCKED]
            if len(running) + len(locked) > self._limits.max_processes:
                return
            calls = [CudaCall(CudaOp.LOCK, process.pid, timeout_ms) for process in running]
            calls += [CudaCall(CudaOp.CHECKPOINT, process.pid) for process in (*running, *locked)]
            reply = await self._instances.checkpointer.run(calls, deadline_s)
            if not reply.ok:
                _log.warning("kill.unprepared", instance=handle.uid, error=reply.message or "the driver refused")
        finally:
            release(found.processes)
