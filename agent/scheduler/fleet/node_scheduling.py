"""What operators ask of nodes: cordon, drain, use again. Kept in the store, and durable before it is in effect."""

from __future__ import annotations

import asyncio

from agent.core.errors import NotFoundError
from agent.core.provisioning.reconcile import Scheduling
from agent.log import get_logger
from agent.scheduler.database.store import Store
from agent.scheduler.fleet.fleet import Fleet

_log = get_logger()


class NodeScheduling:
    """Changes it one at a time; the fleet is where it is read."""

    def __init__(self, store: Store, fleet: Fleet) -> None:
        self._store = store
        self._fleet = fleet
        self._writing = asyncio.Lock()
        self._unsure: set[str] = set()  # their last write was never confirmed: nobody knows what is stored

    async def load(self) -> None:
        """Read the store; call once, before a node is heard."""
        for name, value in (await self._store.node_scheduling()).items():
            self._fleet.schedule(name, Scheduling(value))

    async def put(self, name: str, scheduling: Scheduling) -> None:
        """From now on, and after a restart. Raises NotFoundError NODE_NOT_FOUND, UnavailableError STORE_FAILED."""
        async with self._writing:
            if self._fleet.node(name) is None:
                text = f"no node {name[:64]!r} has ever registered here; `hibernode node --fleet` lists them"
                raise NotFoundError("NODE_NOT_FOUND", text)
            if self._fleet.scheduling(name) is scheduling and name not in self._unsure:
                return
            self._unsure.add(name)
            await self._store.put_node_scheduling(name, None if scheduling is Scheduling.NORMAL else scheduling.value)
            self._unsure.discard(name)
            self._fleet.schedule(name, scheduling)
            _log.info("node.scheduling", node=name, scheduling=scheduling.value)
