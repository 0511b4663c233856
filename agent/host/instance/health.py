"""Custom health checks: not metered as requests. None runs in a frozen instance; the last has ended before the lock."""

from __future__ import annotations

import asyncio

from agent.core.types import SECOND_NS
from agent.host.instance import hooks
from agent.host.instance.actor import Actor


class HealthProbe:
    """Probes one running instance; `actor.healthy` follows the thresholds of its HealthCheck. A missing answer does not
    count while all slots are taken: no request would be sent there anyway."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor
        self._task: asyncio.Task[None] | None = None

    def resume(self) -> None:
        """Start probing; does nothing without a health check."""
        if self._actor.function.health_check is not None and self._task is None:
            self._task = asyncio.create_task(self._probe(), name=f"health {self._actor.uid}")

    async def pause(self) -> None:
        """Stop probing; returns once no probe is under way."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def reset(self) -> None:
        """Count the instance as healthy, because it is frozen now: if it stayed unhealthy, no request would wake it and
        no probe could find it recovered."""
        self._actor.set_healthy(True)

    async def _probe(self) -> None:
        actor, check = self._actor, self._actor.function.health_check
        assert check is not None
        good = bad = 0
        while actor.pool is not None:
            await asyncio.sleep(check.period_ns / SECOND_NS)
            full = actor.gate.in_flight >= actor.gate.concurrency
            status = await hooks.probe(actor.pool, actor.function, check)
            if full and not status:
                continue  # busy, not unhealthy: its server may take only one request at a time
            if hooks.is_healthy(status):
                good, bad = good + 1, 0
            else:
                good, bad = 0, bad + 1
            if bad >= check.failure_threshold:
                actor.set_healthy(False)
            elif good >= check.success_threshold:
                actor.set_healthy(True)
