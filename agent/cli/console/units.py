"""Formats numbers and times for tables; JSON keeps exact values."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation

import click
from google.protobuf.timestamp_pb2 import Timestamp

from agent.core.types import GIB, MIB, SECOND_NS

_DAY_S, _HOUR_S, _MINUTE_S = 86_400, 3_600, 60


def duration(ns: int) -> str:
    """`850ms`, `12.3s`, `4m10s`, `3h05m`, `2d4h`; `-` for zero."""
    if ns <= 0:
        return "-"
    seconds = ns / SECOND_NS
    if seconds < 1:
        return f"{seconds * 1000:.3g}ms"
    if seconds < _MINUTE_S:
        return f"{seconds:.3g}s"
    whole = int(seconds)
    if whole < _HOUR_S:
        return f"{whole // _MINUTE_S}m{whole % _MINUTE_S:02d}s"
    if whole < _DAY_S:
        return f"{whole // _HOUR_S}h{whole % _HOUR_S // _MINUTE_S:02d}m"
    return f"{whole // _DAY_S}d{whole % _DAY_S // _HOUR_S}h"


def seconds(ns: int) -> str:
    """Seconds with milliseconds, the granularity of billing."""
    return f"{Decimal(ns) / SECOND_NS:.3f}"


def size(count: int) -> str:
    """`16.0 GiB`, `512 MiB`; `-` for zero."""
    if count <= 0:
        return "-"
    if count >= GIB:
        return f"{count / GIB:.1f} GiB"
    if count >= MIB:
        return f"{count / MIB:.0f} MiB"
    return f"{count} B"


def clock(time: Timestamp) -> str:
    """Local time with milliseconds; `-` if unset."""
    if not time.seconds:
        return "-"
    local = datetime.fromtimestamp(time.seconds, UTC).astimezone()
    return f"{local:%Y-%m-%d %H:%M:%S}.{time.nanos // 1_000_000:03d}"


def age(time: Timestamp) -> str:
    """Time since then; `-` if unset."""
    return duration(max(1, wall_ns() - time.seconds * SECOND_NS - time.nanos)) if time.seconds else "-"


def wall_ns() -> int:
    """Now, nanoseconds since 1970."""
    from time import time_ns

    return time_ns()


def money(text: str) -> str:
    """Rounds an exact decimal for a table."""
    try:
        value = Decimal(text)
    except InvalidOperation:
        return text or "-"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.2f}"


def gpu_names(uuids: Iterable[str]) -> str:
    """UUIDs shortened to 12 characters."""
    return ",".join(uuid if len(uuid) <= 12 else uuid[:12] for uuid in uuids) or "-"


def instant_ns(value: str) -> int:
    """Parses `24h` (ago) or `2025-01-31[T12:00:00[Z]]` (local time without a zone) to ns since 1970."""
    from agent.config import parse_duration_ns  # imports msgspec and YAML, which --help does not need

    try:
        return max(0, wall_ns() - parse_duration_ns(value))
    except ValueError:
        pass
    try:
        at = datetime.fromisoformat(value)
    except ValueError as error:
        raise click.BadParameter(
            f"{value!r} is neither a duration like 24h nor a time like 2025-01-31T12:00"
        ) from error
    return int(at.astimezone(UTC).timestamp()) * SECOND_NS
