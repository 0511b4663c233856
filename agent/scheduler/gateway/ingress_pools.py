"""One pool of keep-alive connections per agent's ingress, to the address it registered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from agent.http.limits import UpstreamLimits
from agent.http.pool import Pool
from agent.wire import addresses

LIMITS = UpstreamLimits(
    max_connections=8192, max_idle=512, connect_timeout_s=2.0, silence_s=10.0, header_bytes=40 * 1024
)
"""Heads: as large as an instance may send, and what the ingress adds to them (x-fc-log-result: 5.5 KiB). Leases bound
the connections; this bound is far above, for the case that something leaks. A request inside a host that has gone
silent is answered 502 after 10 s (DESIGN section 9), and is never sent again."""


@dataclass(frozen=True, slots=True)
class IngressPool:
    """Where a node takes requests. The token is kept as the header it travels in."""

    address: str
    pool: Pool


class IngressPools:
    """Pools by node. `address_of` gives a node's registered ingress, "" while unknown."""

    def __init__(self, address_of: Callable[[str], str], limits: UpstreamLimits = LIMITS) -> None:
        self._address_of = address_of
        self._limits = limits
        self._ingresses: dict[str, IngressPool] = {}
        self._old: list[Pool] = []

    def pool(self, node: str) -> Pool | None:
        """The pool to a node's ingress; None before its first registration.

        When the agent came back at another address, requests in flight at the old one end in their own time.
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
        """Cuts everything."""
        for pool in [*self._old, *(one.pool for one in self._ingresses.values())]:
            pool.close()
