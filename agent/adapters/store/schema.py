"""The node store's schema, and rows to and from core types. Migrations are one list, applied in order."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from agent.core.billing.window import UsageWindow
from agent.core.instance_record import InstanceRecord, UnreadableRecord
from agent.core.types import Handle

# Entry i migrates from version i to i + 1 (PRAGMA user_version). Never edit one that was released.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE instances (
            uid TEXT PRIMARY KEY,
            phase TEXT NOT NULL,
            record BLOB NOT NULL
        )""",
        """CREATE TABLE windows (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            instance_uid TEXT NOT NULL, seq INTEGER NOT NULL, node TEXT NOT NULL, boot_id TEXT NOT NULL,
            function TEXT NOT NULL, state TEXT NOT NULL, gpu_model TEXT NOT NULL, gpu_uuids TEXT NOT NULL,
            gpu_count INTEGER NOT NULL, gpu_memory_bytes INTEGER NOT NULL, vcpu_millis INTEGER NOT NULL,
            memory_bytes INTEGER NOT NULL, disk_bytes INTEGER NOT NULL, start_mono_ns INTEGER NOT NULL,
            end_mono_ns INTEGER NOT NULL, start_wall_ns INTEGER NOT NULL, active_ns INTEGER NOT NULL,
            idle_ns INTEGER NOT NULL, unbilled_ns INTEGER NOT NULL, invocations INTEGER NOT NULL,
            estimated INTEGER NOT NULL, sealed INTEGER NOT NULL, acknowledged INTEGER NOT NULL DEFAULT 0,
            UNIQUE (instance_uid, seq)
        )""",
        "CREATE INDEX windows_to_upload ON windows (instance_uid, seq) WHERE sealed = 1 AND acknowledged = 0",
        "CREATE INDEX windows_to_prune ON windows (start_wall_ns) WHERE acknowledged = 1",
    ),
    # acknowledged = 2: rejected by the scheduler.
    ("CREATE INDEX windows_refused ON windows (id) WHERE acknowledged = 2",),
)

COLUMNS = (
    "instance_uid", "seq", "node", "boot_id", "function", "state", "gpu_model", "gpu_uuids", "gpu_count",
    "gpu_memory_bytes", "vcpu_millis", "memory_bytes", "disk_bytes", "start_mono_ns", "end_mono_ns", "start_wall_ns",
    "active_ns", "idle_ns", "unbilled_ns", "invocations", "estimated", "sealed",
)  # fmt: skip
_NAMES = ", ".join(COLUMNS)
_KEY = ("instance_uid", "seq")

# ruff: noqa: S608 - every name in these statements is from the tuple above; values are always bound.
# A sealed row never changes: an upsert of its key is a repetition.
UPSERT_WINDOW = (
    f"INSERT INTO windows ({_NAMES}) VALUES ({', '.join('?' * len(COLUMNS))}) "
    "ON CONFLICT (instance_uid, seq) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in COLUMNS if name not in _KEY)
    + " WHERE windows.sealed = 0"
)
LAST_WINDOWS = (
    f"SELECT {_NAMES} FROM windows WHERE (instance_uid, seq) IN "
    "(SELECT instance_uid, max(seq) FROM windows GROUP BY instance_uid) ORDER BY instance_uid"
)
UNACKNOWLEDGED = (
    f"SELECT {_NAMES} FROM windows WHERE sealed = 1 AND acknowledged = 0 ORDER BY instance_uid, seq LIMIT ? OFFSET ?"
)
ACKNOWLEDGE = "UPDATE windows SET acknowledged = 1 WHERE instance_uid = ? AND seq = ? AND sealed = 1"
REFUSE = "UPDATE windows SET acknowledged = 2 WHERE instance_uid = ? AND seq = ? AND sealed = 1 AND acknowledged = 0"
FORGET_REFUSED = (
    "DELETE FROM windows WHERE id IN (SELECT id FROM windows WHERE acknowledged = 2 ORDER BY id DESC LIMIT -1 OFFSET ?)"
)
READ_WINDOWS = f"SELECT {_NAMES} FROM windows WHERE id > ? AND (? = '' OR instance_uid = ?) ORDER BY id LIMIT ?"
PRUNE = (
    "DELETE FROM windows WHERE id IN "
    "(SELECT id FROM windows WHERE acknowledged = 1 AND sealed = 1 AND start_wall_ns < ? ORDER BY id LIMIT ?)"
)
PUT_INSTANCE = (
    "INSERT INTO instances (uid, phase, record) VALUES (?, ?, ?) "
    "ON CONFLICT (uid) DO UPDATE SET phase = excluded.phase, record = excluded.record"
)

