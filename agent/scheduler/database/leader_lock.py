"""The leader lock: an advisory lock in PostgreSQL, whose holder is the active one of several schedulers.

The lock belongs to a session and ends with it, so that it needs no cleanup. Its holder checks every second that the
session is alive and otherwise terminates, since another scheduler may be active by then. Both sides notice a vanished
peer within seconds (engine.py), the scheduler before the server. A pooler that shares sessions between statements
(pgbouncer's transaction mode) is detected and ends the lead.

On SQLite the lock on the state directory keeps a second scheduler out, and this one is always held.
"""

from __future__ import annotations

import asyncio

import sqlalchemy as sa

from agent.core.errors import UnavailableError
from agent.log import get_logger
from agent.scheduler.database.engine import engine_of
from agent.scheduler.database.thread import DatabaseThread

POLL_S = 1.0
DEADLINE_S = 4.0
"""Of a check. With the second between checks it is less than the server takes to give the lock to another scheduler."""
_KEY = int.from_bytes(b"hibernod", "big")
_TAKE = sa.text("SELECT pg_try_advisory_lock(:key)").bindparams(sa.bindparam("key", _KEY, sa.BigInteger))
_HELD = sa.text(
    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() AND granted"
    " AND (classid::bigint << 32 | objid::bigint) = :key AND objsubid = 1"
).bindparams(sa.bindparam("key", _KEY, sa.BigInteger))


class LeaderLock:
    """One lock per database. All statements run in one thread, on one connection."""

    def __init__(self, url: str, *, poll_s: float = POLL_S, deadline_s: float = DEADLINE_S) -> None:
        self._engine = engine_of(url, poolclass=sa.pool.NullPool)
        self._sqlite = self._engine.dialect.name == "sqlite"
        self._poll_s = poll_s
        self._connection: sa.Connection | None = None
        self._database = DatabaseThread(self._engine, "lead", "the scheduler's database", deadline_s)
        self._log = get_logger()

    async def take(self) -> bool:
        """Try to become the active scheduler; returns whether this one is. Raises UnavailableError STORE_FAILED."""
        return self._sqlite or await self._database.run(self._try_lock)

    async def wait(self) -> None:
        """Return once this scheduler is the active one. An unavailable database is retried."""
        logged = ""
        while True:
            try:
                if await self.take():
                    return
                logged = ""
            except UnavailableError as error:
                if logged != error.message:
                    self._log.warning("scheduler.standby_cannot_ask", reason=error.reason, message=error.message)
                logged = error.message
            await asyncio.sleep(self._poll_s)

    async def watch(self) -> None:
        """Run until cancelled. Raises UnavailableError LEAD_LOST once another scheduler may be the active one."""
        if self._sqlite:
            await asyncio.Event().wait()
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                held = await self._database.run(self._is_held)
                problem = "" if held else "another session took its place; a pooler has to keep sessions"
            except UnavailableError as error:
                problem = error.message
            if problem:
                text = f"this scheduler's lock in the database may be gone: {problem}. Start it again: it stands by"
                raise UnavailableError("LEAD_LOST", text)

    def close(self) -> None:
        self._database.close(self._end)

    def _try_lock(self) -> bool:
        try:
            if self._connection is None:
                # Without transactions, so that none stays open as long as the session.
                self._connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
                self._connection.execute(sa.text("SET statement_timeout = '3s'"))
            return bool(self._connection.execute(_TAKE).scalar())
        except BaseException:
            self._end()  # the next attempt gets a new session
            raise

    def _is_held(self) -> bool:
        assert self._connection is not None
        return self._connection.execute(_HELD).scalar() == 1

    def _end(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.invalidate()
            connection.close()
