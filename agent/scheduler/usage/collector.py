"""Stores each usage window of the agents exactly once; conflicting duplicates are kept and reported."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from agent.core.billing.absence import without_absences
from agent.core.billing.window import UsageWindow
from agent.core.errors import InvalidArgumentError
from agent.log import get_logger
from agent.ports import Clock
from agent.scheduler.database.engine import engine_of, make_private
from agent.scheduler.database.thread import DatabaseThread
from agent.scheduler.usage.absences import absences_of
from agent.scheduler.usage.tables import CONFLICTS, USAGE_METADATA, WINDOWS, digest_of, payload_of, row_of

MAX_BATCH = 2_000
MAX_CONFLICTS_PER_KEY = 8
"""Different payloads kept for one window, besides the first."""
_LARGEST = (1 << 63) - 1
_CHUNK = 200
"""Keys in one SELECT: far below SQLite's limits on variables and expression depth."""

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class RejectedWindow:
    """A window that was not stored, and why: USAGE_FOREIGN_NODE, USAGE_FOREIGN_INSTANCE, USAGE_UNSEALED or
    USAGE_INVALID."""

    key: Key
    reason: str


@dataclass(frozen=True, slots=True)
class Accepted:
    """`acks`: windows that the agent may prune. `conflicts`: those of them whose payload differs from the stored one.

    `marks`: by instance, the highest acknowledged `seq` before any refused one.
    """

    acks: tuple[Key, ...]
    conflicts: tuple[Key, ...] = ()
    refused: tuple[RejectedWindow, ...] = ()

    @property
    def marks(self) -> dict[str, int]:
        barrier: dict[str, int] = {}
        for refusal in self.refused:
            uid, seq = refusal.key
            barrier[uid] = min(seq, barrier.get(uid, seq))
        marks: dict[str, int] = {}
        for uid, seq in self.acks:
            if seq < barrier.get(uid, _LARGEST):
                marks[uid] = max(seq, marks.get(uid, seq))
        return marks


class UsageDatabase(DatabaseThread):
    @classmethod
    def at(cls, url: str) -> UsageDatabase:
        """The database at a SQLAlchemy URL, with its own engine. SQLite uses WAL, and a new file gets mode 0600."""
        return cls(engine_of(url))

    def __init__(self, engine: sa.Engine, *, deadline_s: float = 10.0, queue_length: int = 64) -> None:
        hint = "; a report on a shorter time (--since, --until) may be answered"
        super().__init__(
            engine, "usage", "the usage database", deadline_s, timeout_hint=hint, queue_length=queue_length
        )

    async def open(self) -> None:
        await self.run(self._open)

    def _open(self) -> None:
        make_private(self.engine)
        USAGE_METADATA.create_all(self.engine)


