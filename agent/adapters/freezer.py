"""The Freezer port: an instance's GPU state to host memory and back, in the order that the driver demands.

Freeze: list the CUDA processes, lock all, list again, checkpoint all, verify, freeze the cgroup. Wake: thaw, restore
all, unlock all, verify. The driver does its work inside the target, so a target in a frozen cgroup can't answer and
the caller hangs: the cgroup is read before every question. Rules and faults: facts gpu-checkpoint, sections 4 and 7.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from agent.adapters import process_table
from agent.adapters.cgroup_freezer import FreezerState, ProcessFreezer
from agent.adapters.cuda_processes import CudaProcess, CudaProcessFinder, Found, Pids, living, read_states, release
from agent.adapters.cuda_settle import Settled, settle
from agent.adapters.freeze_results import START_OVER, WORKERS_DOWN, FreezerLimits, all_in, broken, failure, refused
from agent.adapters.target_watch import run_watching
from agent.core.errors import HibernodeError, PreconditionError, UnavailableError
from agent.core.types import Handle
from agent.ports import (
    Checkpointer,
    Condition,
    CudaCall,
    CudaFault,
    CudaOp,
    CudaReply,
    CudaState,
    FreezeResult,
    Gpus,
    Outcome,
)


@dataclass(frozen=True, slots=True)
class _Held:
    """What was found at the lock: the wake needs no discovery with it."""

    processes: tuple[CudaProcess, ...]
    gpu_uuids: tuple[str, ...] = ()
    vram_bytes: int | None = 0


class CudaFreezer:
    """`agent.ports.Freezer`. One operation at a time for an instance, any number of instances at once."""

    def __init__(
        self,
        checkpointer: Checkpointer,
        cgroups: ProcessFreezer,
        gpus: Gpus,
        pids: Pids,
        boot_id: str,
        limits: FreezerLimits | None = None,
    ) -> None:
        """`pids` lists an instance's host pids (`Runtime.pids`)."""
        self._checkpointer = checkpointer
        self._cgroups = cgroups
        self._gpus = gpus
        self._pids = pids
        self._boot_id = boot_id
        self._limits = limits or FreezerLimits()
        self._finder = CudaProcessFinder(pids, checkpointer, boot_id, self._limits.state_s)
        self._held: dict[str, _Held] = {}

    # ---- freeze -----------------------------------------------------------------------------------------------

    async def lock(self, handle: Handle) -> FreezeResult:
        """Lock all CUDA processes. REFUSED leaves all of them running."""
        if refusal := self._unaskable(handle):
            return refusal
        self.forget(handle)
        driver_ns = 0
        for _ in range(self._limits.lock_attempts):
            found = await self._finder.find(handle)
            result = await self._lock_found(handle, found)
            driver_ns += result.driver_ns
            if result.reason != START_OVER:
                return replace(result, driver_ns=driver_ns)
        return refused("PROCESSES_CHANGE", "CUDA processes keep appearing while the instance is locked", driver_ns)

    async def _lock_found(self, handle: Handle, found: Found) -> FreezeResult:
        """Lock what was found and look again; the reason START_OVER asks for another listing."""
        if not found.ok:
            return refused(*failure(found.failure, found.reason, found.message))
        if not found.pids:
            return broken("INSTANCE_GONE", "no process of the instance is left")
        self._held[handle.uid] = held = _Held(found.processes)
        wrong = [process for process in found.processes if process.state is not CudaState.RUNNING]
        if wrong:
            self.forget(handle)
            return refused("CUDA_ILLEGAL_STATE", f"process {wrong[0].pid} is {wrong[0].state.value} for the driver")
        timeout_ms = round(self._limits.lock_timeout_s * 1000)
        calls = [CudaCall(CudaOp.LOCK, process.pid, timeout_ms) for process in held.processes]
        reply = await self._run(held, calls, self._limits.answer_s + self._limits.lock_timeout_s * len(calls))
        if not reply.ok:
            return await self._unlock_after(handle, held, reply, *failure(reply))
        again = await self._finder.find(handle, held.processes)
        appeared = [process for process in again.processes if process not in held.processes]
        if not again.ok or appeared or len(again.processes) < len(held.processes):
            release(appeared)
            return await self._unlock_after(handle, held, reply, START_OVER, "")
        try:
            held = await self._measure(held, again.pids)
        except HibernodeError as error:
            return await self._unlock_after(handle, held, reply, error.reason, error.message)
        self._held[handle.uid] = held
        return FreezeResult(Outcome.OK, driver_ns=reply.driver_ns)

    async def _measure(self, held: _Held, pids: frozenset[int]) -> _Held:
        """VRAM and GPUs of the locked processes by NVML, which must not know one that we do not."""
        used = [process for process in await self._gpus.processes() if process.pid in pids]
        known = {process.pid for process in held.processes}
        strangers = [process.pid for process in used if process.used_bytes and process.pid not in known]
        if strangers:
            raise PreconditionError(
                "CUDA_PROCESS_UNKNOWN",
                f"process {strangers[0]} holds GPU memory but the driver's checkpoint API does not know it",
            )
        uuids = tuple(sorted({process.gpu_uuid for process in used}))
        if len(uuids) > 1 and len(known) > 1 and not self._limits.several_processes_on_several_gpus:
            raise PreconditionError(
                "SEVERAL_PROCESSES_ON_SEVERAL_GPUS",
                "processes that share several GPUs can hang or fail on restore; set idle: never, or allow it",
            )
        return replace(held, gpu_uuids=uuids, vram_bytes=sum(process.used_bytes for process in used))

    async def _unlock_after(
        self, handle: Handle, held: _Held, reply: CudaReply, reason: str, message: str
    ) -> FreezeResult:
        """A lock that goes no further: REFUSED with `reason` if everything runs again, else BROKEN."""
        died = len(living(held.processes)) < len(held.processes)
        if reply.fault is CudaFault.NOT_BEGUN:
            self.forget(handle)
            return refused(START_OVER if died else reason, message)
        settled = await self._settle(handle, held, CudaState.RUNNING, reply)
        died = len(living(held.processes)) < len(held.processes)
        self.forget(handle)
        driver_ns = reply.driver_ns + settled.driver_ns
        if not settled.reached:
            return broken(settled.reason, f"{message}; {settled.message}", driver_ns)
        # One that ended by itself is no fault: the next listing shows what is left.
        return refused(START_OVER if died else reason, message, driver_ns)

    async def unlock(self, handle: Handle) -> FreezeResult:
        """Undo a lock (a cancelled freeze, or what recovery finds LOCKED)."""
        if refusal := self._unaskable(handle):
            return refusal
        held = self._held.get(handle.uid) or await self._discover(handle)
        if isinstance(held, FreezeResult):
            return held
        pids = [process.pid for process in held.processes]
        calls = [CudaCall(op, pid) for op in (CudaOp.UNLOCK, CudaOp.STATE) for pid in pids]
        reply = await self._run(held, calls, self._limits.answer_s)
        if all_in(reply, CudaState.RUNNING, len(pids)):
            self.forget(handle)
            return FreezeResult(Outcome.OK, driver_ns=reply.driver_ns)
        settled = await self._settle(handle, held, CudaState.RUNNING, reply)
        self.forget(handle)
        outcome = Outcome.OK if settled.reached else Outcome.BROKEN
        return FreezeResult(outcome, settled.reason, settled.message, reply.driver_ns + settled.driver_ns)

    async def checkpoint(self, handle: Handle) -> FreezeResult:
        """Checkpoint what `lock` locked, prove it, freeze the cgroup. REFUSED leaves it unlocked and running.

        Raises PreconditionError NOT_LOCKED.
        """
        held = self._held.get(handle.uid)
        if held is None:
            raise PreconditionError("NOT_LOCKED", "lock the instance before its checkpoint", uid=handle.uid)
        if refusal := self._unaskable(handle):
            return refusal
        pids = [process.pid for process in held.processes]
        calls = [CudaCall(op, pid) for op in (CudaOp.CHECKPOINT, CudaOp.STATE) for pid in pids]
        reply = await self._run(held, calls, self._copy_deadline_s(held))
        if not all_in(reply, CudaState.CHECKPOINTED, len(pids)):
            return await self._restore_after(handle, held, reply, *failure(reply))
        return await self._seal(handle, held, reply)

    async def _seal(self, handle: Handle, held: _Held, reply: CudaReply) -> FreezeResult:
        """After the checkpoint: the VRAM is gone by NVML's account, then the threads stop."""
        try:
            await self._vram_gone(held)
            await self._cgroups.freeze(handle)
        except HibernodeError as error:
            return await self._restore_after(handle, held, reply, error.reason, error.message)
        return FreezeResult(Outcome.OK, driver_ns=reply.driver_ns, image_bytes=held.vram_bytes or 0)

    async def _vram_gone(self, held: _Held) -> None:
        """Raises UnavailableError VRAM_NOT_RELEASED or NVML_UNAVAILABLE."""
        pids = {process.pid for process in held.processes}
        if not pids:
            return
        pause_s = 0.0
        with suppress(TimeoutError):
            async with asyncio.timeout(self._limits.vram_gone_s):
                while await self._vram_of(pids):
                    await asyncio.sleep(pause_s)
                    pause_s = min(max(pause_s * 2, 0.001), 0.1)
                return
        raise UnavailableError(
            "VRAM_NOT_RELEASED",
            f"NVML still shows GPU memory of the processes {self._limits.vram_gone_s:g} s after their checkpoint",
        )

    async def _restore_after(
        self, handle: Handle, held: _Held, reply: CudaReply, reason: str, message: str
    ) -> FreezeResult:
        """A checkpoint that goes no further: REFUSED with `reason` if everything runs again, else BROKEN."""
        settled = await self._settle(handle, held, CudaState.RUNNING, reply)
        died = len(living(held.processes)) < len(held.processes)
        self.forget(handle)
        driver_ns = reply.driver_ns + settled.driver_ns
        if died:
            return broken("CUDA_PROCESS_DIED", f"a CUDA process ended during its checkpoint: {message}", driver_ns)
        if not settled.reached:
            return broken(settled.reason, f"{message}; {settled.message}", driver_ns)
        return refused(reason, message, driver_ns)

    # ---- wake -------------------------------------------------------------------------------------------------

    async def wake(self, handle: Handle, gpu_map: Mapping[str, str]) -> FreezeResult:
        """Thaw, then restore, unlock and verify in one message. REFUSED: still checkpointed, and frozen again."""
        try:
            await self._cgroups.thaw(handle)
        except PreconditionError as error:
            return broken(error.reason, error.message)
        except HibernodeError as error:
            return refused(error.reason, error.message)
        held = self._held.get(handle.uid) or await self._discover(handle)
        if isinstance(held, FreezeResult):
            return await self._freeze_again(handle, held) if held.outcome is Outcome.REFUSED else held
        pairs = tuple(gpu_map.items())
        pids = [process.pid for process in held.processes]
        calls = [
            CudaCall(op, pid, gpu_map=pairs if op is CudaOp.RESTORE else ())
            for op in (CudaOp.RESTORE, CudaOp.UNLOCK, CudaOp.STATE)
            for pid in pids
        ]
        reply = await self._run(held, calls, self._copy_deadline_s(held))
        if all_in(reply, CudaState.RUNNING, len(pids)):
            return FreezeResult(Outcome.OK, driver_ns=reply.driver_ns)
        return await self._after_failed_wake(handle, held, reply)

    async def _after_failed_wake(self, handle: Handle, held: _Held, reply: CudaReply) -> FreezeResult:
        """Restored after all -> unlock; still checkpointed -> freeze again, so that it may be tried once more on
        another GPU; a mixture of both -> checkpoint the restored again. Everything else is BROKEN."""
        reason, message = failure(reply)
        if len(living(held.processes)) < len(held.processes):
            return broken("CUDA_PROCESS_DIED", f"a CUDA process ended during its restore: {message}")
        if reply.fault is CudaFault.STUCK:
            return broken(reason, message)
        if reply.fault is CudaFault.NOT_BEGUN:
            return await self._freeze_again(handle, refused(reason, message))
        states = await read_states(self._checkpointer, held.processes, self._limits.state_s)
        found = {answer.state for answer in states.answers}
        driver_ns = reply.driver_ns + states.driver_ns
        if not states.ok or not found <= {CudaState.RUNNING, CudaState.LOCKED, CudaState.CHECKPOINTED}:
            return broken(reason, f"{message}; and its state can't be read or is failed", driver_ns)
        goal = CudaState.CHECKPOINTED if CudaState.CHECKPOINTED in found else CudaState.RUNNING
        settled = await self._settle(handle, held, goal, reply)
        driver_ns += settled.driver_ns
        if not settled.reached:
            return broken(settled.reason, f"{message}; {settled.message}", driver_ns)
        if goal is CudaState.RUNNING:
            return FreezeResult(Outcome.OK, driver_ns=driver_ns)
        again = replace(refused(reason, message, driver_ns), image_bytes=held.vram_bytes or 0)
        return await self._freeze_again(handle, again)

    async def _freeze_again(self, handle: Handle, result: FreezeResult) -> FreezeResult:
        """After a wake that changed nothing: the threads stop as before."""
        try:
            await self._cgroups.freeze(handle)
        except HibernodeError as error:
            return replace(broken(error.reason, f"{result.message}; {error.message}"), driver_ns=result.driver_ns)
        return result

    # ---- recovery ---------------------------------------------------------------------------------------------

    async def condition(self, handle: Handle) -> Condition:
        """`Freezer.condition`. Raises UnavailableError NVML_UNAVAILABLE, or DRIVER_BUSY and the like: nobody could ask,
        which says nothing about the instance. Where the driver's API can't be used at all, what runs is AWAKE."""
        pids = frozenset(await self._pids(handle))
        if not process_table.is_alive(handle.process, self._boot_id) or not pids:
            return Condition.GONE
        match self._cgroups.state(handle):
            case FreezerState.GONE:
                return Condition.GONE
            case FreezerState.FROZEN:
                return Condition.PAUSED_BY_OTHERS if await self._vram_of(pids) else Condition.FROZEN
            case FreezerState.FREEZING:
                return Condition.PAUSED_BY_OTHERS
            case FreezerState.THAWED:
                return await self._ask_condition(handle)

    async def _ask_condition(self, handle: Handle) -> Condition:
        found = await self._finder.find(handle)
        if found.reason == WORKERS_DOWN:
            return Condition.AWAKE  # a host that can't freeze: nobody has frozen this, and it is not paused
        if found.not_begun:
            raise UnavailableError(found.reason, f"the driver could not be asked: {found.message}", uid=handle.uid)
        if not found.ok:
            return Condition.BROKEN
        try:
            states = await self._calm_states(found.processes)
        finally:
            release(found.processes)
        if not states <= {CudaState.RUNNING, CudaState.LOCKED, CudaState.CHECKPOINTED}:
            return Condition.BROKEN
        if CudaState.CHECKPOINTED in states:
            return Condition.CHECKPOINTED
        return Condition.LOCKED if CudaState.LOCKED in states else Condition.AWAKE

    async def _calm_states(self, processes: Sequence[CudaProcess]) -> set[CudaState]:
        """The states, once nobody is CHECKPOINTING or RESTORING any more; UNKNOWN at the deadline."""
        states = {process.state for process in processes}
        with suppress(TimeoutError):
            async with asyncio.timeout(self._limits.settle_s):
                while states & {CudaState.CHECKPOINTING, CudaState.RESTORING}:
                    await asyncio.sleep(0.05)
                    reply = await read_states(self._checkpointer, processes, self._limits.state_s)
                    if not reply.ok:
                        return {CudaState.UNKNOWN}
                    states = {answer.state or CudaState.UNKNOWN for answer in reply.answers}
                return states
        return {CudaState.UNKNOWN}

    async def finish_freeze(self, handle: Handle) -> FreezeResult:
        """`Freezer.finish_freeze`; processes not yet checkpointed are. `image_bytes` is 0: nobody knows it now."""
        if refusal := self._unaskable(handle):
            return refusal
        self.forget(handle)
        held = await self._discover(handle)
        if isinstance(held, FreezeResult):
            return held
        settled = await self._settle(handle, held, CudaState.CHECKPOINTED, CudaReply())
        reply = CudaReply()
        if not settled.reached:
            return await self._restore_after(handle, held, reply, settled.reason, settled.message)
        return await self._seal(handle, held, reply)

    async def thaw(self, handle: Handle) -> None:
        """`Freezer.thaw`. Raises what `ProcessFreezer.thaw` raises."""
        await self._cgroups.thaw(handle)

    def paused(self, handle: Handle) -> bool:
        """`Freezer.paused`."""
        return self._cgroups.state(handle) is FreezerState.FROZEN and not self._cgroups.frozen_by_us(handle)

    async def prepare_kill(self, handle: Handle) -> None:
        """`Freezer.prepare_kill`."""

    async def vram_bytes(self, handle: Handle) -> int:
        """`Freezer.vram_bytes`. Raises UnavailableError NVML_UNAVAILABLE."""
        return await self._vram_of(frozenset(await self._pids(handle)))

    def forget(self, handle: Handle) -> None:
        """`Freezer.forget`. Idempotent."""
        held = self._held.pop(handle.uid, None)
        if held is not None:
            release(held.processes)

    # ---- common -----------------------------------------------------------------------------------------------

    def _unaskable(self, handle: Handle) -> FreezeResult | None:
        """The driver may be asked only about a thawed instance."""
        match self._cgroups.state(handle):
            case FreezerState.THAWED:
                return None
            case FreezerState.GONE:
                return broken("INSTANCE_GONE", "no process of the instance is left")
            case FreezerState.FREEZING | FreezerState.FROZEN:
                return refused("EXTERNALLY_FROZEN", "somebody else has paused the instance; resume it first")

    async def _discover(self, handle: Handle) -> _Held | FreezeResult:
        """The CUDA processes of an instance that this agent did not freeze itself."""
        found = await self._finder.find(handle)
        if not found.ok:
            give_up = refused if found.not_begun else broken
            return give_up(*failure(found.failure, found.reason, found.message))
        self._held[handle.uid] = held = _Held(found.processes, vram_bytes=None)
        return held

    async def _run(self, held: _Held, calls: Sequence[CudaCall], deadline_s: float) -> CudaReply:
        if len(living(held.processes)) < len(held.processes):  # and its pid may name another process soon
            return CudaReply((), CudaFault.NOT_BEGUN, "CUDA_PROCESS_DIED", "a CUDA process has ended")
        return await run_watching(self._checkpointer, held.processes, calls, deadline_s, held.gpu_uuids)

    async def _settle(self, handle: Handle, held: _Held, goal: CudaState, reply: CudaReply) -> Settled:
        """After a lost worker: thaw (somebody may have frozen the target under the driver), re-read, go on."""
        lost = reply.fault in (CudaFault.LOST, CudaFault.STUCK)
        if lost or self._cgroups.state(handle) is not FreezerState.THAWED:
            with suppress(HibernodeError):  # gone or still frozen: the readings below will say so
                await self._cgroups.thaw(handle)
        deadline_s = self._limits.settle_s + self._copy_deadline_s(held)
        return await settle(self._checkpointer, held.processes, goal, deadline_s, suspicious=lost)

    def _copy_deadline_s(self, held: _Held) -> float:
        bytes_ = self._limits.unknown_image_bytes if held.vram_bytes is None else held.vram_bytes
        return self._limits.copy_base_s + bytes_ / self._limits.copy_bytes_per_s

    async def _vram_of(self, pids: frozenset[int] | set[int]) -> int:
        return sum(process.used_bytes for process in await self._gpus.processes() if process.pid in pids)
