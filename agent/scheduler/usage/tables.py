"""The tables of the fleet's usage (SQLAlchemy Core), and conversion of windows to rows and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import sqlalchemy as sa

from agent.core.billing.window import UsageWindow
from agent.scheduler.database.engine import text_type

USAGE_METADATA = sa.MetaData()

_INTEGERS = frozenset(field.name for field in fields(UsageWindow) if field.type in (int, "int"))
_FLAGS = frozenset(field.name for field in fields(UsageWindow) if field.type in (bool, "bool"))
_KEY = ("instance_uid", "seq")


def _column(name: str) -> sa.Column[Any]:
    key = name in _KEY
    if name in _INTEGERS:
        return sa.Column(name, sa.BigInteger, nullable=False, primary_key=key, autoincrement=False)
    kind = sa.Boolean() if name in _FLAGS else text_type()
    return sa.Column(name, kind, nullable=False, primary_key=key)


WINDOWS = sa.Table(
    "usage_windows",
    USAGE_METADATA,
    *(_column(field.name) for field in fields(UsageWindow)),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("received_wall_ns", sa.BigInteger, nullable=False),
    sa.Index("usage_windows_by_time", "start_wall_ns"),
    sa.Index("usage_windows_by_function", "function", "start_wall_ns"),
)

CONFLICTS = sa.Table(
    "usage_conflicts",
    USAGE_METADATA,
    sa.Column("instance_uid", text_type(), primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("node", sa.Text, nullable=False),
    sa.Column("payload", sa.Text, nullable=False),
    sa.Column("received_wall_ns", sa.BigInteger, nullable=False),
)

ABSENCES = sa.Table(
    "absences",
    USAGE_METADATA,
    sa.Column("node", text_type(), primary_key=True),
    sa.Column("since_wall_ns", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("boot_id", text_type(), primary_key=True),
    sa.Column("from_mono_ns", sa.BigInteger, nullable=False),
    sa.Column("to_mono_ns", sa.BigInteger, nullable=False),
)
"""When nodes were given up (absences.py). `since_wall_ns` is the scheduler's time, the others the node's; without a
boot it has no end yet, and `to_mono_ns` of a boot that ended meanwhile is `NO_END_NS`."""

WINDOW_COLUMNS = tuple(WINDOWS.c[field.name] for field in fields(UsageWindow))


def payload_of(window: UsageWindow) -> str:
    """The window as canonical JSON: equal text if and only if equal windows."""
    return json.dumps(asdict(window), sort_keys=True, separators=(",", ":"))


def digest_of(payload: str) -> str:
    """Distinguishes a repetition from a conflict."""
    return hashlib.sha256(payload.encode()).hexdigest()


def row_of(window: UsageWindow) -> dict[str, object]:
    return {**asdict(window), "gpu_uuids": ",".join(window.gpu_uuids)}


def window_of(row: Mapping[str, Any]) -> UsageWindow:
    """The window of a row of WINDOW_COLUMNS, or of a payload."""
    uuids = row["gpu_uuids"]
    values = {field.name: row[field.name] for field in fields(UsageWindow)}
    values["gpu_uuids"] = tuple(uuids.split(",") if uuids else ()) if isinstance(uuids, str) else tuple(uuids)
    return UsageWindow(**values)
