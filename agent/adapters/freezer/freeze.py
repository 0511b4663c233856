"""Lock, unlock and checkpoint: the way of an instance's GPU state into host memory, and every way back.

Lock all, list again, checkpoint all, verify, and only then stop the threads. A lock that fails unlocks all and the
workload lives; a checkpoint that fails restores and unlocks all (facts gpu-checkpoint, section 4).
"""

from __future__ import annotations

from dataclasses import replace

from agent.adapters.cuda.processes import CudaProcessList, release
from agent.adapters.freezer.limits import START_OVER, all_in, broken, failure, is_fatal, refused
from agent.adapters.freezer.tracked import FreezerRegistry, TrackedCudaProcesses
from agent.adapters.freezer.vram_check import VramProbe
from agent.core.errors import HibernodeError, PreconditionError
from agent.core.types import Handle
from agent.ports import CudaCall, CudaFault, CudaOp, CudaReply, CudaState, FreezeResult, Outcome


class FreezeSequence:
    """`Freezer.lock`, `unlock` and `checkpoint`."""

    def __init__(self, instances: FreezerRegistry, witness: VramProbe) -> None:
        self._instances = instances
        self._witness = witness
        self._limits = instances.limits

    # ---- lock -------------------------------------------------------------------------------------------------

    async def lock(self, handle: Handle) -> FreezeResult:
        """Lock all CUDA processes. REFUSED leaves all of them running."""
        if refusal := self._instances.unaskable(handle):
            return refusal
        self._instances.drop(handle)
        driver_ns = 0
        for _ in range(self._limits.lock_attempts):
            found = await self._instances.finder.find(handle)
            result = await self._lock_found(handle, found)
            driver_ns += result.driver_ns
            if result.reason != START_OVER:
                return replace(result, driver_ns=driver_ns)
        return refused("PROCESSES_CHANGE", "CUDA processes keep appearing while the instance is locked", driver_ns)

    async def _lock_found(self, handle: Handle, found: CudaProcessList) -> FreezeResult:
        """Lock what was found and look again; the reason START_OVER asks for another listing."""
        if not found.ok:
            return refused(*failure(found.failure, found.reason, found.message))
        if not found.pids:
            return broken("INSTANCE_GONE", "no process of the instance is left")
        held = self._instances.keep(handle, TrackedCudaProcesses(found.processes))
        if refusal := self._unfit(held):
            if self._instances.doubt_ends_s(handle) is not None and _left_locked(held):
                return await self._unlock_after(handle, held, CudaReply(), START_OVER, "")
            self._instances.drop(handle)
            return refusal
        timeout_ms = round(self._limits.lock_timeout_s * 1000)
        calls = [CudaCall(CudaOp.LOCK, pid, timeout_ms) for pid in held.pids]
        deadline_s = self._limits.answer_s + self._limits.lock_timeout_s * len(calls)
        calls += [CudaCall(CudaOp.STATE, pid) for pid in held.pids]
        reply = await self._instances.run(held, calls, deadline_s)
        if not all_in(reply, CudaState.LOCKED, len(held.processes)):
            return await self._unlock_after(handle, held, reply, *failure(reply))
        again = await self._instances.finder.find(handle, held.processes)
        appeared = [process for process in again.processes if process not in held.processes]
        if not again.ok or appeared or len(again.processes) < len(held.processes):
            release(appeared)
            return await self._unlock_after(handle, held, reply, START_OVER, "")
        try:
            vram_by_gpu = await self._witness.measure(held.processes, again.pids)
        except HibernodeError as error:
            return await self._unlock_after(handle, held, reply, error.reason, error.message)
        self._instances.keep(handle, replace(held, vram_by_gpu=vram_by_gpu))
        return FreezeResult(Outcome.OK, driver_ns=reply.driver_ns)

    def _unfit(self, held: TrackedCudaProcesses) -> FreezeResult | None:
        if len(held.processes) > self._limits.max_processes:
            return refused(
                "TOO_MANY_CUDA_PROCESSES",
                f"{len(held.processes)} processes use CUDA, {self._limits.max_processes} can be frozen; "
                "set idle: never",
            )
        wrong = [process for process in held.processes if process.state is not CudaState.RUNNING]
        if failed := [process for process in wrong if process.state is CudaState.FAILED]:
            return broken("CUDA_STATE_FAILED", f"the driver says that process {failed[0].pid} has failed")
        if wrong:
            return refused("CUDA_ILLEGAL_STATE", f"process {wrong[0].pid} is {wrong[0].state.value} for the driver")
        return None

    async def _unlock_after(
        self, handle: Handle, held: TrackedCudaProcesses, reply: CudaReply, reason: str, message: str
    ) -> FreezeResult:
        """A lock that goes no further: REFUSED with `reason` if everything runs again, else BROKEN."""
        if reply.fault is CudaFault.NOT_BEGUN:
            died = held.died
            self._instances.drop(handle)
            return refused(START_OVER if died else reason, message)
        settled = await self._instances.settle(handle, held, CudaState.RUNNING, reply)
        died = held.died
        self._instances.drop(handle)
        driver_ns = reply.driver_ns + settled.driver_ns
        if not settled.reached:
            return broken(settled.reason, f"{message}; {settled.message}", driver_ns)
        # One that ended by itself is no fault: the next listing shows what is left.
        return refused(START_OVER if died else reason, message, driver_ns)

    async def unlock(self, handle: Handle) -> FreezeResult:
        """Undo a lock (a cancelled freeze, or what recovery finds LOCKED). Somebody's pause is undone with it: a lock
        that stays behind would hang the program when they resume it."""
        refusal = self._instances.unaskable(handle)
        if refusal is not None and refusal.outcome is Outcome.REFUSED:
            try:
                await self._instances.go_on(handle)
            except HibernodeError as error:
                return broken(error.reason, error.message)
        elif refusal is not None:
            return refusal
        held = self._instances.get(handle) or await self._instances.discover(handle)
        if isinstance(held, FreezeResult):
            return held
        pids = held.pids
        calls = [CudaCall(op, pid) for op in (CudaOp.UNLOCK, CudaOp.STATE) for pid in pids]
        reply = await self._instances.run(held, calls, self._limits.answer_s)
        if all_in(reply, CudaState.RUNNING, len(pids)):
            self._instances.drop(handle)
            return FreezeResult(Outcome.OK, driver_ns=reply.driver_ns)
        settled = await self._instances.settle(handle, held, CudaState.RUNNING, reply)
        self._instances.drop(handle)
        outcome = Outcome.OK if settled.reached else Outcome.BROKEN
        return FreezeResult(outcome, settled.reason, settled.message, reply.driver_ns + settled.driver_ns)

    # ---- checkpoint -------------------------------------------------------------------------------------------

    async def checkpoint(self, handle: Handle) -> FreezeResult:
        """Checkpoint what `lock` locked, prove it, freeze the cgroup. REFUSED leaves it unlocked and running.

        Raises PreconditionError NOT_LOCKED.
        """
        held = self._instances.get(handle)
        if held is None:
            raise PreconditionError("NOT_LOCKED", "lock the instance before its checkpoint", uid=handle.uid)
        if refusal := self._instances.unaskable(handle):
            return await self._unlock_paused(handle, held, refusal)
        pids = held.pids
        calls = [CudaCall(op, pid) for op in (CudaOp.CHECKPOINT, CudaOp.STATE) for pid in pids]
        reply = await self._instances.run(held, calls, self._instances.copy_deadline_s(held))
        if not all_in(reply, CudaState.CHECKPOINTED, len(pids)):
            return await self._restore_after(handle, held, reply, *failure(reply))
        return await self._seal(handle, held, reply)

    async def _unlock_paused(self, handle: Handle, held: TrackedCudaProcesses, refusal: FreezeResult) -> FreezeResult:
        """Paused by others between lock and checkpoint: a lock may not stay behind, so they are thawed for it."""
        if refusal.outcome is Outcome.BROKEN:
            return refusal
        return await self._restore_after(handle, held, CudaReply(), refusal.reason, refusal.message)

    async def finish(self, handle: Handle) -> FreezeResult:
        """`Freezer.finish_freeze`; processes not yet checkpointed are. `image_bytes` is 0: nobody knows it now."""
        if refusal := self._instances.unaskable(handle):
            return refusal
        self._instances.drop(handle)
        held = await self._instances.discover(handle)
        if isinstance(held, FreezeResult):
            return held
        settled = await self._instances.settle(handle, held, CudaState.CHECKPOINTED, CudaReply())
        reply = CudaReply()
        if not settled.reached:
            return await self._restore_after(handle, held, reply, settled.reason, settled.message)
        return await self._seal(handle, held, reply)

    async def _seal(self, handle: Handle, held: TrackedCudaProcesses, reply: CudaReply) -> FreezeResult:
        """After the checkpoint: the VRAM is gone by NVML's account, then the threads stop."""
        try:
            await self._witness.wait_until_gone(held.pids, held.vram_by_gpu or ())
            await self._instances.stop(handle)
        except HibernodeError as error:
            return await self._restore_after(handle, held, reply, error.reason, error.message)
        return FreezeResult(Outcome.OK, driver_ns=reply.driver_ns, image_bytes=held.vram_bytes or 0)

    async def _restore_after(
        self, handle: Handle, held: TrackedCudaProcesses, reply: CudaReply, reason: str, message: str
    ) -> FreezeResult:
        """A checkpoint that goes no further: REFUSED with `reason` if everything runs again, else BROKEN."""
        if is_fatal(reply):
            died = held.died
            self._instances.drop(handle)
            return _died(message, reply.driver_ns) if died else broken(reason, message, reply.driver_ns)
        settled = await self._instances.settle(handle, held, CudaState.RUNNING, reply)
        died = held.died
        self._instances.drop(handle)
        driver_ns = reply.driver_ns + settled.driver_ns
        if died:
            return _died(message, driver_ns)
        if not settled.reached:
            return broken(settled.reason, f"{message}; {settled.message}", driver_ns)
        return refused(reason, message, driver_ns)


def _died(message: str, driver_ns: int) -> FreezeResult:
    return broken("CUDA_PROCESS_DIED", f"a CUDA process ended during its checkpoint: {message}", driver_ns)


def _left_locked(held: TrackedCudaProcesses) -> bool:
    """A lock that was lost has run after all, unseen."""
    return {process.state for process in held.processes} <= {CudaState.RUNNING, CudaState.LOCKED}