_RECORD = msgspec.json.Decoder(InstanceRecord)
_T = TypeVar("_T", "_Gpus", "_Process")


@dataclass(frozen=True, slots=True)
class _Gpus:
    """What a record of any version may still tell: its GPUs ..."""

    gpu_uuids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Process:
    """... and its process or container."""

    handle: Handle | None = None


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the schema to the newest version, a transaction per step. ValueError if it is newer than this program."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise ValueError(f"its schema version {version} is newer than this program's {len(MIGRATIONS)}")
    for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
        connection.execute("BEGIN IMMEDIATE")
        for statement in statements:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {number}")
        connection.execute("COMMIT")


def window_row(window: UsageWindow) -> tuple[object, ...]:
    """A window as a row in the order of COLUMNS. (A GPU's uuid never holds a comma.)"""
    w = window
    return (
        w.instance_uid, w.seq, w.node, w.boot_id, w.function, w.state, w.gpu_model, ",".join(w.gpu_uuids),
        w.gpu_count, w.gpu_memory_bytes, w.vcpu_millis, w.memory_bytes, w.disk_bytes, w.start_mono_ns, w.end_mono_ns,
        w.start_wall_ns, w.active_ns, w.idle_ns, w.unbilled_ns, w.invocations, w.estimated, w.sealed,
    )  # fmt: skip


def window_of(row: Sequence[object]) -> UsageWindow:
    """A row in the order of COLUMNS as a window."""
    values = dict(zip(COLUMNS, row, strict=True))
    uuids = str(values["gpu_uuids"])
    values |= {
        "gpu_uuids": tuple(uuids.split(",")) if uuids else (),
        "estimated": bool(values["estimated"]),
        "sealed": bool(values["sealed"]),
    }
    return msgspec.convert(values, UsageWindow)


def empty_window(row: Sequence[object]) -> UsageWindow | None:
    """In place of a row that is not a window: an empty one that has ended, in no boot. So the ledger goes on behind it,
    and nothing is billed for it. None if not even its key can be read."""
    uid, seq = row[:2]
    if not isinstance(uid, str) or not isinstance(seq, int):
        return None
    return UsageWindow(
        instance_uid=uid, seq=seq, node="", boot_id="", function="", state="", gpu_model="", gpu_uuids=(), gpu_count=0,
        gpu_memory_bytes=0, vcpu_millis=0, memory_bytes=0, disk_bytes=0, start_mono_ns=0, end_mono_ns=0,
        start_wall_ns=0, active_ns=0, idle_ns=0, unbilled_ns=0, invocations=0, estimated=True, sealed=True,
    )  # fmt: skip


def record_row(record: InstanceRecord) -> tuple[str, str, bytes]:
    """A record as JSON, so that it survives changes of the types: new fields get their defaults."""
    return record.spec.uid, record.phase.value, msgspec.json.encode(record)


def record_of(data: bytes) -> InstanceRecord:
    """Raises msgspec.DecodeError (a ValueError) if the bytes are not a record."""
    return _RECORD.decode(data)


def unreadable_record(uid: str, data: bytes) -> UnreadableRecord | None:
    """None if the bytes are a record. In a damaged file they may be a value of any type: TypeError."""
    try:
        _RECORD.decode(data)
    except (ValueError, TypeError) as error:
        gpus, process = _remnant(data, _Gpus), _remnant(data, _Process)
        return UnreadableRecord(uid, gpus.gpu_uuids, str(error), process.handle)
    return None


def _remnant(data: bytes, part: type[_T]) -> _T:
    """The part of a record, empty if that can't be read either."""
    try:
        return msgspec.json.decode(data, type=part)
    except (ValueError, TypeError):
        return part()
