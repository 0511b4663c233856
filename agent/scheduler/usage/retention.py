"""Deletes usage older than the retention time, in batches, so that uploads run in between."""

from __future__ import annotations

import asyncio

import sqlalchemy as sa

from agent.core.errors import HibernodeError
from agent.log import get_logger
from agent.ports import Clock
from agent.scheduler.usage.collector import UsageDatabase
from agent.scheduler.usage.tables import ABSENCES, CONFLICTS, WINDOWS

PRUNE_S = 3600.0
BATCH = 2_000


class UsageRetention:
    """`keep_ns`: retention time, from the start of a window or absence, or a conflict's receipt; 0 keeps everything."""

    def __init__(self, database: UsageDatabase, clock: Clock, keep_ns: int) -> None:
        self._database = database
        self._clock = clock
        self._keep_ns = keep_ns
        self._log = get_logger()

    async def run(self) -> None:
        """Prune every hour until cancelled; a failure is logged."""
        if not self._keep_ns:
            await asyncio.Event().wait()
        while True:
            try:
                deleted = await self.prune()
                if deleted:
                    self._log.info("usage.pruned", rows=deleted)
            except HibernodeError as error:
                self._log.error("usage.prune_failed", reason=error.reason, message=error.message)
            await asyncio.sleep(PRUNE_S)

    async def prune(self) -> int:
        """Delete what is too old; returns the number of rows deleted. Raises what UsageDatabase.run raises."""
        before = self._clock.wall_ns() - self._keep_ns
        deleted = 0
        conflict = (CONFLICTS.c.instance_uid, CONFLICTS.c.seq, CONFLICTS.c.digest)
        absence = (ABSENCES.c.node, ABSENCES.c.since_wall_ns, ABSENCES.c.boot_id)
        away = sa.select(ABSENCES.c.node).where(ABSENCES.c.boot_id == "")
        ended = ABSENCES.c.node.not_in(away)
        for table, key, time, *only in (
            (WINDOWS, (WINDOWS.c.instance_uid, WINDOWS.c.seq), WINDOWS.c.start_wall_ns),
            (CONFLICTS, conflict, CONFLICTS.c.received_wall_ns),
            (ABSENCES, absence, ABSENCES.c.since_wall_ns, ended),
        ):
            oldest = sa.select(*key).where(time < before, *only).order_by(time).limit(BATCH)
            statement = sa.delete(table).where(sa.tuple_(*key).in_(oldest))
            while True:
                count = await self._database.run(lambda statement=statement: self._delete(statement))  # type: ignore[misc]
                deleted += count
                if count < BATCH:
                    break
        return deleted

    def _delete(self, statement: sa.Delete) -> int:
        with self._database.engine.begin() as connection:
            return connection.execute(statement).rowcount
