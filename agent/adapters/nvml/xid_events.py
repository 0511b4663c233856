"""XID events of all GPUs (ports.GpuEvents), read by a thread of its own: NVML's wait blocks, and hangs with the driver.

Errors of NVML end the event set; it is made anew, with a growing pause. The thread is a daemon: one that hangs in the
driver ends with the process.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections import deque
from contextlib import suppress
from typing import Any

from pynvml import (
    NVMLError,
    NVMLError_NotSupported,
    NVMLError_Timeout,
    nvmlDeviceGetCount,
    nvmlDeviceGetHandleByIndex,
    nvmlDeviceGetUUID,
    nvmlDeviceRegisterEvents,
    nvmlEventSetCreate,
    nvmlEventSetFree,
    nvmlEventSetWait,
    nvmlEventTypeXidCriticalError,
    nvmlInit,
    nvmlShutdown,
)

from agent.core.types import Xid
from agent.log import get_logger

MAX_UNREAD = 256
WAIT_MS = 500
FIRST_PAUSE_S = 1.0
LAST_PAUSE_S = 60.0
RETRY_WAITS = 120
"""Where a GPU could not be listened to, so many waits later it is tried again: a minute."""

_log = get_logger()


class NvmlEvents:
    """`agent.ports.GpuEvents`. The thread starts with the first `next_xid`; `dropped` counts those that nobody
    read in time."""

    def __init__(self) -> None:
        self._unread: deque[Xid] = deque()
        self._arrived = asyncio.Event()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._waited = False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def next_xid(self) -> Xid:
        """The oldest that was not read."""
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._watch, name="nvml-events", daemon=True)
            self._thread.start()
        while not self._unread:
            self._arrived.clear()
            await self._arrived.wait()
        return self._unread.popleft()

    def close(self) -> None:
        """The thread ends within its next wait; it is not waited for."""
        self._stop.set()

    def _add(self, xid: Xid) -> None:
        if len(self._unread) >= MAX_UNREAD:
            self._unread.popleft()
        self._unread.append(xid)
        self._arrived.set()

    # ---- the thread -----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._stop.is_set():
            self._waited = False
            try:
                self._serve()
            except NVMLError as error:
                _log.debug("gpu.events_interrupted", error=str(error), pause_s=pause_s)
            if self._waited:  # NVML was well in between
                pause_s = FIRST_PAUSE_S
            self._stop.wait(pause_s)
            pause_s = min(pause_s * 2, LAST_PAUSE_S)

    def _serve(self) -> None:
        """Hand on events until told to stop, or until it is time to try again to hear of the GPUs that are missing."""
        nvmlInit()
        try:
            events = nvmlEventSetCreate()
            try:
                names, missing = _register(events)
                waits = 0
                while names and not self._stop.is_set() and (not missing or waits < RETRY_WAITS):
                    waits += 1
                    with suppress(NVMLError_Timeout):
                        self._deliver(nvmlEventSetWait(events, WAIT_MS), names)
                    self._waited = True
            finally:
                with suppress(NVMLError):
                    nvmlEventSetFree(events)
        finally:
            with suppress(NVMLError):
                nvmlShutdown()

    def _deliver(self, event: Any, names: dict[int, str]) -> None:
        """By the handle: a GPU that is lost does not tell its UUID any more."""
        if event.eventType != nvmlEventTypeXidCriticalError or self._loop is None:
            return
        uuid = _name(event.device, names)
        if uuid:
            with suppress(RuntimeError):  # the loop has been closed meanwhile
                self._loop.call_soon_threadsafe(self._add, Xid(uuid, int(event.eventData)))


def _register(events: Any) -> tuple[dict[int, str], bool]:
    """UUID by the handle's identity of every GPU that reports XIDs; and whether one that should could not be asked."""
    names: dict[int, str] = {}
    missing = False
    for index in range(nvmlDeviceGetCount()):
        try:
            handle = nvmlDeviceGetHandleByIndex(index)
            uuid = nvmlDeviceGetUUID(handle)
            nvmlDeviceRegisterEvents(handle, nvmlEventTypeXidCriticalError, events)
            names[_identity(handle)] = uuid
        except NVMLError_NotSupported:
            continue
        except NVMLError:
            missing = True
    return names, missing


def _identity(handle: Any) -> int:
    """The address of NVML's own record: the same for the same device as long as NVML is initialised."""
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def _name(handle: Any, names: dict[int, str]) -> str:
    found = names.get(_identity(handle))
    if found is not None:
        return found
    with suppress(NVMLError):
        return str(nvmlDeviceGetUUID(handle))
    return ""
