"""A log of what ran: a watcher notes from when to when the process of each instance lived, on which node."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import psutil

from tests.e2e.fleet_world import Fleet

LOOK_S = 0.05


@dataclass
class Life:
    """One instance's process, in CLOCK_MONOTONIC ns. `born_ns` is the start of its process; `seen_ns`: when it was
    last alive; `gone_ns`: when it was first found dead, 0 while it lives."""

    node: str
    process: psutil.Process
    born_ns: int
    seen_ns: int
    gone_ns: int = 0


@dataclass
class LifeLog:
    lives: dict[str, Life] = field(default_factory=dict)

    async def learn(self, fleet: Fleet) -> None:
        """Ask the agents that answer for instances not known yet."""
        for name, node in fleet.nodes.items():
            with suppress(Exception):  # its agent is killed now
                for one in await node.instances():
                    if one.pid and one.uid not in self.lives:
                        process = psutil.Process(one.pid)
                        age_ns = round((time.time() - process.create_time()) * 1e9)
                        now = time.monotonic_ns()
                        self.lives[one.uid] = Life(name, process, now - age_ns, now)

    def look(self) -> None:
        """Note who is alive."""
        for life in self.lives.values():
            if not life.gone_ns:
                alive = life.process.is_running() and life.process.status() != psutil.STATUS_ZOMBIE
                now = time.monotonic_ns()
                if alive:
                    life.seen_ns = now
                else:
                    life.gone_ns = now


@asynccontextmanager
async def watching(fleet: Fleet) -> AsyncIterator[LifeLog]:
    """Watch all instances during the block."""
    log = LifeLog()

    async def watch() -> None:
        while True:
            await log.learn(fleet)
            with suppress(psutil.NoSuchProcess):
                log.look()
            await asyncio.sleep(LOOK_S)

    task = asyncio.create_task(watch())
    try:
        yield log
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
