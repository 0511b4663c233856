"""Polls the container engine: reports when it goes down or comes back, and removes leftover containers while it is up.

Instances need no engine to run, freeze, wake and end; processes, cgroups and the driver are enough. The engine is
needed to pull, create, remove, log and exec. So while it is down instances are left alone and creates are refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from agent.core.errors import HibernodeError
from agent.event_log import EventLog
from agent.host.node.node import Node
from agent.log import get_logger
from agent.ports import ContainerEngine, Runtime

POLL_S = 5.0
BACK_OFF_MIN_S = 1.0
BACK_OFF_MAX_S = 10.0
SWEEP_EVERY = 3
"""Polls per sweep while the engine is up: an outage too short for a poll to notice may have left containers."""


class EngineWatch:
    """Polls until `run` is cancelled.

    - `on_change`: called after the first poll, and whenever the engine has gone down or come back.
    - `pause`: waits between polls; tests pass their own.
    """

    def __init__(
        self,
        engine: ContainerEngine,
        runtime: Runtime,
        node: Node,
        events: EventLog,
        on_change: Callable[[], Awaitable[None]],
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._engine = engine
        self._runtime = runtime
        self._node = node
        self._events = events
        self._on_change = on_change
        self._pause = pause
        self._log = get_logger()
        self.problem = ""
        """Why the engine can't be used now, "" if it can."""

    async def run(self) -> None:
        """Poll every few seconds, less often while the engine stays down."""
        back_off, polls, up = BACK_OFF_MIN_S, 0, 0
        while True:
            was = self.problem
            await self.poll()
            if not polls or bool(was) is not bool(self.problem):
                await self._on_change()
            polls += 1
            if self.problem:
                await self._pause(back_off)
                back_off = min(2 * back_off, BACK_OFF_MAX_S)
                continue
            if was or up % SWEEP_EVERY == 0:
                await self.sweep()
            back_off, up = BACK_OFF_MIN_S, up + 1
            await self._pause(POLL_S)

    async def poll(self) -> None:
        """Check the engine once; add an event if it has gone down or come back."""
        try:
            await self._engine.check()
            problem = ""
        except HibernodeError as error:
            problem = f"{error.reason}: {error.message}"
        was, self.problem = self.problem, problem
        if problem and not was:
            self._events.add("", "engine.down", f"{problem}; instances run on, new ones must wait")
        elif was and not problem:
            self._events.add("", "engine.up", "the container engine answers again")

    async def sweep(self) -> None:
        """Remove containers of ours that belong to no living instance: their removal failed earlier."""
        try:
            handles = await self._runtime.list_handles()
        except (HibernodeError, OSError) as error:
            self._log.warning("engine.sweep_failed", error=str(error))
            return
        for handle in handles:
            if not handle.container_id or handle.uid in self._node.actors:
                continue
            try:
                await self._runtime.kill(handle)
                await self._runtime.destroy(handle)
            except (HibernodeError, OSError) as error:
                self._log.warning("engine.leftover_stays", instance=handle.uid, error=str(error))
            else:
                self._events.add(handle.uid, "instance.leftover_removed", "its container was still there")