class UsageCollector:
    def __init__(
        self,
        database: UsageDatabase,
        clock: Clock,
        owner_of: Callable[[str], str] = lambda _: "",
        stored: Callable[[Sequence[UsageWindow]], None] = lambda _: None,
    ) -> None:
        """`owner_of`: the node that reports an instance, which alone may upload its usage; "" if none does. `stored`
        gets new windows, on the loop, once they are durable."""
        self._database = database
        self._clock = clock
        self._owner_of = owner_of
        self._stored = stored
        self._log = get_logger()

    async def accept(self, node: str, windows: Sequence[UsageWindow], unreadable: Sequence[Key] = ()) -> Accepted:
        """Store the windows that `node` (the name its credential proves) uploads, in one transaction.

        A repeated window is acknowledged and changes nothing. One with a stored key and another payload is a conflict:
        acknowledged, reported, and kept up to `MAX_CONFLICTS_PER_KEY`. Refused one by one are windows of other nodes or
        of their instances, unsealed windows, invalid ones, and the keys in `unreadable`.
        Time in which the node was given up is stored as unbilled (core/billing/absence.py).
        Raises InvalidArgumentError USAGE_BATCH_TOO_LARGE, UnavailableError STORE_FAILED, or NODE_GIVEN_UP until the
        node is back, ExhaustedError USAGE_BUSY.
        """
        if len(windows) > MAX_BATCH:
            raise InvalidArgumentError("USAGE_BATCH_TOO_LARGE", f"send at most {MAX_BATCH} windows at once")
        refused, good = [RejectedWindow(key, "USAGE_INVALID") for key in unreadable], []
        for window in windows:
            reason = _objection(node, window)
            if not reason and self._owner_of(window.instance_uid) not in ("", node):
                reason = "USAGE_FOREIGN_INSTANCE"
            if reason:
                refused.append(RejectedWindow((window.instance_uid, window.seq), reason))
            else:
                good.append(window)
        now = self._clock.wall_ns()
        loop = asyncio.get_running_loop()
        conflicts = await self._database.run(lambda: self._store(node, good, now, loop)) if good else ()
        for key in conflicts:
            self._log.error("usage.conflict", node=node, instance=key[0], seq=key[1])
        if refused:
            (uid, seq), reasons = refused[0].key, sorted({refusal.reason for refusal in refused})
            self._log.error("usage.refused", node=node, windows=len(refused), instance=uid, seq=seq, reasons=reasons)
        return Accepted(tuple((w.instance_uid, w.seq) for w in good), conflicts, tuple(refused))

    def _store(
        self, node: str, windows: Sequence[UsageWindow], now: int, loop: asyncio.AbstractEventLoop
    ) -> tuple[Key, ...]:
        conflicts: list[Key] = []
        with self._database.engine.begin() as connection:
            known = _digests(connection, {(w.instance_uid, w.seq) for w in windows})
            absences = absences_of(connection, node, {w.boot_id for w in windows})
            fresh: list[dict[str, object]] = []
            new: list[UsageWindow] = []
            for window in windows:
                key, payload = (window.instance_uid, window.seq), payload_of(window)
                digest = digest_of(payload)
                if key not in known:
                    known[key] = digest  # of what was uploaded: what is billed may be less
                    billed = without_absences(window, absences)
                    fresh.append({**row_of(billed), "digest": digest, "received_wall_ns": now})
                    new.append(billed)
                elif known[key] != digest:
                    conflicts.append(key)
                    _keep_conflict(connection, window, payload, now)
            if fresh:
                connection.execute(sa.insert(WINDOWS), fresh)
        if not loop.is_closed():  # also after a timeout: they are durable, and are new only once
            loop.call_soon_threadsafe(self._stored, new)
        return tuple(conflicts)


def _objection(node: str, w: UsageWindow) -> str:
    """Why a window is refused; "" if it is not."""
    if w.node != node:
        return "USAGE_FOREIGN_NODE"
    if not w.sealed:
        return "USAGE_UNSEALED"
    if any("\0" in text for text in (w.instance_uid, w.boot_id, w.function, w.state, w.gpu_model, *w.gpu_uuids)):
        return "USAGE_INVALID"  # PostgreSQL cannot store it: one such window would fail its batch for ever
    sums = (w.active_ns, w.idle_ns, w.unbilled_ns)
    sizes = (w.gpu_count, w.gpu_memory_bytes, w.vcpu_millis, w.memory_bytes, w.disk_bytes)
    numbers = (w.seq, w.start_mono_ns, w.end_mono_ns, w.start_wall_ns, w.invocations, *sums, *sizes)
    if not w.instance_uid or not all(0 <= number <= _LARGEST for number in numbers):
        return "USAGE_INVALID"
    return "" if sum(sums) == w.end_mono_ns - w.start_mono_ns else "USAGE_INVALID"


def _digests(connection: sa.Connection, keys: set[Key]) -> dict[Key, str]:
    """The digests of the stored payloads, by key, for those of `keys` that are stored."""
    found: dict[Key, str] = {}
    ordered = sorted(keys)
    for start in range(0, len(ordered), _CHUNK):
        chunk = ordered[start : start + _CHUNK]
        query = sa.select(WINDOWS.c.instance_uid, WINDOWS.c.seq, WINDOWS.c.digest).where(
            sa.tuple_(WINDOWS.c.instance_uid, WINDOWS.c.seq).in_(chunk)
        )
        found.update({(uid, seq): digest for uid, seq, digest in connection.execute(query)})
    return found


def _keep_conflict(connection: sa.Connection, window: UsageWindow, payload: str, now: int) -> None:
    """Store the conflicting payload, unless it is stored already or its key has `MAX_CONFLICTS_PER_KEY`."""
    digest = digest_of(payload)
    key = (window.instance_uid, window.seq, digest)
    of_key = sa.and_(CONFLICTS.c.instance_uid == window.instance_uid, CONFLICTS.c.seq == window.seq)
    kept = list(connection.execute(sa.select(CONFLICTS.c.digest).where(of_key)).scalars())
    if digest not in kept and len(kept) < MAX_CONFLICTS_PER_KEY:
        values = dict(zip(("instance_uid", "seq", "digest"), key, strict=True))
        row = {**values, "node": window.node, "payload": payload, "received_wall_ns": now}
        connection.execute(sa.insert(CONFLICTS).values(**row))
