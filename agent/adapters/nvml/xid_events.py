"""XID events of all GPUs (ports.GpuEvents), read by a dedicated thread: NVML's wait blocks, and hangs with the driver.

An NVML error ends the event set; it is made again after a growing pause. The thread is a daemon thread: one that hangs
in the driver ends with the process.
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
"""Waits (one minute in all) before the GPUs that could not be registered are tried again."""

_log = get_logger()


class NvmlEvents:
    """`agent.ports.GpuEvents`. The first `next_xid` starts the thread. Keeps the newest MAX_UNREAD events."""

    def __init__(self) -> None:
        self._unread: deque[Xid] = deque()
        self._arrived = asyncio.Event()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._waited = False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def next_xid(self) -> Xid:
        """The oldest unread event."""
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._watch, name="nvml-events", daemon=True)
            self._thread.start()
        while not self._unread:
            self._arrived.clear()
            await self._arrived.wait()
        return self._unread.popleft()

    def close(self) -> None:
        """End the thread within its next wait; does not wait for it."""
        self._stop.set()

    def _add(self, xid: Xid) -> None:
        if len(self._unread) >= MAX_UNREAD:
            self._unread.popleft()
        self._unread.append(xid)
        self._arrived.set()

    def _watch(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._stop.is_set():
            self._waited = False
            try:
                self._serve()
            except NVMLError as error:
                _log.debug("gpu.events_interrupted", error=str(error), pause_s=pause_s)
            if self._waited:  # NVML worked in between
                pause_s = FIRST_PAUSE_S
            self._stop.wait(pause_s)
            pause_s = min(pause_s * 2, LAST_PAUSE_S)

    def _serve(self) -> None:
        """Deliver events until stopped, or until it is time to retry the GPUs that are missing."""
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
        """Name the GPU by its handle: a lost GPU no longer reports its UUID."""
        if event.eventType != nvmlEventTypeXidCriticalError or self._loop is None:
            return
        uuid = _name(event.device, names)
        if uuid:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._add, Xid(uuid, int(event.eventData)))


def _register(events: Any) -> tuple[dict[int, str], bool]:
    """Register for XIDs. Returns the UUIDs by handle identity, and whether a GPU that should report could not be
    read."""
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
    """The address of NVML's own record: constant for a device while NVML is initialised."""
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def _name(handle: Any, names: dict[int, str]) -> str:
    found = names.get(_identity(handle))
    if found is not None:
        return found
    with suppress(NVMLError):
        return str(nvmlDeviceGetUUID(handle))
    return ""
