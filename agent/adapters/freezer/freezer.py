"""The Freezer port: moves an instance's GPU state to host memory and back, in the order that the driver demands.

Freeze (`freeze.py`): list the CUDA processes, lock all, list again, checkpoint all, verify, freeze the cgroup. Wake
(`wake.py`): check room on the GPU, thaw, restore all, unlock all, verify. The driver works inside the target, so a
target in a frozen cgroup can't answer and the caller hangs: an operation reads or thaws the cgroup before it calls the
driver. Rules and faults: agent/docs/facts/gpu-checkpoint.md, sections 3, 4 and 7.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from agent.adapters.cuda.processes import CudaProcessFinder, Pids
from agent.adapters.freezer.freeze import FreezeSequence
from agent.adapters.freezer.late_calls import LateCalls
from agent.adapters.freezer.limits import FreezerLimits
from agent.adapters.freezer.recovery import FreezerRecovery
from agent.adapters.freezer.tracked import FreezerRegistry
from agent.adapters.freezer.vram_check import VramProbe
from agent.adapters.freezer.wake import WakeSequence
from agent.core.types import Handle
from agent.ports import Checkpointer, Condition, FreezeResult, Gpus, Outcome, ProcessFreezer


class CudaFreezer:
    """`agent.ports.Freezer`. One operation at a time per instance, any number of instances at once."""

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
        limits = limits or FreezerLimits()
        finder = CudaProcessFinder(pids, checkpointer, boot_id, limits.state_query_s)
        self._instances = FreezerRegistry(checkpointer, cgroups, finder, limits)
        self._vram_probe = VramProbe(gpus, limits)
        self._late_calls = LateCalls(self._instances)
        self._freeze = FreezeSequence(self._instances, self._vram_probe)
        self._wake = WakeSequence(self._instances, self._vram_probe)
        self._recovery = FreezerRecovery(self._instances, self._vram_probe, boot_id)

    async def lock(self, handle: Handle) -> FreezeResult:
        await self._late_calls.suspend(handle)
        return self._watch_if_running(Outcome.REFUSED, handle, await self._freeze.lock(handle))

    async def unlock(self, handle: Handle) -> FreezeResult:
        await self._late_calls.suspend(handle)
        return self._watch_if_running(Outcome.OK, handle, await self._freeze.unlock(handle))

    async def checkpoint(self, handle: Handle) -> FreezeResult:
        """`Freezer.checkpoint`. Raises PreconditionError NOT_LOCKED."""
        return self._watch_if_running(Outcome.REFUSED, handle, await self._freeze.checkpoint(handle))

    async def wake(self, handle: Handle, gpu_map: Mapping[str, str], gpu_uuids: Sequence[str] = ()) -> FreezeResult:
        return self._watch_if_running(Outcome.OK, handle, await self._wake.wake(handle, gpu_map, gpu_uuids))

    def _watch_if_running(self, outcome: Outcome, handle: Handle, result: FreezeResult) -> FreezeResult:
        """`outcome` means that the instance runs now: watch it if a driver call on it was lost."""
        if result.outcome is outcome:
            self._late_calls.resume(handle)
        return result

    def paused(self, handle: Handle) -> bool:
        """`Freezer.paused`."""
        return self._instances.paused(handle)

    async def prepare_kill(self, handle: Handle) -> None:
        """`Freezer.prepare_kill`. Skipped if a rollback in progress does not end within `prepare_kill_s`."""
        try:
            async with asyncio.timeout(self._instances.limits.prepare_kill_s):
                await self._late_calls.suspend(handle)
        except TimeoutError:
            return
        await self._recovery.prepare_kill(handle)

    async def condition(self, handle: Handle) -> Condition:
        """`Freezer.condition`. Assumes from now on that an earlier agent lost a call, which may still take effect."""
        condition = await self._recovery.condition(handle)
        self._instances.expect_late_calls(handle)
        if condition is Condition.AWAKE:
            self._late_calls.resume(handle)
        return condition

    async def finish_freeze(self, handle: Handle) -> FreezeResult:
        return self._watch_if_running(Outcome.REFUSED, handle, await self._freeze.finish(handle))

    async def thaw(self, handle: Handle) -> None:
        """`Freezer.thaw`. Raises as `ProcessFreezer.thaw`."""
        await self._instances.thaw(handle)

    async def vram_bytes(self, handle: Handle) -> int:
        """`Freezer.vram_bytes`. Raises UnavailableError NVML_UNAVAILABLE."""
        return await self._vram_probe.bytes_of(frozenset(await self._instances.finder.pids(handle)))

    def forget(self, handle: Handle) -> None:
        self._late_calls.forget(handle)
        self._instances.forget(handle)
