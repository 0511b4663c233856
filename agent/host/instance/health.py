"""Custom health checks: operations, not requests. None runs while frozen, and the last has ended before the lock."""

from __future__ import annotations

import asyncio

from agent.core.types import SECOND_NS
from agent.host.instance import hooks
from agent.host.instance.actor import Actor


class HealthProbe:
    """Probes one running instance; `actor.healthy` follows the thresholds of its HealthCheck. Silence while all its
    slots are taken says nothing: nobody else would be sent there anyway, and it is free again right after."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor
        self._task: asyncio.Task[None] | None = None

    def resume(self) -> None:
        """Probe from now on (a no-op without a health check)."""
        if self._actor.function.health_check is not None and self._task is None:
            self._task = asyncio.create_task(self._probe(), name=f"health {self._actor.uid}")

    async def pause(self) -> None:
        """Stop probing; returns when none is under way any more."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def forgive(self) -> None:
        """The instance sleeps. Nothing can be said of it until it is awake again; were it to stay unhealthy, no request
        would ever wake it, and no probe could find that it has recovered."""
        self._actor.set_healthy(True)

    async def _probe(self) -> None:
        actor, check = self._actor, self._actor.function.health_check
        assert check is not None
        good = bad = 0
        while actor.pool is not None:
            await asyncio.sleep(check.period_ns / SECOND_NS)
            full = actor.gate.in_flight >= actor.gate.concurrency
            status = await hooks.probe_status(actor.pool, actor.function, check)
            if full and not status:
                continue  # one that serves a request at a time is silent meanwhile: busy, not ill
            if hooks.is_healthy(status):
                good, bad = good + 1, 0
            else:
                good, bad = 0, bad + 1
            if bad >= check.failure_threshold:
                actor.set_healthy(False)
            elif good >= check.success_threshold:
                actor.set_healthy(True)
