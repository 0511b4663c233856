"""Logs: one line per event on stderr, as JSON for machines or as text for people.

`log = get_logger(); log.info("instance.frozen", uid=uid, driver_ns=ns)`: a dotted event name that never changes, data
as keys. Values under keys that look secret are masked at any depth, and long values are cut: a careless call can
neither leak a token nor fill a disk.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal, TextIO, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

MAX_VALUE_CHARS = 2_000
"""Longer texts are cut, and their length is added."""

MAX_ITEMS = 50
"""Longer lists and mappings are cut."""

MAX_DEPTH = 6
"""Deeper values are logged as the name of their type."""

MASK = "***"

_SECRET = re.compile(
    r"token|passw|secret|authorization|credential|cookie|private_key|access_key|api_?key|environ|^env$", re.IGNORECASE
)
# These name a secret's place, or count something.
_HARMLESS = re.compile(r"_(?:file|path|count|bytes|ns)$", re.IGNORECASE)


def is_secret_key(key: str) -> bool:
    """Whether a value under this key is masked. Also for data that is not logged (answers, `inspect`)."""
    key = key.replace("-", "_")
    return bool(_SECRET.search(key)) and not _HARMLESS.search(key)


def _bounded(value: object, depth: int = 0) -> object:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return value if len(value) <= MAX_VALUE_CHARS else f"{value[:MAX_VALUE_CHARS]}... ({len(value)} characters)"
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"  # bodies and images
    if depth >= MAX_DEPTH:
        return f"<{type(value).__name__}>"
    if isinstance(value, Mapping):
        cut = {
            str(key): MASK if is_secret_key(str(key)) else _bounded(inner, depth + 1)
            for key, inner in list(value.items())[:MAX_ITEMS]
        }
        return cut if len(value) <= MAX_ITEMS else {**cut, "...": f"{len(value)} keys"}
    if isinstance(value, list | tuple | set | frozenset):
        items = [_bounded(inner, depth + 1) for inner in list(value)[:MAX_ITEMS]]
        return items if len(value) <= MAX_ITEMS else [*items, f"... ({len(value)} items)"]
    return _bounded(str(value), depth)


def guard(_logger: WrappedLogger, _method: str, event_dict: EventDict) -> EventDict:
    """The processor that masks and cuts. `exc_info` passes: its text is formatted, and cut, later."""
    for key, value in event_dict.items():
        if key == "exc_info":
            continue
        event_dict[key] = MASK if is_secret_key(key) else _bounded(value)
    return event_dict


def _cut_traceback(_logger: WrappedLogger, _method: str, event_dict: EventDict) -> EventDict:
    text = event_dict.get("exception")
    if isinstance(text, str) and len(text) > 4 * MAX_VALUE_CHARS:
        event_dict["exception"] = "... " + text[-4 * MAX_VALUE_CHARS :]  # the error is at the end
    return event_dict


class _Stderr:
    """The current stderr at each line: a logger made at import time must not keep a stream that is replaced later."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


class _LibraryHandler(logging.StreamHandler[TextIO]):
    """Marks our handler of the root logger, so that `configure` replaces only its own."""


def timestamp(wall_ns: int) -> str:
    """A time in the lines' format, for the key `timestamp` of an event that is logged later."""
    return (
        f"{datetime.fromtimestamp(wall_ns // 1_000_000_000, UTC):%Y-%m-%dT%H:%M:%S}.{wall_ns // 1000 % 1_000_000:06}Z"
    )


def configure(level: str = "info", fmt: Literal["json", "console"] = "json", *, stream: TextIO | None = None) -> None:
    """Set up logging for this process; called once by a composition root, and again to change the level.

    - `level`: debug, info, warning or error.
    - `stream`: for tests; None is stderr, looked up at each line.

    Messages of libraries (stdlib logging) from level warning are logged in the same format.
    """
    number = logging.getLevelNamesMapping()[level.upper()]
    out = cast(TextIO, stream or _Stderr())
    render = _json() if fmt == "json" else _console(stream or sys.stderr)
    _configure_structlog(number, render, out)
    handler = _LibraryHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_COMMON, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render]
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [other for other in root.handlers if not isinstance(other, _LibraryHandler)] + [handler]
    root.setLevel(max(number, logging.WARNING))


_COMMON: list[Processor] = [
    structlog.processors.add_log_level,
    structlog.processors.MaybeTimeStamper(fmt="iso", utc=True),  # an event that is logged later brings its own time
    guard,
]


def _printable(_logger: WrappedLogger, _method: str, event_dict: EventDict) -> EventDict:
    """Replace control characters, so that an instance's output can't steer a terminal. JSON escapes them; the console
    renderer does so only in values with blanks or line ends."""
    for key, value in event_dict.items():
        if isinstance(value, str) and not value.isprintable():
            event_dict[key] = "".join(char if char.isprintable() or char in "\n\t" else "?" for char in value)
    return event_dict


def _json() -> list[Processor]:
    return [structlog.processors.format_exc_info, _cut_traceback, structlog.processors.JSONRenderer()]


def _console(stream: TextIO) -> list[Processor]:
    colors = stream.isatty() and not os.environ.get("NO_COLOR")
    return [_printable, structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)]


def _configure_structlog(level: int, render: list[Processor], out: TextIO) -> None:
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, *_COMMON, *render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(out),
        cache_logger_on_first_use=False,
    )


def get_logger(**bound: object) -> FilteringBoundLogger:
    """A logger with `bound` keys on every line; may be made before `configure`."""
    return cast(FilteringBoundLogger, structlog.get_logger(**bound))


# Before `configure` structlog would print to stdout, which is for data: early lines go to stderr too.
if not structlog.is_configured():
    _configure_structlog(logging.INFO, _console(sys.stderr), cast(TextIO, _Stderr()))
