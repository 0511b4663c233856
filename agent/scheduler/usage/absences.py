"""Keeps when nodes were given up, so that their usage of that time is not billed (core/billing/absence.py).

An absence is durable before the node counts as lost, and so before anything is created in its place. It is complete
once the node is back. Until then the collector takes no windows of the node, as it is not known which are billed. Both
survive a kill of the scheduler at any time: an absence without an end goes on until the next return.

If the host was rebooted meanwhile, there are two: in the boot in which it was last heard, to the end of that boot, and
in the one in which it came back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace

import sqlalchemy as sa

from agent.core.billing.absence import Absence
from agent.core.errors import HibernodeError, UnavailableError
from agent.log import get_logger
from agent.scheduler.database.thread import DatabaseThread
from agent.scheduler.usage.tables import ABSENCES

RETRY_S = 1.0
_OPEN = ABSENCES.c.boot_id == ""


class Absences:
    """Writes absences, in order for each node, and retries until they are stored."""

    def __init__(self, database: DatabaseThread) -> None:
        self._database = database
        self._writing: dict[str, asyncio.Lock] = {}
        self._log = get_logger()

    async def unfinished(self) -> dict[str, int]:
        """Since when (wall ns) each node that has not come back is given up. Raises UnavailableError."""
        return await self._database.run(self._unfinished)

    async def begin(self, node: str, since_wall_ns: int, absence: Absence | None = None) -> None:
        """Note that a node is given up from now on, unless that is noted already. `absence`: in the boot in which it
        was last heard."""

        def write(connection: sa.Connection) -> None:
            if connection.execute(sa.select(ABSENCES.c.node).where(ABSENCES.c.node == node, _OPEN)).first() is None:
                _put(connection, node, since_wall_ns, Absence("", 0, 0))
                if absence is not None:
                    _put(connection, node, since_wall_ns, absence)

        await self._write(node, write)

    async def end(self, node: str, wall_ns: int, absence: Absence | None) -> None:
        """Note for how long the node was given up; None = it cannot be said, and nothing is left out of its bill."""

        def write(connection: sa.Connection, absence: Absence | None = absence) -> None:
            of_node = sa.and_(ABSENCES.c.node == node, _OPEN)
            since = connection.execute(sa.select(ABSENCES.c.since_wall_ns).where(of_node)).scalar()
            connection.execute(sa.delete(ABSENCES).where(of_node))
            began = wall_ns if since is None else since
            if absence is None:
                connection.execute(sa.delete(ABSENCES).where(_of(node, began)))
                return
            noted = sa.and_(_of(node, began), ABSENCES.c.boot_id == absence.boot_id)
            start_ns = connection.execute(sa.select(ABSENCES.c.from_mono_ns).where(noted)).scalar()
            if start_ns is not None:  # in the same boot: noted then, so that no step of a clock has moved it
                absence = replace(absence, start_mono_ns=int(start_ns))
            _put(connection, node, began, absence)

        await self._write(node, write)

    async def _write(self, node: str, write: Callable[[sa.Connection], None]) -> None:
        def transaction() -> None:
            with self._database.engine.begin() as connection:
                write(connection)

        async with self._writing.setdefault(node, asyncio.Lock()):
            while True:
                try:
                    return await self._database.run(transaction)
                except HibernodeError as error:
                    self._log.error("usage.absence_failed", node=node, reason=error.reason, message=error.message)
                await asyncio.sleep(RETRY_S)

    def _unfinished(self) -> dict[str, int]:
        with self._database.engine.connect() as connection:
            rows = connection.execute(sa.select(ABSENCES.c.node, ABSENCES.c.since_wall_ns).where(_OPEN))
            return {str(node): int(since) for node, since in rows}


def absences_of(connection: sa.Connection, node: str, boot_ids: Iterable[str]) -> list[Absence]:
    """The absences of the node in these boots. Raises UnavailableError NODE_GIVEN_UP while one has no end."""
    rows = connection.execute(
        sa.select(ABSENCES).where(ABSENCES.c.node == node, ABSENCES.c.boot_id.in_(["", *boot_ids]))
    ).mappings()
    found = [Absence(row["boot_id"], row["from_mono_ns"], row["to_mono_ns"]) for row in rows]
    if any(not absence.boot_id for absence in found):
        text = f"node {node} was given up; its usage is taken once its load stream is back for a second"
        raise UnavailableError("NODE_GIVEN_UP", text, node=node)
    return found


def _put(connection: sa.Connection, node: str, since_wall_ns: int, absence: Absence) -> None:
    same = sa.and_(_of(node, since_wall_ns), ABSENCES.c.boot_id == absence.boot_id)
    connection.execute(sa.delete(ABSENCES).where(same))
    connection.execute(
        sa.insert(ABSENCES).values(
            node=node,
            since_wall_ns=since_wall_ns,
            boot_id=absence.boot_id,
            from_mono_ns=absence.start_mono_ns,
            to_mono_ns=absence.end_mono_ns,
        )
    )


def _of(node: str, since_wall_ns: int) -> sa.ColumnElement[bool]:
    return sa.and_(ABSENCES.c.node == node, ABSENCES.c.since_wall_ns == since_wall_ns)
