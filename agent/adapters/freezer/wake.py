"""A wake: check room on the GPUs, thaw, restore all, unlock all, verify; and the handling of failures.

REFUSED means that the instance is still checkpointed from the same GPUs and frozen: the wake may be repeated, on other
GPUs too. Room is checked before the thaw, not during it: threads must not run for long without their device mappings
(agent/docs/facts/gpu-checkpoint.md, section 4), and a refusal must leave the instance untouched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from agent.adapters.cuda.processes import stable_states
from agent.adapters.cuda.result_codes import CudaResult
from agent.adapters.freezer.limits import all_in, broken, ends_fatally, failure, refused
from agent.adapters.freezer.tracked import FreezerRegistry, TrackedCudaProcesses
from agent.adapters.freezer.vram_check import VramProbe
from agent.core.errors import DeadlineError, HibernodeError
from agent.core.types import Handle
from agent.log import get_logger
from agent.ports import CudaCall, CudaFault, CudaOp, CudaReply, CudaState, FreezeResult, FreezerState, Outcome

_RESTORED = frozenset({CudaState.LOCKED, CudaState.RUNNING})

_log = get_logger()


@dataclass(frozen=True, slots=True)
class _WakeRequest:
    """One wake: the processes, the map to restore them by (old uuid -> new uuid of every GPU), and the GPUs that they
    are restored on (empty = unknown)."""

    handle: Handle
    tracked: TrackedCudaProcesses
    gpu_map: Mapping[str, str]
    gpu_uuids: frozenset[str]

    def calls(self) -> list[CudaCall]:
        pairs = tuple(self.gpu_map.items())
        return [
            CudaCall(op, pid, gpu_map=pairs if op is CudaOp.RESTORE else ())
            for op in (CudaOp.RESTORE, CudaOp.UNLOCK, CudaOp.STATE)
            for pid in self.tracked.pids
        ]


class WakeSequence:
    """`Freezer.wake`."""

    def __init__(self, instances: FreezerRegistry, vram_probe: VramProbe) -> None:
        self._instances = instances
        self._vram_probe = vram_probe
        self._checks: set[asyncio.Task[None]] = set()

    async def wake(self, handle: Handle, gpu_map: Mapping[str, str], gpu_uuids: Sequence[str] = ()) -> FreezeResult:
        """`Freezer.wake`. Does not verify room for an image of unknown size, or if NVML does not answer in time."""
        gpu_map = {} if all(old == new for old, new in gpu_map.items()) else gpu_map
        tracked = self._instances.get(handle)
        if tracked is not None and (short := await self._vram_probe.refuse_without_room(tracked.needs(gpu_map))):
            return await self._refuse(handle, short)
        try:
            await self._instances.thaw(handle)
        except DeadlineError as error:
            return await self._instances.freeze_again(handle, refused(error.reason, error.message))
        except HibernodeError as error:
            return broken(error.reason, error.message)
        found = tracked or await self._instances.discover(handle)
        if isinstance(found, FreezeResult):
            return await self._refuse(handle, found) if found.outcome is Outcome.REFUSED else found
        # Not known from the image if an earlier agent froze it: then the caller's word is all there is.
        request = _WakeRequest(handle, found, gpu_map, frozenset(found.needs(gpu_map) or gpu_uuids))
        self._instances.restored.add(handle.uid)
        deadline_s = self._instances.copy_deadline_s(found)
        reply = await self._instances.run(found, request.calls(), deadline_s, sorted(request.gpu_uuids))
        if not all_in(reply, CudaState.RUNNING, len(found.processes)):
            return await self._after_failure(request, reply)
        self._instances.track(handle, found.moved(gpu_map))
        if gpu_map:
            self._check_placement_later(request)
        return FreezeResult(Outcome.OK, driver_ns=reply.driver_ns)

    async def _refuse(self, handle: Handle, result: FreezeResult) -> FreezeResult:
        """Leave it frozen, or freeze it again."""
        if self._instances.cgroups.state(handle) is FreezerState.FROZEN:
            return result
        return await self._instances.freeze_again(handle, result)

    async def _after_failure(self, request: _WakeRequest, reply: CudaReply) -> FreezeResult:
        """All are restored: unlock them. All are checkpointed: freeze again. Some of each: `_goal_for` decides.
        Any other state: BROKEN."""
        reason, message = failure(reply)
        if request.tracked.died:
            return broken("CUDA_PROCESS_DIED", f"a CUDA process ended during its restore: {message}", reply.driver_ns)
        if reply.fault is CudaFault.STUCK or ends_fatally(reply):
            return broken(reason, message, reply.driver_ns)
        if reply.fault is CudaFault.NOT_BEGUN:
            return await self._instances.freeze_again(request.handle, refused(reason, message))
        states, read_ns = await self._states(request)
        driver_ns = reply.driver_ns + read_ns
        if not states or not states <= _RESTORED | {CudaState.CHECKPOINTED}:
            return broken(reason, f"{message}; a process has failed or its state can't be read", driver_ns)
        goal = _goal_for(states, follow=bool(request.gpu_map) or _ran_already(reply))
        rolled_back = await self._instances.rollback(
            request.handle, request.tracked, goal, reply, gpu_map=request.gpu_map, restores=1
        )
        driver_ns += rolled_back.driver_ns
        if not rolled_back.reached or request.tracked.died:
            return broken(rolled_back.reason or "CUDA_PROCESS_DIED", f"{message}; {rolled_back.message}", driver_ns)
        if goal is CudaState.RUNNING:
            return await self._finish_late_wake(request, driver_ns)
        if reply.fault is CudaFault.LOST and self._instances.limits.migrates:
            # The lost restore may still run with this wake's map, at a later thaw, when others may hold those GPUs.
            return broken(reason, f"{message}; it may still run, on GPUs that others hold by then", driver_ns)
        again = replace(refused(reason, message, driver_ns), image_bytes=request.tracked.vram_bytes or 0)
        return await self._instances.freeze_again(request.handle, again)

    async def _states(self, request: _WakeRequest) -> tuple[set[CudaState], int]:
        limits = self._instances.limits
        await self._thaw_if_frozen(request.handle)
        return await stable_states(
            self._instances.checkpointer, request.tracked.processes, limits.state_query_s, limits.rollback_s
        )

    async def _thaw_if_frozen(self, handle: Handle) -> None:
        if self._instances.cgroups.state(handle) is not FreezerState.THAWED:
            try:
                await self._instances.thaw(handle)
            except HibernodeError as error:  # still frozen: the readings show it
                _log.warning("wake.paused_by_others", instance=handle.uid, reason=error.reason)

    async def _finish_late_wake(self, request: _WakeRequest, driver_ns: int) -> FreezeResult:
        """It runs, but without a clean reply: a hung restore, perhaps of an earlier wake with another map, may have
        woken it. NVML shows where; without an answer a migration is BROKEN."""
        expected = request.gpu_uuids
        if expected:
            try:
                seen_on = await self._vram_probe.gpus_of(request.tracked.pids)
            except HibernodeError as error:
                if request.gpu_map:
                    return broken(error.reason, f"it is unknown on which GPUs it runs: {error.message}", driver_ns)
                seen_on = frozenset()
            if not seen_on <= expected:
                return broken("CUDA_ON_WRONG_GPU", _wrong_gpus(seen_on, expected), driver_ns)
        self._instances.track(request.handle, request.tracked.moved(request.gpu_map))
        return FreezeResult(Outcome.OK, driver_ns=driver_ns)

    def _check_placement_later(self, request: _WakeRequest) -> None:
        """After a migration: check that NVML shows the instance on the new GPUs only. The driver reported success, so
        the request does not wait. A wrong placement is only logged here; the GPU isolation check acts on it."""
        if not request.gpu_uuids or self._checks:  # one check at a time: NVML has one thread
            return
        check = asyncio.create_task(self._check_placement(request), name=f"placement of {request.handle.uid}")
        self._checks.add(check)
        check.add_done_callback(self._checks.discard)

    async def _check_placement(self, request: _WakeRequest) -> None:
        try:
            seen_on = await self._vram_probe.gpus_of(request.tracked.pids)
        except HibernodeError as error:
            _log.warning("wake.place_not_verified", instance=request.handle.uid, reason=error.reason)
            return
        if not seen_on <= request.gpu_uuids:
            detail = _wrong_gpus(seen_on, request.gpu_uuids)
            _log.error("wake.on_wrong_gpu", instance=request.handle.uid, detail=detail)


def _goal_for(states: set[CudaState], *, follow: bool) -> CudaState:
    """The state to which to bring processes after a failed restore, when none, some or all of them are restored.

    None: they stay CHECKPOINTED. All: on to RUNNING. Some: the restored ones are checkpointed again, which changes
    nothing. With `follow` all go on to RUNNING: new images might be of other GPUs than the remaining ones.
    """
    if CudaState.CHECKPOINTED not in states:
        return CudaState.RUNNING
    mixed = bool(states & _RESTORED)
    return CudaState.RUNNING if mixed and follow else CudaState.CHECKPOINTED


def _ran_already(reply: CudaReply) -> bool:
    """A restore found its process already restored: a hung restore of an earlier wake ran at this thaw."""
    last = reply.answers[-1] if reply.answers else None
    return last is not None and last.call.op is CudaOp.RESTORE and last.code == CudaResult.ILLEGAL_STATE


def _wrong_gpus(seen_on: frozenset[str], expected: frozenset[str]) -> str:
    return f"NVML sees it on {', '.join(sorted(seen_on))} instead of only on {', '.join(sorted(expected))}"
