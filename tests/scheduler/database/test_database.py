"""What is PostgreSQL's own: it may be away, slow or suspicious, and its URL holds a password."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from agent.core.errors import ConfigError, UnavailableError
from agent.scheduler.database.engine import engine_of
from agent.scheduler.database.store import FunctionRow, Store
from agent.scheduler.usage.collector import UsageDatabase
from agent.scheduler.usage.tables import WINDOWS
from tests.contract.test_stores import window
from tests.fakes.postgresql import PASSWORD, PostgreSQL

ROW = FunctionRow("ocr", 1, b"KEY=secret-of-a-function", 1, b"", 0, 0)


@pytest.fixture
def name(postgres: PostgreSQL) -> Iterator[str]:
    with postgres.database() as made:
        yield made


async def test_a_server_that_was_restarted_is_found_again(postgres: PostgreSQL, name: str) -> None:
    store = Store(postgres.url(name))
    await store.open()
    await store.put_function(ROW)
    postgres.stop()
    with pytest.raises(UnavailableError, match="STORE_FAILED") as caught:
        await store.functions()
    assert "check that PostgreSQL runs" in str(caught.value)
    postgres.start()
    assert await store.functions() == [ROW]
    postgres.stop()  # and in one go: the connection in hand has died unseen
    postgres.start()
    assert await store.functions() == [ROW]
    await store.close()


async def test_no_error_or_log_shows_the_password(
    postgres: PostgreSQL, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for url in (
        postgres.url_with_password(name, "wrong-hunter3"),
        f"{postgres.url_with_password(name, 'wrong-hunter3')}?no_such_option=1",
        postgres.url_with_password("no-such-database"),
        postgres.url_with_password(name),  # the guest may connect, but not make tables
    ):
        store = Store(url)
        with pytest.raises(UnavailableError, match="STORE_FAILED") as caught:
            await store.open()
        await store.close()
        shown = "".join(traceback.format_exception(caught.value)) + caplog.text + repr(store._engine)
        assert "hunter" not in shown
        assert PASSWORD not in shown


async def test_a_failing_statement_does_not_show_what_it_would_have_written(postgres: PostgreSQL, name: str) -> None:
    store = Store(postgres.url(name))
    await store.open()
    postgres.run("DROP TABLE functions", database=name)
    with pytest.raises(UnavailableError) as caught:
        await store.put_function(ROW)
    assert "secret-of-a-function" not in "".join(traceback.format_exception(caught.value))
    await store.close()


def test_statements_and_locks_have_deadlines_that_the_url_may_change(postgres: PostgreSQL, name: str) -> None:
    def asked(url: str) -> list[str]:
        engine = engine_of(url)
        settings = ("statement_timeout", "lock_timeout", "tcp_keepalives_idle", "application_name")
        with engine.connect() as connection:
            found = [str(connection.execute(sa.text(f"SHOW {one}")).scalar()) for one in settings]
        engine.dispose()
        return found

    over_tcp = postgres.url_with_password(name)
    assert asked(over_tcp) == ["9s", "5s", "3", "hibernode"]
    assert asked(f"{over_tcp}?options=-c%20statement_timeout%3D2s&application_name=x") == ["2s", "5s", "3", "x"]


def test_a_statement_that_takes_too_long_is_ended_by_the_server(postgres: PostgreSQL, name: str) -> None:
    engine = engine_of(f"{postgres.url(name)}&options=-c%20statement_timeout%3D50ms")
    with engine.connect() as connection, pytest.raises(sa.exc.OperationalError, match="statement timeout"):
        connection.execute(sa.text("SELECT pg_sleep(30)"))
    engine.dispose()


async def test_sums_beyond_a_bigint_come_back_as_whole_numbers(postgres: PostgreSQL, name: str) -> None:
    """sum(bigint) is a NUMERIC there; a count of bytes or ns must not come back as a float or fail."""
    database = UsageDatabase.at(postgres.url(name))
    await database.open()
    most = (1 << 63) - 1

    def work() -> int:
        with database.engine.begin() as connection:
            for seq in (0, 1):
                row = {field: getattr(window(seq=seq), field) for field in window().__dataclass_fields__}
                row |= {"gpu_uuids": "", "invocations": most, "digest": "", "received_wall_ns": 0}
                connection.execute(sa.insert(WINDOWS).values(**row))
            return int(connection.execute(sa.select(sa.func.sum(WINDOWS.c.invocations))).scalar_one())

    assert await database.run(work) == 2 * most
    database.close()


@pytest.mark.parametrize(
    "url", ["mysql://u:hunter2@db/h", "postgresql+asyncpg://u:hunter2@db/h", "oracle://u:hunter2@d"]
)
def test_other_databases_are_refused_by_name_of_what_there_is(url: str) -> None:
    with pytest.raises(ConfigError, match="neither sqlite:///FILE nor postgresql://USER@HOST/NAME") as caught:
        engine_of(url)
    assert "hunter2" not in str(caught.value)
