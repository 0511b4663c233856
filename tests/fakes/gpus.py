"""A fake `Gpus` port."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from agent.core.errors import UnavailableError
from agent.core.types import GIB, Gpu, GpuProcess, GpuSample, Xid
from agent.ports import DriverInfo, GpuProcesses


def gpu(index: int = 0, *, model: str = "Emulated H100", memory_bytes: int = 16 * GIB) -> Gpu:
    """A GPU whose uuid ends in its index."""
    return Gpu(f"GPU-00000000-0000-4000-8000-{index:012x}", index, model, memory_bytes, pci_address=(0, index + 1, 0))


@dataclass
class FakeGpus:
    """Knobs: `processes_now` (a list, or a function such as `FakeCheckpointer.gpu_processes`), `unavailable`,
    `reserved_bytes` that every GPU uses besides, `errors` by uuid ("lost" = NVML calls it lost), and
    `volatile`: the GPUs whose persistence mode is off."""

    gpus: Sequence[Gpu] = field(default_factory=lambda: [gpu(0), gpu(1)])
    processes_now: Sequence[GpuProcess] | Callable[[], Sequence[GpuProcess]] = ()
    info: DriverInfo = field(default_factory=lambda: DriverInfo("580.65.06", 13000))
    reserved_bytes: int = 0
    unavailable: bool = False
    errors: dict[str, str] = field(default_factory=dict)
    volatile: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)

    async def list_gpus(self) -> Sequence[Gpu]:
        self._called("list_gpus")
        return tuple(device for device in self.gpus if device.uuid not in self.errors)

    async def processes(self) -> GpuProcesses:
        self._called("processes")
        shown = tuple(process for process in self._processes() if process.gpu_uuid not in self.errors)
        lost = frozenset(uuid for uuid, error in self.errors.items() if error == "lost")
        return GpuProcesses(shown, frozenset(self.errors), lost)

    async def samples(self) -> Sequence[GpuSample]:
        self._called("samples")
        return [self._sample(device) for device in self.gpus]

    async def memory_free(self) -> Mapping[str, int]:
        self._called("memory_free")
        return {d.uuid: d.memory_bytes - self._used(d.uuid) for d in self.gpus if d.uuid not in self.errors}

    async def driver(self) -> DriverInfo:
        self._called("driver")
        return self.info

    def _sample(self, device: Gpu) -> GpuSample:
        if error := self.errors.get(device.uuid):
            return GpuSample(device.uuid, error=f"the GPU is {error} (fake)", lost=error == "lost")
        on = device.uuid not in self.volatile
        return GpuSample(device.uuid, self._used(device.uuid), 7, 5, 0, 0, 40, 60_000, persistence=on)

    def _used(self, uuid: str) -> int:
        return self.reserved_bytes + sum(p.used_bytes for p in self._processes() if p.gpu_uuid == uuid)

    def _processes(self) -> Sequence[GpuProcess]:
        return tuple(self.processes_now() if callable(self.processes_now) else self.processes_now)

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if self.unavailable:
            raise UnavailableError("NVML_UNAVAILABLE", "the driver does not answer (fake)")


class FakeGpuEvents:
    """A `GpuEvents` port: `raise_xid` from the test."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Xid] = asyncio.Queue()

    def raise_xid(self, uuid: str, code: int) -> None:
        self._queue.put_nowait(Xid(uuid, code))

    async def next_xid(self) -> Xid:
        return await self._queue.get()
