"""GPU memory as NVML shows it: what locked processes hold, that a checkpoint released it, that a restore has room.

Every query is bounded. A freeze without NVML's proof is refused. A wake goes on without an answer, because a request
waits and this check is the second one: the GPU allocator grants a GPU only when it is proven empty.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence

from agent.adapters.cuda.processes import CudaProcess
from agent.adapters.freezer.limits import FreezerLimits, refused
from agent.core.errors import HibernodeError, PreconditionError, UnavailableError
from agent.core.sizes import shortage_in_mib
from agent.log import get_logger
from agent.ports import FreezeResult, GpuProcesses, Gpus

UNRESPONSIVE_S = 5.0
"""How long wakes skip an NVML that did not answer in time, so that only the first one waits for it."""

_log = get_logger()


class VramProbe:
    """Reads GPU memory for the freezer."""

    def __init__(self, gpus: Gpus, limits: FreezerLimits) -> None:
        self._gpus = gpus
        self._limits = limits
        self._unresponsive = False

    async def bytes_of(self, pids: Collection[int]) -> int:
        """GPU memory of these processes, on any GPU. Raises UnavailableError NVML_UNAVAILABLE, also if none is seen but
        a GPU that may hold some does not answer. (A lost GPU holds nothing that a program could continue with.)"""
        found = await self._gpus.processes()
        seen = sum(process.used_bytes for process in found if process.pid in pids)
        if not seen:
            found.on(found.unanswered - found.lost)
        return seen

    async def gpus_of(self, pids: Collection[int]) -> frozenset[str]:
        """The answering GPUs that hold memory of these processes. Raises UnavailableError NVML_UNAVAILABLE."""
        return frozenset(p.gpu_uuid for p in await self._processes() if p.pid in pids and p.used_bytes)

    async def measure(self, tracked: Sequence[CudaProcess], pids: Collection[int]) -> Mapping[str, int]:
        """Bytes on each GPU of the locked processes `tracked`; `pids` are all processes of their instance.

        Raises UnavailableError NVML_UNAVAILABLE; PreconditionError CUDA_PROCESS_UNKNOWN for memory of a process that
        the driver's checkpoint API does not know, SEVERAL_PROCESSES_ON_SEVERAL_GPUS unless allowed.
        """
        found = await self._processes()
        used = [process for process in found if process.pid in pids]
        known = {process.pid for process in tracked}
        if known - {process.pid for process in used}:  # its memory may be on a GPU that does not answer
            found.on(found.unanswered)
        unknown = [process.pid for process in used if process.used_bytes and process.pid not in known]
        if unknown:
            raise PreconditionError(
                "CUDA_PROCESS_UNKNOWN",
                f"process {unknown[0]} holds GPU memory but the driver's checkpoint API does not know it",
            )
        by_gpu: dict[str, int] = {}
        for process in used:
            by_gpu[process.gpu_uuid] = by_gpu.get(process.gpu_uuid, 0) + process.used_bytes
        if len(by_gpu) > 1 and len(known) > 1 and not self._limits.several_processes_on_several_gpus:
            raise PreconditionError(
                "SEVERAL_PROCESSES_ON_SEVERAL_GPUS",
                "processes that share several GPUs can hang or fail on restore; set idle: never, or allow it",
            )
        return by_gpu

    async def wait_until_gone(self, pids: Collection[int], gpu_uuids: Collection[str]) -> None:
        """Wait until NVML shows no memory of these processes on any GPU. Raises UnavailableError: VRAM_NOT_RELEASED, or
        NVML_UNAVAILABLE, also if one of `gpu_uuids`, where they had their memory, does not answer."""
        if not pids:
            return
        pause_s, answered = 0.0, False
        try:
            async with asyncio.timeout(self._limits.vram_gone_s):
                while await self._bytes_left(pids, gpu_uuids):
                    answered = True
                    await asyncio.sleep(pause_s)
                    pause_s = min(max(pause_s * 2, 0.001), 0.1)
                return
        except TimeoutError:
            if not answered:
                raise _no_answer(self._limits.vram_gone_s) from None
        raise UnavailableError(
            "VRAM_NOT_RELEASED",
            f"NVML still shows GPU memory of the processes {self._limits.vram_gone_s:g} s after their checkpoint",
        )

    async def _bytes_left(self, pids: Collection[int], gpu_uuids: Collection[str]) -> int:
        found = await self._gpus.processes()
        found.on(gpu_uuids)
        return sum(process.used_bytes for process in found if process.pid in pids)

    async def refuse_without_room(self, needed: Mapping[str, int]) -> FreezeResult | None:
        """REFUSED GPU_MEMORY_SHORT if a GPU has less free memory than `needed` (bytes by uuid), else None.

        There is no margin: `needed` is what NVML itself counted before the checkpoint, context included. Not verified
        (None): an unknown need, a GPU that NVML does not show now, no answer within `memory_query_s`.
        """
        if not any(needed.values()) or self._unresponsive:
            return None
        try:
            async with asyncio.timeout(self._limits.memory_query_s):
                free = await self._gpus.memory_free()
        except TimeoutError:
            self._unresponsive = True
            asyncio.get_running_loop().call_later(UNRESPONSIVE_S, self._retry)
            _log.warning("wake.memory_not_verified", reason="NVML_SILENT", waited_s=self._limits.memory_query_s)
            return None
        except HibernodeError as error:
            _log.warning("wake.memory_not_verified", reason=error.reason, message=error.message)
            return None
        short = [uuid for uuid, bytes_ in needed.items() if uuid in free and free[uuid] < bytes_]
        if not short:
            return None
        uuid = short[0]
        has, needs = shortage_in_mib(free[uuid], needed[uuid])
        return refused(
            "GPU_MEMORY_SHORT",
            f"GPU {uuid} has {has} free, the restore needs {needs}; see nvidia-smi for who else uses it",
        )

    def _retry(self) -> None:
        self._unresponsive = False

    async def _processes(self) -> GpuProcesses:
        try:
            async with asyncio.timeout(self._limits.vram_gone_s):
                return await self._gpus.processes()
        except TimeoutError:
            raise _no_answer(self._limits.vram_gone_s) from None


def _no_answer(waited_s: float) -> UnavailableError:
    return UnavailableError("NVML_UNAVAILABLE", f"NVML did not answer within {waited_s:g} s")
