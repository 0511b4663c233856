"""The scheduler's database as SQLAlchemy engines: SQLite in a file of its own, or PostgreSQL.

Everything that differs between the two is here, so that the stores use the same statements on both. On PostgreSQL every
wait is bounded on both sides: for a connection, a statement, a lock, and a peer that has vanished.
"""

from __future__ import annotations

import os
import sqlite3
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from agent.core.errors import ConfigError, UnavailableError

CONNECT_S = 3
STATEMENT_MS = 9_000
"""Less than the deadline of a call, so that a statement does not outlive it."""
_POSTGRESQL = ("postgresql", "postgres", "postgresql+psycopg")
_SESSION = f"-c statement_timeout={STATEMENT_MS} -c lock_timeout=5000 -c idle_in_transaction_session_timeout=15000"
# A vanished host is noticed within 6 s: by us, and by the server, which then releases our locks.
_KEEPALIVE = "-c tcp_keepalives_idle=3 -c tcp_keepalives_interval=1 -c tcp_keepalives_count=3"
_CONNECT: dict[str, Any] = {
    "connect_timeout": CONNECT_S,
    "application_name": "hibernode",
    "keepalives_idle": 3,
    "keepalives_interval": 1,
    "keepalives_count": 3,
    "tcp_user_timeout": 6_000,
}


def engine_of(url: str, **pool: Any) -> sa.Engine:
    """The engine for a SQLAlchemy URL; `pool` as for sqlalchemy.create_engine. Does not connect yet.

    Raises ConfigError DATABASE_INVALID, without the URL, which may hold a password. Errors of statements do not show
    their values either.
    """
    try:
        parsed = sa.make_url(url)
        if parsed.get_backend_name() == "sqlite":
            engine = sa.create_engine(parsed, hide_parameters=True, **pool)
            sa.event.listen(engine, "connect", _pragmas)
            return engine
        if parsed.drivername in _POSTGRESQL:
            parsed = parsed.set(drivername="postgresql+psycopg")
            connect = {name: value for name, value in _CONNECT.items() if name not in parsed.query}
            # The URL's options come last, which makes them count.
            connect["options"] = " ".join((_SESSION, _KEEPALIVE, *_texts(parsed.query.get("options", ()))))
            # `pool_pre_ping` replaces a connection that the server has closed, as at its restart.
            return sa.create_engine(parsed, hide_parameters=True, pool_pre_ping=True, connect_args=connect, **pool)
        problem = "names neither sqlite:///FILE nor postgresql://USER@HOST/NAME"
    except ImportError:
        problem = "needs a driver that is not installed: pip install 'hibernode[postgres]'"
    except (sa.exc.ArgumentError, ValueError) as error:
        problem = f"is no SQLAlchemy URL ({type(error).__name__})"
    raise ConfigError("DATABASE_INVALID", f"`database` {problem}; fix it in scheduler.yaml")


def make_private(engine: sa.Engine) -> None:
    """Create SQLite's file for its owner alone; one that is there, say copied back from a backup, becomes private.

    A file that is there is not opened: a process that closes any descriptor of a file loses all its locks on it
    (POSIX), those of SQLite's connections too. The next program to look into the database would then take it for
    unused, and remove the write-ahead log, with all that is written to it afterwards.
    """
    path = engine.url.database
    if engine.dialect.name != "sqlite" or not path:
        return
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        os.chmod(path, 0o600)


def failed(engine: sa.Engine, what: str, problem: BaseException | str) -> UnavailableError:
    """STORE_FAILED about `what` ("the usage database"). It names the type of `problem` only, as the text of a driver's
    error may hold anything."""
    if isinstance(problem, BaseException):
        problem = type(getattr(problem, "orig", None) or problem).__name__
    sqlite = engine.dialect.name == "sqlite"
    fix = "check the disk, its owner and its space" if sqlite else "check that PostgreSQL runs and lets this user in"
    return UnavailableError("STORE_FAILED", f"{what} failed ({problem}); {fix}")


def text_type(length: int | None = None) -> sa.types.TypeEngine[str]:
    """Text that compares and sorts by code points on both databases, whatever the server's locale."""
    by_bytes = postgresql.TEXT(collation="C") if length is None else postgresql.VARCHAR(length, collation="C")
    return (sa.Text() if length is None else sa.String(length)).with_variant(by_bytes, "postgresql")


def _texts(found: str | tuple[str, ...]) -> tuple[str, ...]:
    return (found,) if isinstance(found, str) else found


def _pragmas(connection: sqlite3.Connection, _record: object) -> None:
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}")
