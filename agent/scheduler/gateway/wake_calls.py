"""Wake calls to agents: each with a deadline, and a bounded number per node at a time.

They go to the ingress, on the connections that requests use, because requests wait for them and the same call by gRPC
(InstanceService.WakeInstance) takes four times as long. The answer frees the instance's slots in the dispatcher before
the agent's next report does. A call that cannot connect makes the node suspect, just as a request does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from agent.core.dispatch.events import Event, Wake, WakeAnswered, WakeFailed
from agent.core.errors import HibernodeError, PreconditionError, UnavailableError
from agent.core.types import MILLISECOND_NS
from agent.http import hop_headers
from agent.http.errors import ConnectFailedError, UpstreamBrokenError
from agent.http.message import Header
from agent.http.pool import Pool, Response
from agent.log import get_logger
from agent.scheduler.gateway.ingress_pools import EXHAUSTED

WAKE_TIMEOUT_S = 60.0
"""Longest wake, the wait for a GPU included. It is the default queueTimeout: after that no request waits."""
PER_NODE = 64
"""How many wake calls a node gets at a time; further ones wait here."""
SLACK_S = 1.0
"""Added to the agent's own deadline."""

_log = get_logger()


@dataclass(slots=True)
class WakeCounts:
    asked: int = 0
    failed: int = 0


class WakeCalls:
    """Starts wake calls and reports how they end to the dispatcher through `apply_event`."""

    def __init__(
        self,
        pool_of: Callable[[str], Pool | None],
        token_of: Callable[[str], bytes],
        apply_event: Callable[[Event], None],
        unreachable: Callable[[str], None],
        hold_ns: int,
        timeout_s: float = WAKE_TIMEOUT_S,
        per_node: int = PER_NODE,
    ) -> None:
        """`pool_of`, `token_of`: those of a node's ingress. `unreachable` gets a node that cannot be connected to."""
        self._pool_of = pool_of
        self._token_of = token_of
        self._apply_event = apply_event
        self._unreachable = unreachable
        self._hold_ns = hold_ns
        self._timeout_s = timeout_s
        self._per_node = per_node
        self._semaphores: dict[str, asyncio.Semaphore] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.counts = WakeCounts()

    def start(self, wake: Wake) -> None:
        self.counts.asked += 1
        task = asyncio.get_running_loop().create_task(self._run(wake))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Cancel the calls in progress; the wakes themselves go on."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, wake: Wake) -> None:
        semaphore = self._semaphores.setdefault(wake.node, asyncio.Semaphore(self._per_node))
        try:
            async with asyncio.timeout(self._timeout_s + 2 * SLACK_S), semaphore:
                await self._call(wake)
        except Exception as error:  # any error: without an event the instance would be waking for ever
            self._failed(wake, error)
        else:
            self._apply_event(WakeAnswered(wake.uid))

    async def _call(self, wake: Wake) -> None:
        """Raises unless the instance is awake."""
        pool = self._pool_of(wake.node)
        if pool is None:
            raise UnavailableError("NODE_UNKNOWN", f"node {wake.node} has not registered with this scheduler")
        headers = [
            (hop_headers.TOKEN, self._token_of(wake.node)),
            (hop_headers.INSTANCE, wake.uid.encode()),
            (hop_headers.WAKE_HOLD_MS, b"%d" % (self._hold_ns // MILLISECOND_NS)),
            (hop_headers.DEADLINE_MS, b"%d" % int(self._timeout_s * 1000)),
        ]
        try:
            response = await self._post(pool, headers)
        except UpstreamBrokenError:  # an idle connection may close just as it is used; a wake can be asked for twice
            response = await self._post(pool, headers, fresh=True)
        if response.status != 200:
            refused = [value for name, value in response.headers if name == hop_headers.REFUSED]
            text = response.body[:300].decode(errors="replace")
            reason = refused[0].decode("latin-1") if refused else "WAKE_REFUSED"
            raise PreconditionError(reason, f"the agent answered {response.status} {text}")

    async def _post(self, pool: Pool, headers: list[Header], *, fresh: bool = False) -> Response:
        return await pool.request(
            b"POST", hop_headers.WAKE_PATH, headers, timeout_s=self._timeout_s + SLACK_S, fresh=fresh
        )

    def _failed(self, wake: Wake, error: Exception) -> None:
        self.counts.failed += 1
        reason = "WAKE_TIMEOUT" if isinstance(error, TimeoutError) else type(error).__name__
        if isinstance(error, HibernodeError):
            reason = error.reason
        _log.warning("wake.failed", uid=wake.uid, node=wake.node, reason=reason, message=str(error))
        if isinstance(error, ConnectFailedError) and error.reason != EXHAUSTED:
            self._unreachable(wake.node)
        self._apply_event(WakeFailed(wake.uid))
