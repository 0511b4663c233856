"""The store: what must survive a restart of the scheduler. Functions with their targets, and the nodes it knows.

SQLAlchemy Core on SQLite (WAL) by default, or on PostgreSQL; never on the request path. A spec is stored as its proto,
secrets included: only its owner can read the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from agent.core.errors import UnavailableError
from agent.scheduler.database.engine import engine_of, make_private, text_type
from agent.scheduler.database.thread import DatabaseThread

DEADLINE_S = 10.0
"""Of a call. A write that misses it before its turn does not happen; one that has begun may, as the error then says.
Repeating it is harmless."""
_UNSURE = "it may be written all the same, and takes effect at the next start then: once this is mended, put it again"

_METADATA = sa.MetaData()
_FUNCTIONS = sa.Table(
    "functions",
    _METADATA,
    sa.Column("name", text_type(64), primary_key=True),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("spec", sa.LargeBinary, nullable=False),
    sa.Column("target", sa.Integer, nullable=False),
    sa.Column("triggers", sa.LargeBinary, nullable=False),
    sa.Column("create_wall_ns", sa.BigInteger, nullable=False),
    sa.Column("update_wall_ns", sa.BigInteger, nullable=False),
    sa.Column("deleting", sa.Boolean, nullable=False),
)
# Kept when a function is deleted: its revisions go on counting, since request_ids of creates must never repeat.
_REVISIONS = sa.Table(
    "revisions",
    _METADATA,
    sa.Column("name", text_type(64), primary_key=True),
    sa.Column("revision", sa.BigInteger, nullable=False),
)
_NODES = sa.Table(
    "nodes",
    _METADATA,
    sa.Column("name", text_type(255), primary_key=True),
    sa.Column("first_seen_wall_ns", sa.BigInteger, nullable=False),
)
# A node without a row is in normal use.
_NODE_SCHEDULING = sa.Table(
    "node_scheduling",
    _METADATA,
    sa.Column("name", text_type(255), primary_key=True),
    sa.Column("scheduling", sa.String(16), nullable=False),
)
# Schedule and policies of a function; its default target is in `functions`.
_PROVISION = sa.Table(
    "provision_configs",
    _METADATA,
    sa.Column("function", text_type(64), primary_key=True),
    sa.Column("config", sa.LargeBinary, nullable=False),
)
# The target last decided for a function with a schedule or policies, while all of them could be read.
_LAST_TARGETS = sa.Table(
    "last_targets",
    _METADATA,
    sa.Column("function", text_type(64), primary_key=True),
    sa.Column("target", sa.Integer, nullable=False),
)


@dataclass(frozen=True, slots=True)
class FunctionRow:
    """A function. `spec`: serialised v1.FunctionSpec with secrets; `triggers`: serialised v1.Function with nothing but
    triggers."""

    name: str
    revision: int
    spec: bytes
    target: int
    triggers: bytes
    create_wall_ns: int
    update_wall_ns: int
    deleting: bool = False

    def __repr__(self) -> str:
        return f"FunctionRow({self.name!r}, revision={self.revision}, target={self.target})"


class Store:
    """Functions and nodes in SQL. Every call may raise UnavailableError STORE_FAILED, without the URL, which may hold a
    password; then nothing was written, unless the message says otherwise."""

    def __init__(self, url: str, deadline_s: float = DEADLINE_S) -> None:
        self._engine = engine_of(url)
        self.database = DatabaseThread(self._engine, "store", "the scheduler's database", deadline_s)

    async def open(self) -> None:
        await self.database.run(self._open)

    async def close(self) -> None:
        """Wait for open calls, up to the deadline, and close."""
        with suppress(UnavailableError):
            await self.database.run(self._engine.dispose)
        self.database.close()

    async def functions(self) -> list[FunctionRow]:
        """All functions, those being deleted included, by name."""
        rows = await self._rows(sa.select(_FUNCTIONS).order_by(_FUNCTIONS.c.name))
        return [
            FunctionRow(**{**row, "spec": _bytes(row["spec"]), "triggers": _bytes(row["triggers"])}) for row in rows
        ]

    async def put_function(self, row: FunctionRow, provision: bytes | None = None) -> None:
        """Insert or replace a function; durable on return. `provision`: its schedule and policies, a serialised
        v1.ProvisionConfig, in the same transaction; b"" deletes them, None leaves them as they are."""
        values = {column.name: getattr(row, column.name) for column in _FUNCTIONS.columns}
        statements: list[sa.Executable] = [
            sa.delete(_FUNCTIONS).where(_FUNCTIONS.c.name == row.name),
            sa.insert(_FUNCTIONS).values(**values),
            sa.delete(_REVISIONS).where(_REVISIONS.c.name == row.name),
            sa.insert(_REVISIONS).values(name=row.name, revision=row.revision),
        ]
        if provision is not None:
            statements.append(sa.delete(_PROVISION).where(_PROVISION.c.function == row.name))
        if provision:
            statements.append(sa.insert(_PROVISION).values(function=row.name, config=provision))
        await self._write(*statements)

    async def revisions(self) -> dict[str, int]:
        """The last revision of every function ever deployed, by name."""
        rows = await self._rows(sa.select(_REVISIONS.c.name, _REVISIONS.c.revision))
        return {row["name"]: row["revision"] for row in rows}

    async def delete_function(self, name: str) -> None:
        """Delete a function; its last revision is kept."""
        of_function = sa.delete(_FUNCTIONS).where(_FUNCTIONS.c.name == name)
        provision = sa.delete(_PROVISION).where(_PROVISION.c.function == name)
        await self._write(of_function, provision, sa.delete(_LAST_TARGETS).where(_LAST_TARGETS.c.function == name))

    async def nodes(self) -> list[str]:
        return [row["name"] for row in await self._rows(sa.select(_NODES.c.name).order_by(_NODES.c.name))]

    async def put_node(self, name: str, wall_ns: int) -> None:
        def write() -> None:
            with self._engine.begin() as connection:
                if connection.execute(sa.select(_NODES.c.name).where(_NODES.c.name == name)).first() is None:
                    connection.execute(sa.insert(_NODES).values(name=name, first_seen_wall_ns=wall_ns))

        await self.database.run(write, unsure=_UNSURE)

    async def node_scheduling(self) -> dict[str, str]:
        """What operators have asked of nodes: CORDONED or DRAINED, by name."""
        rows = await self._rows(sa.select(_NODE_SCHEDULING.c.name, _NODE_SCHEDULING.c.scheduling))
        return {row["name"]: row["scheduling"] for row in rows}

    async def put_node_scheduling(self, name: str, scheduling: str | None) -> None:
        """Set CORDONED or DRAINED, or None to delete it."""
        statements: list[sa.Executable] = [sa.delete(_NODE_SCHEDULING).where(_NODE_SCHEDULING.c.name == name)]
        if scheduling is not None:
            statements.append(sa.insert(_NODE_SCHEDULING).values(name=name, scheduling=scheduling))
        await self._write(*statements)

    async def provision_configs(self) -> dict[str, bytes]:
        """Serialised v1.ProvisionConfig by function, for functions with a schedule or policies."""
        rows = await self._rows(sa.select(_PROVISION.c.function, _PROVISION.c.config))
        return {row["function"]: _bytes(row["config"]) for row in rows}

    async def last_targets(self) -> dict[str, int]:
        """By function."""
        rows = await self._rows(sa.select(_LAST_TARGETS.c.function, _LAST_TARGETS.c.target))
        return {row["function"]: row["target"] for row in rows}

    async def put_last_targets(self, targets: Mapping[str, int]) -> None:
        """Insert or replace them, in one transaction."""
        statements: list[sa.Executable] = []
        for name, target in targets.items():
            statements.append(sa.delete(_LAST_TARGETS).where(_LAST_TARGETS.c.function == name))
            statements.append(sa.insert(_LAST_TARGETS).values(function=name, target=target))
        await self._write(*statements)

    async def _rows(self, query: sa.Select[Any]) -> Sequence[sa.RowMapping]:
        def read() -> Sequence[sa.RowMapping]:
            with self._engine.connect() as connection:
                return connection.execute(query).mappings().all()

        return await self.database.run(read)

    async def _write(self, *statements: sa.Executable) -> None:
        def write() -> None:
            with self._engine.begin() as connection:
                for statement in statements:
                    connection.execute(statement)

        await self.database.run(write, unsure=_UNSURE)

    def _open(self) -> None:
        make_private(self._engine)
        _METADATA.create_all(self._engine)


def _bytes(value: object) -> bytes:
    """A stored message. SQLite's columns hold values of any type: one that is not bytes is a message that can't be
    read."""
    return bytes(value) if isinstance(value, bytes | memoryview) else b"\xff"
