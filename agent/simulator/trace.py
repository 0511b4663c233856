"""The trace of a simulation: an access log as CSV with the columns time, function and duration, in order of time.

    time,function,duration
    2026-01-01T00:00:00Z,ocr,0.35
    2026-01-01T00:00:04.2Z,ocr,350ms

`time`: ISO 8601 (without an offset: UTC) or seconds since any moment; `duration`: how long the instance works, in
seconds or with a unit (us, ms, s, m, h). Other columns are ignored. The length does not matter, as lines are read one
by one. It must be a file, since each run reads it, and in order, since sorting would need all of it in memory.
"""

from __future__ import annotations

import csv
import math
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from agent.core.errors import InvalidArgumentError
from agent.core.types import SECOND_NS

COLUMNS = ("time", "function", "duration")
MAX_LINE = 64 * 1024
MAX_DURATION_S = 7 * 86_400.0
MAX_TIME_S = 2.0**33
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_NUMBER = re.compile(r"(\d{1,15}(?:\.\d{0,12})?|\.\d{1,12})(us|ms|s|m|h)?", re.ASCII)
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, None: 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Call:
    """A request of the trace: its arrival, function, and how long the instance works on it, in ns."""

    at_ns: int
    function: str
    duration_ns: int


def read_trace(path: Path) -> Iterator[Call]:
    """The requests in order. Raises InvalidArgumentError TRACE_INVALID, which names file, line and column, or
    TRACE_UNREADABLE."""
    try:
        kind = path.stat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # a folder gets its own message below
            text = f"{path} is not a file: a trace is read several times, so save what comes from a pipe first"
            raise InvalidArgumentError("TRACE_UNREADABLE", text, file=str(path))
        with path.open("rb") as file:
            yield from _Reader(path.name, file).calls()
    except OSError as error:
        text = f"{path} can't be read: {error.strerror or error}"
        raise InvalidArgumentError("TRACE_UNREADABLE", text, file=str(path)) from error


class _Reader:
    """Reads one file; `_line` is its position."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        self._name = name
        self._line = 0
        self._rows = csv.reader(self._bounded(file), strict=True)

    def _bounded(self, file: BinaryIO) -> Iterator[str]:
        while raw := file.readline(MAX_LINE + 1):
            self._line += 1
            if len(raw) > MAX_LINE:
                raise self._wrong("", f"is longer than {MAX_LINE} bytes")
            try:
                yield raw.decode("utf-8-sig" if self._line == 1 else "utf-8")  # spreadsheets write a byte order mark
            except UnicodeDecodeError as error:
                raise self._wrong("", "is not UTF-8 text") from error

    def calls(self) -> Iterator[Call]:
        head = self._row()
        if head is None:
            raise self._wrong("", "is empty; its first line must be time,function,duration", 1)
        places = self._places([name.strip().lower() for name in head])
        before = -math.inf
        some = False
        while (row := self._row()) is not None:
            if not row:
                continue
            if len(row) != len(head):
                raise self._wrong("", f"has {len(row)} columns, the first line has {len(head)}")
            at_s = self._time(row[places["time"]].strip())
            if at_s < before:
                raise self._wrong("time", "is earlier than the line before; sort the trace by time")
            before = at_s
            name = row[places["function"]].strip()
            if not _NAME.fullmatch(name):
                raise self._wrong("function", f"must be 1 to 64 letters, digits, `_` or `-`, got {name[:70]!r}")
            duration_ns = round(self._duration(row[places["duration"]].strip()) * SECOND_NS)
            some = True
            yield Call(round(at_s * SECOND_NS), name, duration_ns)
        if not some:
            raise self._wrong("", "has no requests")

    def _row(self) -> list[str] | None:
        try:
            return next(self._rows, None)
        except csv.Error as error:
            raise self._wrong("", f"is not CSV: {error}") from error

    def _places(self, head: list[str]) -> dict[str, int]:
        for name in COLUMNS:
            if head.count(name) != 1:
                problem = "is missing" if name not in head else "is there twice"
                raise self._wrong(name, f"{problem} in the first line, which must be time,function,duration")
        return {name: head.index(name) for name in COLUMNS}

    def _time(self, text: str) -> float:
        found = _NUMBER.fullmatch(text)
        if found is not None and found[2] is None:
            seconds = float(found[1])
        else:
            try:
                at = datetime.fromisoformat(text)
            except ValueError:
                problem = f"must be ISO 8601 or a number of seconds, got {text[:40]!r}"
                raise self._wrong("time", problem) from None
            seconds = (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp()
        if not 0 <= seconds <= MAX_TIME_S:
            raise self._wrong("time", f"is out of range: {text[:40]!r}")
        return seconds

    def _duration(self, text: str) -> float:
        found = _NUMBER.fullmatch(text)
        if found is None:
            raise self._wrong("duration", f"must be like 0.35, 350ms or 2m, not negative, got {text[:40]!r}")
        seconds = float(found[1]) * _UNITS[found[2]]
        if seconds > MAX_DURATION_S:
            raise self._wrong("duration", f"is more than a week: {text[:40]!r}")
        return seconds

    def _wrong(self, column: str, problem: str, line: int = 0) -> InvalidArgumentError:
        where = f"{self._name}:{line or max(1, self._line)}"
        text = f"{where}: {f'column {column} ' if column else ''}{problem}"
        return InvalidArgumentError("TRACE_INVALID", text, file=self._name, line=line or self._line)
