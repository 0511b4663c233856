"""The instances that the freezer tracks: what it remembers of each, and how it calls the driver for one.

Makes no decisions. Every call has a deadline and goes to processes whose pidfd shows that they live; the caller of
`run` makes sure that the cgroup is thawed. `forget` drops what is remembered and closes the pidfds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from agent.adapters.cuda.processes import CudaProcess, CudaProcessFinder, living, release
from agent.adapters.cuda.rollback import RollbackGoal, RollbackResult, rollback
from agent.adapters.cuda.target_watch import run_watching
from agent.adapters.freezer.limits import FreezerLimits, broken, failure, refused
from agent.core.errors import HibernodeError
from agent.core.types import Handle
from agent.ports import (
    Checkpointer,
    CudaCall,
    CudaFault,
    CudaReply,
    CudaState,
    FreezeResult,
    FreezerState,
    ProcessFreezer,
)

LATE_CALL_S = 600.0
"""How long a lost driver call may still take effect."""


@dataclass(frozen=True, slots=True)
class TrackedCudaProcesses:
    """The processes found at the lock, so that the wake needs no discovery. `vram_by_gpu`: the image's bytes by source
    GPU; None if unknown (frozen before this agent started)."""

    processes: tuple[CudaProcess, ...]
    vram_by_gpu: Mapping[str, int] | None = field(default_factory=dict)

    @property
    def gpu_uuids(self) -> tuple[str, ...]:
        return tuple(sorted(self.vram_by_gpu or ()))

    @property
    def vram_bytes(self) -> int | None:
        return None if self.vram_by_gpu is None else sum(self.vram_by_gpu.values())

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    @property
    def died(self) -> bool:
        return len(living(self.processes)) < len(self.processes)

    def needs(self, gpu_map: Mapping[str, str]) -> Mapping[str, int]:
        """Bytes that a restore by `gpu_map` (old uuid -> new uuid) needs on each GPU; empty if unknown."""
        needed: dict[str, int] = {}
        for uuid, bytes_ in (self.vram_by_gpu or {}).items():
            target = gpu_map.get(uuid, uuid)
            needed[target] = needed.get(target, 0) + bytes_
        return needed

    def moved(self, gpu_map: Mapping[str, str]) -> TrackedCudaProcesses:
        """The same processes after a restore by `gpu_map`."""
        return self if self.vram_by_gpu is None or not gpu_map else replace(self, vram_by_gpu=self.needs(gpu_map))


class FreezerRegistry:
    """What is remembered, by instance uid. `restored`: woken at least once, or perhaps (found thawed by recovery)."""

    def __init__(
        self, checkpointer: Checkpointer, cgroups: ProcessFreezer, finder: CudaProcessFinder, limits: FreezerLimits
    ) -> None:
        self.checkpointer = checkpointer
        self.cgroups = cgroups
        self.finder = finder
        self.limits = limits
        self.restored: set[str] = set()
        self._late_until_s: dict[str, float] = {}
        self._tracked: dict[str, TrackedCudaProcesses] = {}
        self._frozen_by_us: set[str] = set()

    def get(self, handle: Handle) -> TrackedCudaProcesses | None:
        return self._tracked.get(handle.uid)

    def track(self, handle: Handle, tracked: TrackedCudaProcesses) -> TrackedCudaProcesses:
        self._tracked[handle.uid] = tracked
        return tracked

    def untrack(self, handle: Handle) -> None:
        """Forget the instance's processes and close their pidfds."""
        tracked = self._tracked.pop(handle.uid, None)
        if tracked is not None:
            release(tracked.processes)

    def forget(self, handle: Handle) -> None:
        """The instance ended."""
        self.untrack(handle)
        self.restored.discard(handle.uid)
        self._late_until_s.pop(handle.uid, None)
        self._frozen_by_us.discard(handle.uid)

    async def discover(self, handle: Handle) -> TrackedCudaProcesses | FreezeResult:
        """Find and track the CUDA processes of an instance that this agent did not freeze itself."""
        found = await self.finder.find(handle)
        if not found.ok:
            make_result = refused if found.inconclusive else broken
            return make_result(*failure(found.failure, found.reason, found.message))
        return self.track(handle, TrackedCudaProcesses(found.processes, vram_by_gpu=None))

    def expect_late_calls(self, handle: Handle) -> None:
        """A call on the instance was lost, perhaps by an earlier agent, and may still take effect."""
        self._late_until_s[handle.uid] = asyncio.get_running_loop().time() + LATE_CALL_S

    def late_calls_until_s(self, handle: Handle) -> float | None:
        """Until when a lost call may take effect (the loop's time); None if no call was lost or the time is over."""
        until_s = self._late_until_s.get(handle.uid)
        if until_s is not None and until_s <= asyncio.get_running_loop().time():
            del self._late_until_s[handle.uid]
            return None
        return until_s

    async def freeze(self, handle: Handle) -> None:
        """Freeze the cgroup. Raises as `ProcessFreezer.freeze`."""
        self._frozen_by_us.add(handle.uid)
        try:
            await self.cgroups.freeze(handle, self.limits.cgroup_s)
        except BaseException:
            self._frozen_by_us.discard(handle.uid)
            raise

    async def thaw(self, handle: Handle) -> None:
        """Thaw the cgroup, also if an outsider froze it. Raises as `ProcessFreezer.thaw`."""
        try:
            await self.cgroups.thaw(handle, self.limits.cgroup_s)
        finally:
            self._frozen_by_us.discard(handle.uid)

    async def freeze_again(self, handle: Handle, result: FreezeResult) -> FreezeResult:
        """Freeze after a wake that changed nothing. Returns `result`, or BROKEN if the threads do not stop."""
        try:
            await self.freeze(handle)
        except HibernodeError as error:
            return replace(broken(error.reason, f"{result.message}; {error.message}"), driver_ns=result.driver_ns)
        return result

    def note_frozen_by_us(self, handle: Handle) -> None:
        """Recovery found the instance frozen, its memory gone from the GPU: an agent froze it."""
        self._frozen_by_us.add(handle.uid)

    def paused(self, handle: Handle) -> bool:
        """Frozen, and not by us."""
        return handle.uid not in self._frozen_by_us and self.cgroups.is_frozen(handle)

    def refuse_unless_thawed(self, handle: Handle) -> FreezeResult | None:
        """None if the driver may be called for the instance, which must be thawed; else the refusal."""
        match self.cgroups.state(handle):
            case FreezerState.THAWED:
                return None
            case FreezerState.GONE:
                return broken("INSTANCE_GONE", "no process of the instance is left")
            case FreezerState.FREEZING | FreezerState.FROZEN:
                return refused("EXTERNALLY_FROZEN", "the instance was paused from outside; resume it first")

    async def run(
        self,
        tracked: TrackedCudaProcesses,
        calls: Sequence[CudaCall],
        deadline_s: float,
        gpu_uuids: Sequence[str] | None = None,
    ) -> CudaReply:
        """`Checkpointer.run` if all tracked processes live; NOT_BEGUN with CUDA_PROCESS_DIED if one has ended.
        `gpu_uuids`: None = those that their memory is on, or was."""
        if tracked.died:  # its pid may soon name another process
            return CudaReply((), CudaFault.NOT_BEGUN, "CUDA_PROCESS_DIED", "a CUDA process has ended")
        return await run_watching(
            self.checkpointer,
            tracked.processes,
            calls,
            deadline_s,
            tracked.gpu_uuids if gpu_uuids is None else gpu_uuids,
            self.limits.death_grace_s,
        )

    async def rollback(
        self,
        handle: Handle,
        tracked: TrackedCudaProcesses,
        goal: CudaState,
        reply: CudaReply,
        *,
        gpu_map: Mapping[str, str] | None = None,
        restores: int = 2,
    ) -> RollbackResult:
        """Bring the processes to `goal` after `reply`, restoring by `gpu_map`, until `restores` restores have failed. A
        lost worker's target may have been frozen during the call, so each round thaws it first."""
        limits = self.limits
        lost = reply.fault in (CudaFault.LOST, CudaFault.STUCK)
        if lost:
            self.expect_late_calls(handle)

        async def thaw() -> None:
            if self.cgroups.state(handle) is not FreezerState.THAWED:
                with suppress(HibernodeError):  # gone or still frozen: the readings show it
                    await self.thaw(handle)

        target = RollbackGoal(
            goal,
            tuple((gpu_map or {}).items()),
            late_call_possible=lost,
            before_round=thaw,
            max_failed_restores=restores,
            state_deadline_s=limits.state_query_s,
            lock_timeout_s=limits.lock_timeout_s,
        )
        return await rollback(
            self.checkpointer, tracked.processes, target, limits.rollback_s + self.copy_deadline_s(tracked)
        )

    def copy_deadline_s(self, tracked: TrackedCudaProcesses) -> float:
        """How long a checkpoint or restore of all processes may take."""
        bytes_ = self.limits.unknown_image_bytes if tracked.vram_bytes is None else tracked.vram_bytes
        return self.limits.copy_base_s + bytes_ / self.limits.copy_bytes_per_s
