"""The databases that the scheduler's stores run on: each test with `database_url` runs on all of them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from agent.core.billing.window import UsageWindow
from agent.scheduler.usage.collector import UsageCollector, UsageDatabase
from agent.scheduler.usage.tables import CONFLICTS, window_of
from tests.fakes.clock import FakeClock
from tests.fakes.postgresql import PostgreSQL


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """SQLAlchemy URL of a new, empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/scheduler.db"
        return
    server: PostgreSQL = request.getfixturevalue("postgres")
    with server.database() as name:
        yield server.url(name)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[UsageDatabase]:
    opened = UsageDatabase.at(database_url)
    await opened.open()
    yield opened
    opened.close()


async def conflicts(database: UsageDatabase) -> list[UsageWindow]:
    """The payloads kept as conflicts."""

    def read() -> list[UsageWindow]:
        with database.engine.connect() as connection:
            found = connection.execute(sa.select(CONFLICTS.c.payload)).scalars().all()
        return [window_of(json.loads(payload)) for payload in found]

    return await database.run(read)


@pytest.fixture
def collector(database: UsageDatabase) -> UsageCollector:
    return UsageCollector(database, FakeClock())
