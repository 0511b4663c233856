"""Lock, unlock and checkpoint: moves an instance's GPU state into host memory, or rolls back.

Lock all, list again, checkpoint all, verify, and only then stop the threads. If a lock fails, all are unlocked and the
workload runs on; if a checkpoint fails, all are restored and unlocked (agent/docs/facts/gpu-checkpoint.md, section 4).
"""

from __future__ import annotations

from dataclasses import replace

from agent.adapters.cuda.processes import CudaProcessList, release
from agent.adapters.freezer.limits import RELIST, all_in, broken, ends_fatally, failure, refused
from agent.adapters.freezer.tracked import FreezerRegistry, TrackedCudaProcesses
from agent.adapters.freezer.vram_check import VramProbe
from agent.core.errors import HibernodeError, PreconditionError
from agent.core.types import Handle
from agent.ports import CudaCall, CudaFault, CudaOp, CudaReply, CudaState, FreezeResult, Outcome


class FreezeSequence:
    """`Freezer.lock`, `unlock` and `checkpoint`."""

    def __init__(self, instances: FreezerRegistry, vram_probe: VramProbe) -> None:
        self._instances = instances
        self._vram_probe = vram_probe
        self._limits = instances.limits

    async def lock(self, handle: Handle) -> FreezeResult:
        """Lock all CUDA processes. REFUSED: none is left locked by this call."""
        if refusal := self._instances.refuse_unless_thawed(handle):
            return refusal
        self._instances.untrack(handle)
        driver_ns = 0
        for _ in range(self._limits.lock_attempts):
            found = await self._instances.finder.find(handle)
            result = await self._lock_found(handle, found)
            driver_ns += result.driver_ns
            if result.reason != RELIST:
                return replace(result, driver_ns=driver_ns)
        return refused("PROCESSES_CHANGE", "new CUDA processes keep appearing while the instance is locked", driver_ns)

    async def _lock_found(self, handle: Handle, found: CudaProcessList) -> FreezeResult:
        """Lock the processes found and list again; the reason RELIST asks for another listing."""
        if not found.ok:
            return refused(*failure(found.failure, found.reason, found.message))
        if not found.pids:
            return broken("INSTANCE_GONE", "no process of the instance is left")
        tracked = self._instances.track(handle, TrackedCudaProcesses(found.processes))
        if refusal := self._unfit(tracked):
            if self._instances.late_calls_until_s(handle) is not None and _left_locked(tracked):
                return await self._unlock_after(handle, tracked, CudaReply(), RELIST, "")
            self._instances.untrack(handle)
            return refusal
        timeout_ms = round(self._limits.lock_timeout_s * 1000)
        calls = [CudaCall(CudaOp.LOCK, pid, timeout_ms) for pid in tracked.pids]
        deadline_s = self._limits.driver_call_s + self._limits.lock_timeout_s * len(calls)
        calls += [CudaCall(CudaOp.STATE, pid) for pid in tracked.pids]
        reply = await self._instances.run(tracked, calls, deadline_s)
        if not all_in(reply, CudaState.LOCKED, len(tracked.processes)):
            return await self._unlock_after(handle, tracked, reply, *failure(reply))
        again = await self._instances.finder.find(handle, tracked.processes)
        appeared = [process for process in again.processes if process not in tracked.processes]
        if not again.ok or appeared or len(again.processes) < len(tracked.processes):
            release(appeared)
            return await self._unlock_after(handle, tracked, reply, RELIST, "")
        try:
            vram_by_gpu = await self._vram_probe.measure(tracked.processes, again.pids)
        except HibernodeError as error:
            return await self._unlock_after(handle, tracked, reply, error.reason, error.message)
        self._instances.track(handle, replace(tracked, vram_by_gpu=vram_by_gpu))
        return FreezeResult(Outcome.OK, driver_ns=reply.driver_ns)

    def _unfit(self, tracked: TrackedCudaProcesses) -> FreezeResult | None:
        if len(tracked.processes) > self._limits.max_processes:
            return refused(
                "TOO_MANY_CUDA_PROCESSES",
                f"{len(tracked.processes)} processes use CUDA, {self._limits.max_processes} can be frozen; "
                "set idle: never",
            )
        wrong = [process for process in tracked.processes if process.state is not CudaState.RUNNING]
        if failed := [process for process in wrong if process.state is CudaState.FAILED]:
            return broken("CUDA_STATE_FAILED", f"the driver reports process {failed[0].pid} as failed")
        if wrong:
            return refused("CUDA_ILLEGAL_STATE", f"the driver reports process {wrong[0].pid} as {wrong[0].state.value}")
        return None

    async def _unlock_after(
        self, handle: Handle, tracked: TrackedCudaProcesses, reply: CudaReply, reason: str, message: str
    ) -> FreezeResult:
        """Roll back a lock: REFUSED with `reason` if everything runs again, else BROKEN."""
        if reply.fault is CudaFault.NOT_BEGUN:
            died = tracked.died
            self._instances.untrack(handle)
            return refused(RELIST if died else reason, message)
        rolled_back = await self._instances.rollback(handle, tracked, CudaState.RUNNING, reply)
        died = tracked.died
        self._instances.untrack(handle)
        driver_ns = reply.driver_ns + rolled_back.driver_ns
        if not rolled_back.reached:
            return broken(rolled_back.reason, f"{message}; {rolled_back.message}", driver_ns)
        # A process that ended by itself is no failure: the next listing shows what is left.
        return refused(RELIST if died else reason, message, driver_ns)

    async def unlock(self, handle: Handle) -> FreezeResult:
        """Undo a lock (a cancelled freeze, or LOCKED found by recovery). Also thaws an instance paused by others:
        a remaining lock would hang its program when they resume it."""
        refusal = self._instances.refuse_unless_thawed(handle)
        if refusal is not None and refusal.outcome is Outcome.REFUSED:
            try:
                await self._instances.thaw(handle)
            except HibernodeError as error:
                return broken(error.reason, error.message)
        elif refusal is not None:
            return refusal
        tracked = self._instances.get(handle) or await self._instances.discover(handle)
        if isinstance(tracked, FreezeResult):
            return tracked
        pids = tracked.pids
        calls = [CudaCall(op, pid) for op in (CudaOp.UNLOCK, CudaOp.STATE) for pid in pids]
        reply = await self._instances.run(tracked, calls, self._limits.driver_call_s)
        if all_in(reply, CudaState.RUNNING, len(pids)):
            self._instances.untrack(handle)
            return FreezeResult(Outcome.OK, driver_ns=reply.driver_ns)
        rolled_back = await self._instances.rollback(handle, tracked, CudaState.RUNNING, reply)
        self._instances.untrack(handle)
        outcome = Outcome.OK if rolled_back.reached else Outcome.BROKEN
        return FreezeResult(outcome, rolled_back.reason, rolled_back.message, reply.driver_ns + rolled_back.driver_ns)

    async def checkpoint(self, handle: Handle) -> FreezeResult:
        """Checkpoint the locked processes, verify, freeze the cgroup. REFUSED leaves the instance unlocked and running.
        Raises PreconditionError NOT_LOCKED."""
        tracked = self._instances.get(handle)
        if tracked is None:
            raise PreconditionError("NOT_LOCKED", "lock the instance before its checkpoint", uid=handle.uid)
        if refusal := self._instances.refuse_unless_thawed(handle):
            if refusal.outcome is Outcome.BROKEN:
                return refusal
            # Paused by others between lock and checkpoint: thaw and unlock, because no lock may remain.
            return await self._restore_after(handle, tracked, CudaReply(), refusal.reason, refusal.message)
        pids = tracked.pids
        calls = [CudaCall(op, pid) for op in (CudaOp.CHECKPOINT, CudaOp.STATE) for pid in pids]
        reply = await self._instances.run(tracked, calls, self._instances.copy_deadline_s(tracked))
        if not all_in(reply, CudaState.CHECKPOINTED, len(pids)):
            return await self._restore_after(handle, tracked, reply, *failure(reply))
        return await self._finish_freeze(handle, tracked, reply)

    async def finish(self, handle: Handle) -> FreezeResult:
        """`Freezer.finish_freeze`: checkpoints what is not yet checkpointed, freezes the cgroup. The result's
        `image_bytes` is 0 (unknown)."""
        if refusal := self._instances.refuse_unless_thawed(handle):
            return refusal
        self._instances.untrack(handle)
        tracked = await self._instances.discover(handle)
        if isinstance(tracked, FreezeResult):
            return tracked
        rolled_back = await self._instances.rollback(handle, tracked, CudaState.CHECKPOINTED, CudaReply())
        if not rolled_back.reached:
            return await self._restore_after(handle, tracked, CudaReply(), rolled_back.reason, rolled_back.message)
        return await self._finish_freeze(handle, tracked, CudaReply())

    async def _finish_freeze(self, handle: Handle, tracked: TrackedCudaProcesses, reply: CudaReply) -> FreezeResult:
        """After the checkpoint: verify by NVML that the VRAM is released, then stop the threads."""
        try:
            await self._vram_probe.wait_until_gone(tracked.pids, tracked.vram_by_gpu or ())
            await self._instances.freeze(handle)
        except HibernodeError as error:
            return await self._restore_after(handle, tracked, reply, error.reason, error.message)
        return FreezeResult(Outcome.OK, driver_ns=reply.driver_ns, image_bytes=tracked.vram_bytes or 0)

    async def _restore_after(
        self, handle: Handle, tracked: TrackedCudaProcesses, reply: CudaReply, reason: str, message: str
    ) -> FreezeResult:
        """Roll back a checkpoint: REFUSED with `reason` if everything runs again, else BROKEN."""
        if ends_fatally(reply):
            died = tracked.died
            self._instances.untrack(handle)
            return _died(message, reply.driver_ns) if died else broken(reason, message, reply.driver_ns)
        rolled_back = await self._instances.rollback(handle, tracked, CudaState.RUNNING, reply)
        died = tracked.died
        self._instances.untrack(handle)
        driver_ns = reply.driver_ns + rolled_back.driver_ns
        if died:
            return _died(message, driver_ns)
        if not rolled_back.reached:
            return broken(rolled_back.reason, f"{message}; {rolled_back.message}", driver_ns)
        return refused(reason, message, driver_ns)


def _died(message: str, driver_ns: int) -> FreezeResult:
    return broken("CUDA_PROCESS_DIED", f"a CUDA process ended during its checkpoint: {message}", driver_ns)


def _left_locked(tracked: TrackedCudaProcesses) -> bool:
    """Whether a lock call that counted as lost has run after all: LOCKED is seen, and nothing but that and RUNNING."""
    states = {process.state for process in tracked.processes}
    return CudaState.LOCKED in states and states <= {CudaState.RUNNING, CudaState.LOCKED}
