"""What a node keeps on disk: instance records and the usage ledger, in one SQLite file in WAL mode.

Implements `ports.InstanceStore` and `ports.LedgerStore`. One store per state directory: the daemon's lock on the
directory keeps a second agent away.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from agent.adapters.store import schema as rows
from agent.adapters.store.sqlite_thread import StoreHealth, StoreThread
from agent.core.billing.window import UsageWindow
from agent.core.instance_record import InstanceRecord, UnreadableRecord
from agent.log import get_logger

FILE_NAME = "node.db"
MAX_REPORTED = 1_000
"""Rows of the ledger that are logged as unreadable, each once."""
_log = get_logger()


class NodeStore:
    """`await NodeStore.open(state_dir)`. Every call has `deadline_s` and raises UnavailableError STORE_FAILED."""

    def __init__(self, thread: StoreThread) -> None:
        self._thread = thread
        self._reported: set[tuple[object, ...]] = set()

    @classmethod
    async def open(
        cls, state_dir: Path, *, deadline_s: float = 5.0, queue_length: int = 256, max_bytes: int = 0
    ) -> NodeStore:
        """Open or create `<state_dir>/node.db` (mode 0600) and migrate it. The directory must exist. `max_bytes` bounds
        the file (0: only the disk does); beyond it writes fail as on a full disk."""
        thread = StoreThread(
            state_dir / FILE_NAME, deadline_s=deadline_s, queue_length=queue_length, max_bytes=max_bytes
        )
        try:
            await thread.run(lambda connection: None)
        except BaseException:
            await thread.close()
            raise
        return cls(thread)

    @property
    def health(self) -> StoreHealth:
        """Whether the last call succeeded."""
        return self._thread.health

    async def close(self) -> None:
        await self._thread.close()

    async def put_instance(self, record: InstanceRecord) -> None:
        """Insert or replace; returns once it is on disk."""
        row = rows.record_row(record)
        await self._thread.run(lambda db: db.execute(rows.PUT_INSTANCE, row), durable=True)

    async def load_instances(self) -> Sequence[InstanceRecord]:
        """Those that can be read."""
        return [rows.record_of(data) for uid, data in await self._records() if not rows.unreadable_record(uid, data)]

    async def unreadable_instances(self) -> Sequence[UnreadableRecord]:
        """The others."""
        found = [rows.unreadable_record(uid, data) for uid, data in await self._records()]
        return [record for record in found if record is not None]

    async def delete_instance(self, uid: str) -> None:
        """Idempotent. The usage windows of the instance stay."""
        statement = "DELETE FROM instances WHERE uid = ?"
        await self._thread.run(lambda db: db.execute(statement, (uid,)), durable=True)

    async def upsert_windows(self, windows: Sequence[UsageWindow]) -> None:
        """Write all in one transaction. A sealed row is left as it is."""
        if not windows:
            return
        values = [rows.window_row(window) for window in windows]
        await self._thread.run(lambda db: db.executemany(rows.UPSERT_WINDOW, values))

    async def last_windows(self) -> Sequence[UsageWindow]:
        """Where a row can't be read, an empty window stands for it, so that no `seq` is used twice."""
        return self._readable(await self._rows(rows.LAST_WINDOWS, ()), stand_in=True)

    async def unacknowledged(self, limit: int) -> Sequence[UsageWindow]:
        """At least one if there is any: rows that can't be read keep nothing behind them from being uploaded."""
        offset = 0
        while True:
            page = await self._rows(rows.UNACKNOWLEDGED, (limit, offset))
            windows = self._readable(page)
            if windows or len(page) < limit:
                return windows
            offset += limit

    async def acknowledge(self, keys: Sequence[tuple[str, int]]) -> None:
        """Ignores keys that are unknown or not sealed."""
        await self._thread.run(lambda db: db.executemany(rows.ACKNOWLEDGE, keys))

    async def refuse(self, keys: Sequence[tuple[str, int]], kept: int = 10_000) -> None:
        """Ignores keys that are unknown, not sealed or acknowledged. One transaction."""

        def refuse(db: sqlite3.Connection) -> None:
            db.executemany(rows.REFUSE, keys)
            db.execute(rows.FORGET_REFUSED, (kept,))

        await self._thread.run(refuse)

    async def read_windows(
        self, instance_uid: str = "", limit: int = 1000, after_rowid: int = 0
    ) -> Sequence[UsageWindow]:
        """In the order of their first write; `instance_uid` "" means all."""
        return await self._windows(rows.READ_WINDOWS, (after_rowid, instance_uid, instance_uid, limit))

    async def prune(self, started_before_wall_ns: int, limit: int = 5_000) -> int:
        """Delete at most `limit` acknowledged windows that started before that time; returns how many were deleted."""
        values = (started_before_wall_ns, limit)
        return await self._thread.run(lambda db: db.execute(rows.PRUNE, values).rowcount)

    async def _records(self) -> list[tuple[str, bytes]]:
        statement = "SELECT uid, record FROM instances ORDER BY uid"
        return await self._thread.run(lambda db: db.execute(statement).fetchall())

    async def _windows(self, query: str, values: tuple[object, ...]) -> list[UsageWindow]:
        """The windows of a query that can be read."""
        return self._readable(await self._rows(query, values))

    async def _rows(self, query: str, values: tuple[object, ...]) -> list[tuple[object, ...]]:
        return await self._thread.run(lambda db: db.execute(query, values).fetchall())

    def _readable(self, page: Sequence[tuple[object, ...]], *, stand_in: bool = False) -> list[UsageWindow]:
        """The windows of rows. A row that is not a window stays in the file, and takes no other with it."""
        found = []
        for row in page:
            try:
                found.append(rows.window_of(row))
            except ValueError as error:
                if row[:2] not in self._reported and len(self._reported) < MAX_REPORTED:
                    self._reported.add(row[:2])
                    _log.error("ledger.row_unreadable", instance=row[0], seq=row[1], error=str(error))
                if stand_in and (empty := rows.empty_window(row)) is not None:
                    found.append(empty)
        return found
