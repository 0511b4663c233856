"""Cordon, drain and uncordon: what operators ask of nodes. Stored before it takes effect."""

from __future__ import annotations

import asyncio

from agent.core.errors import NotFoundError
from agent.core.provisioning.model import Scheduling
from agent.event_log import EventLog
from agent.scheduler.database.store import Store
from agent.scheduler.fleet.fleet import Fleet


class NodeScheduling:
    """Changes one node at a time; reads go to the fleet."""

    def __init__(self, store: Store, fleet: Fleet, events: EventLog) -> None:
        self._store = store
        self._fleet = fleet
        self._events = events
        self._writing = asyncio.Lock()
        self._unconfirmed: set[str] = set()  # the store may hold their last write or the one before

    async def load(self) -> None:
        """Read the store; call once, before a node reports."""
        for name, value in (await self._store.node_scheduling()).items():
            if value in Scheduling.__members__:
                self._fleet.set_scheduling(name, Scheduling(value))
            else:  # of another version: somebody wants something other than normal use
                self._events.error("node.scheduling_unreadable", node=name, scheduling=value)
                self._fleet.set_scheduling(name, Scheduling.CORDONED)

    async def put(self, name: str, scheduling: Scheduling) -> None:
        """Store and apply it. Raises NotFoundError NODE_NOT_FOUND, UnavailableError STORE_FAILED."""
        async with self._writing:
            if self._fleet.node(name) is None:
                text = f"no node {name[:64]!r} has ever registered here; `hibernode node --fleet` lists the nodes"
                raise NotFoundError("NODE_NOT_FOUND", text)
            if self._fleet.scheduling(name) is scheduling and name not in self._unconfirmed:
                return
            self._unconfirmed.add(name)
            await self._store.put_node_scheduling(name, None if scheduling is Scheduling.NORMAL else scheduling.value)
            self._unconfirmed.discard(name)
            self._fleet.set_scheduling(name, scheduling)
            self._events.info("node.scheduling", node=name, scheduling=scheduling.value)
