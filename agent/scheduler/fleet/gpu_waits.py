"""Why a function's instances don't get a GPU: for the answer to a request that waited too long."""

from __future__ import annotations

from agent.core.gpu_holders import held_by, holders
from agent.core.types import SECOND_NS
from agent.ports import Clock
from agent.scheduler.fleet.fleet import Fleet
from agent.wire.gpu_users import gpu_user

FRESH_NS = SECOND_NS
"""All requests that time out within this time share one look at the fleet."""


class GpuWaits:
    """Answers from the last reports of the nodes."""

    def __init__(self, fleet: Fleet, clock: Clock) -> None:
        self._fleet = fleet
        self._clock = clock
        self._looked_ns = -FRESH_NS
        self._why: dict[str, str] = {}

    def why(self, function: str) -> str:
        """Who holds the GPU that an instance of the function waits for; "" if none waits for one."""
        now_ns = self._clock.monotonic_ns()
        if now_ns - self._looked_ns >= FRESH_NS:
            self._looked_ns = now_ns
            self._why = self._look()
        return self._why.get(function, "")

    def _look(self) -> dict[str, str]:
        users = [user for node, load in self._fleet.instances() if (user := gpu_user(load, node.name)) is not None]
        functions = {user.uid: user.function for user in users}
        now_ns = self._clock.wall_ns()
        return {functions[uid]: held_by(holder, now_ns) for uid, holder in holders(users).items()}
