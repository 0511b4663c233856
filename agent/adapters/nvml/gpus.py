"""The Gpus port on NVML (nvidia-ml-py). One dedicated thread makes all calls, because they can hang with the driver.

The dynamic loader finds `libnvidia-ml.so.1`. While a call hangs, further calls fail at once.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from pynvml import NVMLError

from agent.adapters.nvml.session import NvmlSession
from agent.core.errors import UnavailableError
from agent.core.types import Gpu, GpuSample
from agent.ports import DriverInfo, GpuProcesses

CALL_DEADLINE_S = 5.0
MAX_PENDING = 64

T = TypeVar("T")


class NvmlGpus:
    """`agent.ports.Gpus`. Every call raises UnavailableError NVML_UNAVAILABLE if NVML can't be loaded, reports an
    error, or does not answer within `deadline_s`. After an error NVML is initialised again."""

    def __init__(self, deadline_s: float = CALL_DEADLINE_S, session: NvmlSession | None = None) -> None:
        self._deadline_s = deadline_s
        self._session = session or NvmlSession()
        self._jobs: queue.Queue[_Job[Any] | None] = queue.Queue(MAX_PENDING)
        self._thread: threading.Thread | None = None
        self._hung = False

    async def list_gpus(self) -> Sequence[Gpu]:
        """All devices in the order of their NVML index."""
        return await self._call(self._session.list_gpus)

    async def processes(self) -> GpuProcesses:
        """The compute processes (host pids) of all devices that answer."""
        return await self._call(self._session.processes)

    async def samples(self) -> Sequence[GpuSample]:
        """One call per device, so that a wake waits for the figures of one device at most."""
        found = [await self._call(partial(self._session.sample, i)) for i in await self._call(self._session.indices)]
        return [sample for sample in found if sample is not None]

    async def memory_free(self) -> Mapping[str, int]:
        """Free bytes of the devices that answer."""
        return await self._call(self._session.memory_free)

    async def driver(self) -> DriverInfo:
        return await self._call(self._session.driver)

    async def close(self) -> None:
        """Shut NVML down. A hung thread is left behind: it is a daemon thread and ends with the process."""
        if self._thread is None:
            return
        with suppress(UnavailableError):
            await self._call(self._session.reset)
        with suppress(queue.Full):  # the thread hangs and its queue is full
            self._jobs.put_nowait(None)
        self._thread = None

    async def _call(self, work: Callable[[], T]) -> T:
        if self._hung:
            raise _unavailable("an earlier call into the driver has not returned")
        if self._thread is None:
            self._thread = threading.Thread(target=_serve, args=(self._jobs,), name="nvml", daemon=True)
            self._thread.start()
        loop = asyncio.get_running_loop()
        job = _Job(work, loop, loop.create_future())
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise _unavailable(f"{MAX_PENDING} calls already wait for the driver") from None
        try:
            async with asyncio.timeout(self._deadline_s):
                return await asyncio.shield(job.answer)
        except TimeoutError:
            self._hung = True
            job.answer.add_done_callback(self._on_late_answer)
            raise _unavailable(f"the driver did not answer within {self._deadline_s:g} s") from None
        except NVMLError as error:
            raise _unavailable(f"NVML reports: {error}") from error

    def _on_late_answer(self, answer: asyncio.Future[Any]) -> None:
        self._hung = False
        if not answer.cancelled():
            answer.exception()  # marks it as retrieved: its caller is gone


@dataclass(frozen=True, slots=True, eq=False)
class _Job(Generic[T]):
    work: Callable[[], T]
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[T]

    def perform(self) -> None:
        try:
            value = self.work()
        except Exception as error:  # raised again for the caller
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


def _unavailable(why: str) -> UnavailableError:
    return UnavailableError("NVML_UNAVAILABLE", f"the GPUs can't be read: {why}; is the NVIDIA driver healthy?")
