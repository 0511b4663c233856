"""Wake calls to agents: unary, with a deadline, a bounded number per node at once.

The answer frees the instance's slots in the dispatcher before the agent's next report would. A call that finds nobody
makes the node suspect, as a failed connection of the gateway does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from agent.core.dispatch_events import Event, Wake, WakeAnswered, WakeFailed
from agent.core.errors import HibernodeError, UnavailableError
from agent.core.types import SECOND_NS
from agent.log import get_logger
from agent.scheduler.links import Links
from agent.v1.instance_service_pb2 import WakeInstanceRequest

WAKE_TIMEOUT_S = 60.0
"""Longest wake, the wait for a GPU included: queueTimeout's default, for then nobody waits for it any more."""
PER_NODE = 64
"""Wakes at once on one node; further ones wait here."""
UNREACHABLE = "UNREACHABLE"

_log = get_logger()


@dataclass(slots=True)
class WakeCounts:
    """For the metrics."""

    asked: int = 0
    failed: int = 0


class Wakes:
    """Starts Wake calls and reports how they end through `tell`."""

    def __init__(
        self,
        links: Links,
        tell: Callable[[Event], None],
        unreachable: Callable[[str], None],
        hold_ns: int,
        timeout_s: float = WAKE_TIMEOUT_S,
        per_node: int = PER_NODE,
    ) -> None:
        self._links = links
        self._tell = tell
        self._unreachable = unreachable
        self._hold_ns = hold_ns
        self._timeout_s = timeout_s
        self._per_node = per_node
        self._gates: dict[str, asyncio.Semaphore] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.counts = WakeCounts()

    def ask(self, wake: Wake) -> None:
        """Begin one; returns at once."""
        self.counts.asked += 1
        task = asyncio.get_running_loop().create_task(self._run(wake))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Cancel what is under way: the agents go on, nobody listens."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, wake: Wake) -> None:
        gate = self._gates.setdefault(wake.node, asyncio.Semaphore(self._per_node))
        request = WakeInstanceRequest(uid=wake.uid, hold_ns=self._hold_ns, timeout_ns=int(self._timeout_s * SECOND_NS))
        try:
            async with asyncio.timeout(self._timeout_s + 1), gate:
                channel = self._links.channel(wake.node)
                await channel.call(channel.instances.WakeInstance, request, self._timeout_s)
        except (HibernodeError, TimeoutError) as error:
            self._failed(wake, error)
        else:
            self._tell(WakeAnswered(wake.uid))

    def _failed(self, wake: Wake, error: HibernodeError | TimeoutError) -> None:
        self.counts.failed += 1
        reason = error.reason if isinstance(error, HibernodeError) else "WAKE_TIMEOUT"
        _log.warning("wake.failed", uid=wake.uid, node=wake.node, reason=reason, message=str(error))
        if isinstance(error, UnavailableError) and error.reason == UNREACHABLE:
            self._unreachable(wake.node)
        self._tell(WakeFailed(wake.uid))
