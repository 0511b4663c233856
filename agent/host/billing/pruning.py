"""Deletes usage windows that the scheduler has acknowledged from the disk, a week after they began.

A window that was never acknowledged is not billed anywhere else, so it stays: a node without a scheduler keeps them all
(about 300 bytes each; an instance makes one per minute and one per state change).
"""

from __future__ import annotations

import asyncio

from agent.core.errors import HibernodeError
from agent.core.types import SECOND_NS
from agent.log import get_logger
from agent.ports import Clock, LedgerStore

KEPT_NS = 7 * 24 * 3600 * SECOND_NS
INTERVAL_S = 3600.0
BATCH = 5_000


class LedgerPruner:
    """Prunes until `run` is cancelled. If the store fails, it tries again an interval later."""

    def __init__(self, store: LedgerStore, clock: Clock, interval_s: float = INTERVAL_S) -> None:
        self._store = store
        self._clock = clock
        self._interval_s = interval_s
        self._log = get_logger()

    async def run(self) -> None:
        """Prune now, and then once per interval."""
        while True:
            await self.prune_once()
            await asyncio.sleep(self._interval_s)

    async def prune_once(self) -> int:
        """Delete in small transactions, so that other writes do not wait long; returns the number of windows."""
        before, gone = self._clock.wall_ns() - KEPT_NS, 0
        try:
            while (count := await self._store.prune(before, BATCH)) > 0:
                gone += count
        except HibernodeError as error:
            self._log.warning("ledger.prune_failed", reason=error.reason, message=error.message)
        if gone:
            self._log.info("ledger.pruned", windows=gone)
        return gone
