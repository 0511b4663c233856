"""What the operations of every instance of a node share, and how one of them is cut short."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from agent.core.errors import HibernodeError, PreconditionError
from agent.core.lifecycle.machine import CANCELLED
from agent.core.types import Handle
from agent.host.instance.events import EventLog
from agent.host.instance.memory_reservations import MemoryReservations
from agent.http.errors import RequestIds
from agent.ports import Clock, Freezer, InstanceStore, Runtime

_T = TypeVar("_T")

REMOVED_LATER = frozenset({"ENGINE_UNAVAILABLE", "REMOVE_FAILED"})


@dataclass(frozen=True, slots=True)
class InstanceContext:
    """The ports and the settings. `gpu_models`: the host's GPUs, uuid -> model. `store_problem` says why the store
    fails, "" while it works: no freeze begins without it (DESIGN section 4)."""

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
    store_problem: Callable[[], str] = lambda: ""

    async def remove(self, handle: Handle) -> None:
        """Of one that is dead, what is left. What its engine can't remove now, away or busy, holds nothing but a name:
        `EngineWatch` removes it later. Raises as `Runtime.destroy` does for all else."""
        try:
            await self.runtime.destroy(handle)
        except HibernodeError as error:
            if error.reason not in REMOVED_LATER:
                raise
            self.events.add(handle.uid, "instance.removal_postponed", error.message)


async def unless_cancelled(work: Coroutine[Any, Any, _T], cancel: asyncio.Event) -> _T:
    """Do `work` to its end, or give it up when `cancel` is set: then PreconditionError CANCELLED. Leaves no task."""
    task, asked = asyncio.ensure_future(work), asyncio.ensure_future(cancel.wait())
    try:
        await asyncio.wait([task, asked], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise PreconditionError(CANCELLED, "it was not needed any more")
    finally:
        for each in (task, asked):
            each.cancel()
        await asyncio.gather(task, asked, return_exceptions=True)
