"""A pool of keep-alive connections to each agent's ingress, at the address it registered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from agent.http.limits import UpstreamLimits
from agent.http.pool import Pool
from agent.wire import addresses

EXHAUSTED = "UPSTREAM_CONNECTIONS_EXHAUSTED"
"""Reason of the one ConnectFailedError that does not make the node suspect: the pool is at its own limit."""
LIMITS = UpstreamLimits(
    max_connections=8192, max_idle=512, connect_timeout_s=2.0, silence_s=10.0, header_bytes=40 * 1024
)
"""`header_bytes`: what an instance may send, plus what the ingress adds (x-fc-log-result: 5.5 KiB). Leases bound the
connections; `max_connections` is far above, in case of a leak. A request in flight at a host that has gone silent is
answered 502 after `silence_s`, and is never sent again (agent/docs/design.md)."""


@dataclass(frozen=True, slots=True)
class IngressPool:
    """The pool to the ingress at `address`."""

    address: str
    pool: Pool


class IngressPools:
    """Pools by node. `address_of` gives a node's registered ingress, "" while it is unknown."""

    def __init__(self, address_of: Callable[[str], str], limits: UpstreamLimits = LIMITS) -> None:
        self._address_of = address_of
        self._limits = limits
        self._ingresses: dict[str, IngressPool] = {}
        self._old: list[Pool] = []

    def pool(self, node: str) -> Pool | None:
        """The pool to a node's ingress; None before its first registration.

        Once the agent has registered another address, requests in flight at the old one still run to their end.
        """
        address = self._address_of(node)
        found = self._ingresses.get(node)
        if found is not None and found.address == address:
            return found.pool
        if not address:
            return None
        if found is not None:
            found.pool.retire()
            self._old = [pool for pool in self._old if pool.connections]
            self._old.append(found.pool)
        host, port = addresses.split(address)
        pool = Pool(host, port, self._limits)
        self._ingresses[node] = IngressPool(address, pool)
        return pool

    def close(self) -> None:
        for pool in [*self._old, *(one.pool for one in self._ingresses.values())]:
            pool.close()
