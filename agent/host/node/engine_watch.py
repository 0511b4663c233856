"""Follows the container engine: says when it is away and when it is back, and removes then what could not be removed.

Instances need no engine to live, sleep, wake and die: processes, cgroups and the driver do. It is needed to pull,
create and remove. So nothing is done to them while it is away; creates are refused by the runtime, with its reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from agent.core.errors import HibernodeError
from agent.core.types import Handle
from agent.host.instance.events import EventLog
from agent.host.node.node import Node
from agent.log import get_logger
from agent.ports import Runtime

LOOK_S = 5.0
BACK_OFF_MIN_S = 1.0
BACK_OFF_MAX_S = 10.0
SWEEP_EVERY = 3
"""Looks between two sweeps while all is well: what an engine that was away for a moment only could not remove."""


class Engine(Protocol):
    """The part of the engine's runtime that is watched."""

    async def check(self) -> None:
        """Ask whether it answers. Raises HibernodeError ENGINE_UNAVAILABLE, ENGINE_TOO_OLD ..."""


class EngineWatch:
    """`run` until cancelled. `told` is called after the first look and whenever the engine came or went. `pause` waits
    between looks; tests give their own."""

    def __init__(
        self,
        engine: Engine,
        runtime: Runtime,
        node: Node,
        events: EventLog,
        told: Callable[[], Awaitable[None]],
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._engine = engine
        self._runtime = runtime
        self._node = node
        self._events = events
        self._told = told
        self._pause = pause
        self._log = get_logger()
        self.problem = ""
        """Why the engine can't be used now; "" while it can."""

    async def run(self) -> None:
        """Look every few seconds, less often while it stays away."""
        back_off, looks, fine = BACK_OFF_MIN_S, 0, 0
        while True:
            was = self.problem
            await self.look()
            if not looks or bool(was) is not bool(self.problem):
                await self._told()
            looks += 1
            if self.problem:
                await self._pause(back_off)
                back_off = min(2 * back_off, BACK_OFF_MAX_S)
                continue
            if was or fine % SWEEP_EVERY == 0:
                await self.sweep()
            back_off, fine = BACK_OFF_MIN_S, fine + 1
            await self._pause(LOOK_S)

    async def look(self) -> None:
        """One question; an event where the answer differs from the last."""
        try:
            await self._engine.check()
            problem = ""
        except HibernodeError as error:
            problem = f"{error.reason}: {error.message}"
        was, self.problem = self.problem, problem
        if problem and not was:
            self._events.add("", "engine.down", f"{problem}; instances go on, new ones have to wait")
        elif was and not problem:
            self._events.add("", "engine.up", "the container engine answers again")

    async def sweep(self) -> None:
        """Remove containers of ours that no living instance stands behind: their end could not be finished."""
        try:
            handles = await self._runtime.list_handles()
        except (HibernodeError, OSError) as error:
            self._log.warning("engine.sweep_failed", error=str(error))
            return
        for handle in handles:
            if handle.container_id and handle.uid not in self._node.actors:
                await self._remove(handle)

    async def _remove(self, handle: Handle) -> None:
        try:
            await self._runtime.kill(handle)
            await self._runtime.destroy(handle)
        except (HibernodeError, OSError) as error:
            self._log.warning("engine.leftover_stays", instance=handle.uid, error=str(error))
            return
        self._events.add(handle.uid, "instance.leftover_removed", "its container was still there")
