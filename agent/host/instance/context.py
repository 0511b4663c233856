"""What the operations of all instances of a node share, and how an operation is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from agent.core.errors import HibernodeError, PreconditionError
from agent.core.lifecycle.machine import CANCELLED
from agent.core.types import Handle
from agent.event_log import EventLog
from agent.host.instance.memory_reservations import MemoryReservations
from agent.http.request_ids import RequestIds
from agent.ports import Clock, Freezer, InstanceStore, Runtime

_T = TypeVar("_T")

REMOVED_LATER = frozenset({"ENGINE_UNAVAILABLE", "REMOVE_FAILED"})


@dataclass(frozen=True, slots=True)
class InstanceContext:
    """The ports and settings of a node.

    - `gpu_models`: the host's GPUs, uuid -> model.
    - `gpu_numbers`: the numbers that CUDA gives GPUs of the host; see `StartSpec`.
    - `store_problem`: why the store fails, "" while it works. No freeze begins while the store fails.
    """

    clock: Clock
    runtime: Runtime
    freezer: Freezer
    memory: MemoryReservations
    store: InstanceStore
    events: EventLog
    request_ids: RequestIds
    ready_timeout_s: float
    stop_timeout_s: float
    environment: Mapping[str, str]
    gpu_models: Mapping[str, str]
    gpu_numbers: Callable[[Sequence[str]], tuple[int, ...]] = lambda _uuids: ()
    store_problem: Callable[[], str] = lambda: ""

    async def remove(self, handle: Handle) -> None:
        """Remove what is left of a dead container. What the engine can't remove now (it is down or busy) only keeps a
        name taken: `EngineWatch` removes it later. Other errors of `Runtime.destroy` are raised."""
        try:
            await self.runtime.destroy(handle)
        except HibernodeError as error:
            if error.reason not in REMOVED_LATER:
                raise
            self.events.add(handle.uid, "instance.removal_postponed", error.message)


async def unless_cancelled(work: Coroutine[Any, Any, _T], cancel: asyncio.Event) -> _T:
    """Await `work`, or cancel it when `cancel` is set, and raise PreconditionError CANCELLED. Leaves no task behind."""
    task, cancelled = asyncio.ensure_future(work), asyncio.ensure_future(cancel.wait())
    try:
        await asyncio.wait([task, cancelled], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise PreconditionError(CANCELLED, "the operation was cancelled")
    finally:
        for each in (task, cancelled):
            each.cancel()
        await asyncio.gather(task, cancelled, return_exceptions=True)
