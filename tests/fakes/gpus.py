"""A `Gpus` port without a driver."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from agent.core.errors import UnavailableError
from agent.core.types import GIB, Gpu, GpuProcess
from agent.ports import DriverInfo


def gpu(index: int = 0, *, model: str = "Emulated H100", memory_bytes: int = 16 * GIB) -> Gpu:
    """A GPU whose uuid ends in its index."""
    return Gpu(f"GPU-00000000-0000-4000-8000-{index:012x}", index, model, memory_bytes)


@dataclass
class FakeGpus:
    """Knobs: `processes_now` (a list, or a function such as `FakeCheckpointer.gpu_processes`), `unavailable`, and
    `reserved_bytes` that every GPU uses besides."""

    gpus: Sequence[Gpu] = field(default_factory=lambda: [gpu(0), gpu(1)])
    processes_now: Sequence[GpuProcess] | Callable[[], Sequence[GpuProcess]] = ()
    info: DriverInfo = field(default_factory=lambda: DriverInfo("580.65.06", 13000))
    reserved_bytes: int = 0
    unavailable: bool = False
    calls: list[str] = field(default_factory=list)

    async def list_gpus(self) -> Sequence[Gpu]:
        self._called("list_gpus")
        return tuple(self.gpus)

    async def processes(self) -> Sequence[GpuProcess]:
        self._called("processes")
        return self._processes()

    async def memory_used(self) -> Mapping[str, int]:
        self._called("memory_used")
        used = {device.uuid: self.reserved_bytes for device in self.gpus}
        for process in self._processes():
            used[process.gpu_uuid] += process.used_bytes
        return used

    async def memory_free(self) -> Mapping[str, int]:
        self._called("memory_free")
        free = {device.uuid: device.memory_bytes - self.reserved_bytes for device in self.gpus}
        for process in self._processes():
            free[process.gpu_uuid] -= process.used_bytes
        return free

    async def driver(self) -> DriverInfo:
        self._called("driver")
        return self.info

    def _processes(self) -> Sequence[GpuProcess]:
        return tuple(self.processes_now() if callable(self.processes_now) else self.processes_now)

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if self.unavailable:
            raise UnavailableError("NVML_UNAVAILABLE", "the driver does not answer (fake)")
