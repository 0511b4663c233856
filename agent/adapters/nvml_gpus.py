"""The Gpus port on NVML (nvidia-ml-py). NVML calls can hang with the driver, so one thread of its own makes them all.

The library is found as the dynamic loader finds `libnvidia-ml.so.1`. While a call hangs, further ones fail at once.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pynvml import (
    NVML_DEVICE_MIG_ENABLE,
    NVML_FEATURE_ENABLED,
    NVMLError,
    NVMLError_NotSupported,
    nvmlDeviceGetComputeRunningProcesses,
    nvmlDeviceGetCount,
    nvmlDeviceGetHandleByIndex,
    nvmlDeviceGetMemoryInfo,
    nvmlDeviceGetMigMode,
    nvmlDeviceGetName,
    nvmlDeviceGetPersistenceMode,
    nvmlDeviceGetUUID,
    nvmlInit,
    nvmlShutdown,
    nvmlSystemGetCudaDriverVersion,
    nvmlSystemGetDriverVersion,
)

from agent.core.errors import UnavailableError
from agent.core.types import Gpu, GpuProcess
from agent.ports import DriverInfo

CALL_DEADLINE_S = 5.0
MAX_PENDING = 64
UNKNOWN_MEMORY_BYTES = 1
"""For a process whose memory NVML does not say: it holds some, so nothing counts as released while it is listed."""

T = TypeVar("T")


class NvmlGpus:
    """`agent.ports.Gpus`. Create it anywhere; every call raises UnavailableError NVML_UNAVAILABLE if NVML can't be
    loaded, answers with an error, or not within `deadline_s`. After an error NVML is initialised anew."""

    def __init__(self, deadline_s: float = CALL_DEADLINE_S, session: NvmlSession | None = None) -> None:
        self._deadline_s = deadline_s
        self._session = session or NvmlSession()
        self._jobs: queue.Queue[_Job[Any] | None] = queue.Queue(MAX_PENDING)
        self._thread: threading.Thread | None = None
        self._hangs = False

    async def list_gpus(self) -> Sequence[Gpu]:
        """All devices in the order of their NVML index."""
        return await self._call(self._session.list_gpus)

    async def processes(self) -> Sequence[GpuProcess]:
        """All compute processes on all devices, host pids."""
        return await self._call(self._session.processes)

    async def memory_used(self) -> Mapping[str, int]:
        return await self._call(self._session.memory_used)

    async def memory_free(self) -> Mapping[str, int]:
        return await self._call(self._session.memory_free)

    async def driver(self) -> DriverInfo:
        return await self._call(self._session.driver)

    async def close(self) -> None:
        """Let NVML go. A hung thread is left behind: it is a daemon and ends with the process."""
        if self._thread is None:
            return
        with suppress(UnavailableError):
            await self._call(self._session.reset)
        self._jobs.put_nowait(None)
        self._thread = None

    async def _call(self, work: Callable[[], T]) -> T:
        if self._hangs:
            raise _unavailable("an earlier call into the driver has not come back")
        if self._thread is None:
            self._thread = threading.Thread(target=_serve, args=(self._jobs,), name="nvml", daemon=True)
            self._thread.start()
        loop = asyncio.get_running_loop()
        job = _Job(work, loop, loop.create_future())
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise _unavailable(f"{MAX_PENDING} calls wait for the driver already") from None
        try:
            async with asyncio.timeout(self._deadline_s):
                return await asyncio.shield(job.answer)
        except TimeoutError:
            self._hangs = True
            job.answer.add_done_callback(self._came_back)
            raise _unavailable(f"the driver did not answer within {self._deadline_s:g} s") from None
        except NVMLError as error:
            raise _unavailable(f"NVML says: {error}") from error

    def _came_back(self, answer: asyncio.Future[Any]) -> None:
        self._hangs = False
        if not answer.cancelled():
            answer.exception()  # nobody waits for it any more


class NvmlSession:
    """The calls themselves, made from one thread only. Raises NVMLError; the next call then begins anew."""

    def __init__(self) -> None:
        self._devices: list[_Device] = []
        self._open = False

    def list_gpus(self) -> Sequence[Gpu]:
        return self._guard(lambda: tuple(_describe(device) for device in self._devices))

    def processes(self) -> Sequence[GpuProcess]:
        def read() -> Sequence[GpuProcess]:
            return tuple(
                GpuProcess(
                    device.uuid,
                    entry.pid,
                    UNKNOWN_MEMORY_BYTES if entry.usedGpuMemory is None else entry.usedGpuMemory,
                )
                for device in self._devices
                for entry in nvmlDeviceGetComputeRunningProcesses(device.handle)
            )

        return self._guard(read)

    def memory_used(self) -> Mapping[str, int]:
        return self._guard(
            lambda: {device.uuid: nvmlDeviceGetMemoryInfo(device.handle).used for device in self._devices}
        )

    def memory_free(self) -> Mapping[str, int]:
        return self._guard(
            lambda: {device.uuid: nvmlDeviceGetMemoryInfo(device.handle).free for device in self._devices}
        )

    def driver(self) -> DriverInfo:
        return self._guard(lambda: DriverInfo(nvmlSystemGetDriverVersion(), nvmlSystemGetCudaDriverVersion()))

    def reset(self) -> None:
        """Shut NVML down; the next call initialises it."""
        self._devices = []
        if self._open:
            self._open = False
            with suppress(NVMLError):
                nvmlShutdown()

    def _guard(self, read: Callable[[], T]) -> T:
        try:
            if not self._open:
                nvmlInit()
                self._open = True
                self._devices = [_device(index) for index in range(nvmlDeviceGetCount())]
            return read()
        except NVMLError:
            self.reset()
            raise


@dataclass(frozen=True, slots=True)
class _Device:
    index: int
    uuid: str
    handle: Any


@dataclass(frozen=True, slots=True, eq=False)
class _Job(Generic[T]):
    work: Callable[[], T]
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[T]

    def perform(self) -> None:
        try:
            value = self.work()
        except Exception as error:  # it belongs to whoever waits
            self._post(self._fail, error)
        else:
            self._post(self._succeed, value)

    def _post(self, callback: Callable[[Any], None], value: Any) -> None:
        with suppress(RuntimeError):  # the loop has been closed meanwhile
            self.loop.call_soon_threadsafe(callback, value)

    def _succeed(self, value: T) -> None:
        if not self.answer.done():
            self.answer.set_result(value)

    def _fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


def _serve(jobs: queue.Queue[_Job[Any] | None]) -> None:
    while (job := jobs.get()) is not None:
        job.perform()


def _device(index: int) -> _Device:
    handle = nvmlDeviceGetHandleByIndex(index)
    return _Device(index, nvmlDeviceGetUUID(handle), handle)


def _describe(device: _Device) -> Gpu:
    return Gpu(
        uuid=device.uuid,
        index=device.index,
        model=nvmlDeviceGetName(device.handle),
        memory_bytes=nvmlDeviceGetMemoryInfo(device.handle).total,
        persistence=_is_on(lambda: nvmlDeviceGetPersistenceMode(device.handle), NVML_FEATURE_ENABLED),
        mig=_is_on(lambda: nvmlDeviceGetMigMode(device.handle)[0], NVML_DEVICE_MIG_ENABLE),
    )


def _is_on(read: Callable[[], int], on: int) -> bool:
    """A device that does not know the mode has it off."""
    try:
        return bool(read() == on)
    except NVMLError_NotSupported:
        return False


def _unavailable(why: str) -> UnavailableError:
    return UnavailableError("NVML_UNAVAILABLE", f"the GPUs can't be read: {why}; is the NVIDIA driver healthy?")
