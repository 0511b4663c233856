"""Forgets usage that is older than somebody wants to keep it, a little at a time: uploads get their turn in between."""

from __future__ import annotations

import asyncio

import sqlalchemy as sa

from agent.core.errors import HibernodeError
from agent.log import get_logger
from agent.ports import Clock
from agent.scheduler.usage.collector import UsageDatabase
from agent.scheduler.usage.tables import CONFLICTS, WINDOWS

LOOK_S = 3600.0
BATCH = 2_000


class UsageRetention:
    """`keep_ns` after its beginning a window may go, a conflict so long after it came; 0 keeps all for ever."""

    def __init__(self, database: UsageDatabase, clock: Clock, keep_ns: int) -> None:
        self._database = database
        self._clock = clock
        self._keep_ns = keep_ns
        self._log = get_logger()

    async def run(self) -> None:
        """Does not return. What fails is tried again at the next look."""
        if not self._keep_ns:
            await asyncio.Event().wait()
        while True:
            try:
                gone = await self.prune()
                if gone:
                    self._log.info("usage.pruned", rows=gone)
            except HibernodeError as error:
                self._log.error("usage.prune_failed", reason=error.reason, message=error.message)
            await asyncio.sleep(LOOK_S)

    async def prune(self) -> int:
        """Delete what is too old now; how many rows. Raises as UsageDatabase.run does."""
        before = self._clock.wall_ns() - self._keep_ns
        gone = 0
        for table, key, time in (
            (WINDOWS, (WINDOWS.c.instance_uid, WINDOWS.c.seq), WINDOWS.c.start_wall_ns),
            (CONFLICTS, (CONFLICTS.c.instance_uid, CONFLICTS.c.seq, CONFLICTS.c.digest), CONFLICTS.c.received_wall_ns),
        ):
            oldest = sa.select(*key).where(time < before).order_by(time).limit(BATCH)
            statement = sa.delete(table).where(sa.tuple_(*key).in_(oldest))
            while True:
                count = await self._database.run(lambda statement=statement: self._delete(statement))  # type: ignore[misc]
                gone += count
                if count < BATCH:
                    break
        return gone

    def _delete(self, statement: sa.Delete) -> int:
        with self._database.engine.begin() as connection:
            return connection.execute(statement).rowcount
