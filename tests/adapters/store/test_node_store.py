"""Tests the SQLite store with damaged, full and slow disks, the death of the process, and a newer schema."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from agent.adapters.store.node_store import FILE_NAME, NodeStore
from agent.adapters.store.schema import record_of, record_row
from agent.adapters.store.sqlite_thread import StoreHealth
from agent.core.errors import UnavailableError
from agent.core.instance_record import RecordPhase
from tests.contract.test_stores import record, window


async def test_everything_survives_a_reopen(tmp_path: Path) -> None:
    store = await NodeStore.open(tmp_path)
    await store.put_instance(record())
    await store.upsert_windows([window(seq=0), window(seq=1, sealed=False)])
    await store.acknowledge([("i-ocr-1", 0)])
    await store.close()
    again = await NodeStore.open(tmp_path)
    assert list(await again.load_instances()) == [record()]
    assert list(await again.last_windows()) == [window(seq=1, sealed=False)]
    assert list(await again.unacknowledged(10)) == []
    await again.close()


async def test_writes_are_visible_to_readers_before_close(tmp_path: Path) -> None:
    """After a kill -9 the file is as another process sees it now."""
    store = await NodeStore.open(tmp_path)
    await store.upsert_windows([window(sealed=False)])
    with sqlite3.connect(tmp_path / FILE_NAME) as reader:
        assert reader.execute("SELECT count(*) FROM windows").fetchone() == (1,)
    reader.close()
    await store.close()


@pytest.mark.parametrize("found", ["none", "copied back, open to all"])
async def test_only_the_owner_may_read_the_file(tmp_path: Path, found: str) -> None:
    if found != "none":
        (tmp_path / FILE_NAME).touch()
        (tmp_path / FILE_NAME).chmod(0o644)
    store = await NodeStore.open(tmp_path)
    await store.put_instance(record())
    modes = {name: stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in os.listdir(tmp_path)}
    assert modes == {FILE_NAME: 0o600, f"{FILE_NAME}-wal": 0o600, f"{FILE_NAME}-shm": 0o600}
    await store.close()


async def test_damaged_file_is_refused_with_a_fix(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"not a database at all" * 400)
    with pytest.raises(UnavailableError, match="can be moved away") as caught:
        await NodeStore.open(tmp_path)
    assert caught.value.reason == "STORE_FAILED"
    assert (tmp_path / FILE_NAME).read_bytes().startswith(b"not a database")


async def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="STORE_FAILED"):
        await NodeStore.open(tmp_path / "nowhere")


async def test_a_newer_schema_is_refused_untouched(tmp_path: Path) -> None:
    await (await NodeStore.open(tmp_path)).close()
    with sqlite3.connect(tmp_path / FILE_NAME) as other:
        other.execute("PRAGMA user_version = 99")
    other.close()
    with pytest.raises(UnavailableError, match="newer than this program"):
        await NodeStore.open(tmp_path)


async def test_full_disk_fails_the_whole_write_and_heals(tmp_path: Path) -> None:
    store = await NodeStore.open(tmp_path, max_bytes=120_000)
    await store.upsert_windows([window("i-first")])
    with pytest.raises(UnavailableError, match="full"):
        await store.upsert_windows([window(f"i-{n}") for n in range(2_000)])
    assert (store.health.ok, store.health.failures) == (False, 1)
    assert [w.instance_uid for w in await store.read_windows()] == ["i-first"]
    assert store.health == StoreHealth(ok=True)
    await store.close()


async def test_locked_database_fails_at_the_deadline_then_recovers(tmp_path: Path) -> None:
    store = await NodeStore.open(tmp_path, deadline_s=0.2)
    other = sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    async with asyncio.timeout(5):
        with pytest.raises(UnavailableError) as caught:
            await store.put_instance(record())
        assert caught.value.reason == "STORE_FAILED"
        assert store.health.failures == 1
        other.execute("ROLLBACK")
        other.close()
        await store.put_instance(replace(record(), phase=RecordPhase.READY))
    assert [r.phase for r in await store.load_instances()] == [RecordPhase.READY]
    assert store.health == StoreHealth(ok=True)
    await store.close()


async def test_full_queue_fails_at_once(tmp_path: Path) -> None:
    store = await NodeStore.open(tmp_path, deadline_s=0.5, queue_length=2)
    other = sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    writes = [asyncio.create_task(store.upsert_windows([window(seq=n)])) for n in range(8)]
    results = await asyncio.gather(*writes, return_exceptions=True)
    other.close()
    assert sum("already wait for the disk" in str(result) for result in results) >= 5
    await store.close()


async def test_a_closed_store_refuses(tmp_path: Path) -> None:
    store = await NodeStore.open(tmp_path)
    await store.close()
    await store.close()
    with pytest.raises(UnavailableError, match="closed"):
        await store.load_instances()


@pytest.mark.parametrize(
    ("damage", "gpus"),
    [
        ("17", ()),
        ("CAST('{}' AS BLOB)", ()),
        ("CAST('{\"gpu' AS BLOB)", ()),
        ("CAST(x'ff00' AS BLOB)", ()),
        ("CAST(replace(record, 'STARTED', 'HIBERNATING') AS BLOB)", ("GPU-0", "GPU-1")),
        ("CAST(replace(record, 'REQUIRE', 'DREAM') AS BLOB)", ("GPU-0", "GPU-1")),
    ],
)
async def test_a_record_that_cannot_be_read_takes_no_other_with_it(
    tmp_path: Path, damage: str, gpus: tuple[str, ...]
) -> None:
    store = await NodeStore.open(tmp_path)
    await store.put_instance(record())
    await store.put_instance(record("i-ocr-2"))
    _change(tmp_path, f"UPDATE instances SET record = {damage} WHERE uid = 'i-ocr-1'")
    assert list(await store.load_instances()) == [record("i-ocr-2")]
    (lost,) = await store.unreadable_instances()
    assert (lost.uid, lost.gpu_uuids) == ("i-ocr-1", gpus)
    assert lost.handle == (record().handle if gpus else None)
    assert "large" not in lost.problem, "no value of the environment"
    await store.close()


async def test_a_row_of_the_ledger_that_cannot_be_read_takes_no_other_with_it(tmp_path: Path) -> None:
    store = await NodeStore.open(tmp_path)
    await store.upsert_windows([window(seq=0), window(seq=1), window("i-ocr-2")])
    _change(tmp_path, "UPDATE windows SET active_ns = 'x' WHERE instance_uid = 'i-ocr-1' AND seq = 1")
    assert list(await store.unacknowledged(10)) == [window(seq=0), window("i-ocr-2")]
    assert list(await store.read_windows()) == [window(seq=0), window("i-ocr-2")]
    stands_in, other = await store.last_windows()
    assert (stands_in.seq, stands_in.sealed, stands_in.boot_id, other) == (1, True, "", window("i-ocr-2"))
    await store.acknowledge([("i-ocr-1", 0), ("i-ocr-2", 0)])
    assert await store.prune(1 << 62) == 2
    with sqlite3.connect(tmp_path / FILE_NAME) as other_program:
        assert other_program.execute("SELECT active_ns FROM windows").fetchall() == [("x",)], "it stays in the file"
    other_program.close()
    await store.close()


async def test_many_rows_of_the_ledger_that_cannot_be_read_keep_no_other_from_the_upload(tmp_path: Path) -> None:
    store = await NodeStore.open(tmp_path)
    await store.upsert_windows([*(window(seq=seq) for seq in range(5)), window("i-ocr-2")])
    for seq in range(5):
        _change(tmp_path, f"UPDATE windows SET active_ns = 'x' WHERE instance_uid = 'i-ocr-1' AND seq = {seq}")
    assert list(await store.unacknowledged(2)) == [window("i-ocr-2")]
    await store.acknowledge([("i-ocr-2", 0)])
    assert list(await store.unacknowledged(2)) == []
    await store.close()


def _change(folder: Path, statement: str) -> None:
    with sqlite3.connect(folder / FILE_NAME) as other:
        assert other.execute(statement).rowcount == 1
    other.close()


def test_record_of_an_earlier_version_is_read() -> None:
    earlier = record_row(record())[2].replace(b'"phase":', b'"end_reason":"","end_message":"","phase":')
    assert b"end_reason" in earlier
    assert record_of(earlier) == record()
