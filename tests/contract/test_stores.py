"""The contract of the stores: the fake in memory, and SQLite on disk."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.adapters.store.node_store import NodeStore
from agent.core.billing.window import UsageWindow
from agent.core.instance_record import InstanceRecord, RecordPhase
from agent.core.types import FunctionSpec, GpuNeed, Handle, Hook, Hooks, InstanceSpec, ProcessId
from tests.fakes.stores import MemoryStore

Store = NodeStore | MemoryStore


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    if request.param == "memory":
        yield MemoryStore()
    else:
        opened = await NodeStore.open(tmp_path)
        yield opened
        await opened.close()


def window(uid: str = "i-ocr-1", seq: int = 0, *, sealed: bool = True, active_ns: int = 10) -> UsageWindow:
    return UsageWindow(
        instance_uid=uid,
        seq=seq,
        node="gpu-7",
        boot_id="boot-a",
        function="ocr",
        state="RUNNING",
        gpu_model="NVIDIA L20",
        gpu_uuids=("GPU-0", "GPU-1"),
        gpu_count=2,
        gpu_memory_bytes=48 << 30,
        vcpu_millis=8_000,
        memory_bytes=64 << 30,
        disk_bytes=10 << 30,
        start_mono_ns=seq * 100,
        end_mono_ns=seq * 100 + 100,
        start_wall_ns=1_700_000_000_000_000_000 + seq * 100,
        active_ns=active_ns,
        idle_ns=100 - active_ns,
        unbilled_ns=0,
        invocations=1,
        estimated=False,
        sealed=sealed,
    )


def record(uid: str = "i-ocr-1") -> InstanceRecord:
    function = FunctionSpec(
        "ocr",
        command=("python", "app.py"),
        environment=(("MODEL", "large"),),
        gpu=GpuNeed(2, "NVIDIA L20"),
        hooks=Hooks(initializer=Hook(300_000_000_000)),
    )
    return InstanceRecord(
        spec=InstanceSpec(uid, "ocr/1/0/0", function),
        phase=RecordPhase.STARTED,
        handle=Handle(uid, ProcessId("boot-a", 4242, 99), "127.0.0.1", 9000, "/sys/fs/cgroup/x", "/log"),
        gpu_uuids=("GPU-0", "GPU-1"),
        create_wall_ns=1_700_000_000_000_000_000,
    )


async def test_a_record_comes_back_as_it_was(store: Store) -> None:
    await store.put_instance(record())
    assert list(await store.load_instances()) == [record()]


async def test_a_record_is_replaced_and_deleted(store: Store) -> None:
    await store.put_instance(replace(record(), handle=None, phase=RecordPhase.CREATED))
    await store.put_instance(record("i-ocr-2"))
    await store.put_instance(replace(record(), phase=RecordPhase.ENDED))
    assert [(r.spec.uid, r.phase) for r in await store.load_instances()] == [
        ("i-ocr-1", RecordPhase.ENDED),
        ("i-ocr-2", RecordPhase.STARTED),
    ]
    await store.delete_instance("i-ocr-1")
    await store.delete_instance("i-ocr-1")
    assert [r.spec.uid for r in await store.load_instances()] == ["i-ocr-2"]


async def test_an_open_window_grows_and_a_sealed_one_never_changes(store: Store) -> None:
    await store.upsert_windows([window(sealed=False, active_ns=1)])
    await store.upsert_windows([window(sealed=False, active_ns=2)])
    await store.upsert_windows([window(sealed=True, active_ns=3)])
    await store.upsert_windows([window(sealed=False, active_ns=4)])
    await store.upsert_windows([window(sealed=True, active_ns=5)])
    assert list(await store.read_windows()) == [window(sealed=True, active_ns=3)]


async def test_nothing_to_write_is_no_error(store: Store) -> None:
    await store.upsert_windows([])
    await store.acknowledge([])
    assert list(await store.read_windows()) == []


async def test_the_last_window_of_every_instance(store: Store) -> None:
    await store.upsert_windows([window(seq=0), window(seq=1, sealed=False), window("i-ocr-2", seq=7)])
    assert list(await store.last_windows()) == [window(seq=1, sealed=False), window("i-ocr-2", seq=7)]


async def test_only_sealed_unacknowledged_windows_wait_for_upload_in_order(store: Store) -> None:
    await store.upsert_windows([window("i-b", 0), window("i-a", 1), window("i-a", 0), window("i-a", 2, sealed=False)])
    assert [(w.instance_uid, w.seq) for w in await store.unacknowledged(10)] == [("i-a", 0), ("i-a", 1), ("i-b", 0)]
    assert [(w.instance_uid, w.seq) for w in await store.unacknowledged(2)] == [("i-a", 0), ("i-a", 1)]
    await store.acknowledge([("i-a", 0), ("i-a", 2), ("i-nobody", 0)])
    await store.upsert_windows([window("i-a", 2)])
    assert [(w.instance_uid, w.seq) for w in await store.unacknowledged(10)] == [("i-a", 1), ("i-a", 2), ("i-b", 0)]


async def test_refused_windows_make_way_and_only_the_newest_are_kept(store: Store) -> None:
    await store.upsert_windows([window(seq=seq) for seq in range(5)] + [window(seq=5, sealed=False)])
    await store.acknowledge([("i-ocr-1", 0)])
    await store.refuse([("i-ocr-1", seq) for seq in (0, 1, 2, 3, 5)] + [("i-nobody", 0)], kept=2)
    assert [w.seq for w in await store.unacknowledged(10)] == [4]
    assert [w.seq for w in await store.read_windows()] == [0, 2, 3, 4, 5], "1 was the oldest of those refused"
    assert await store.prune(1 << 62) == 1, "only what was acknowledged"
    await store.refuse([], kept=2)
    assert [w.seq for w in await store.read_windows()] == [2, 3, 4, 5]


async def test_only_old_acknowledged_windows_are_pruned(store: Store) -> None:
    await store.upsert_windows([window(seq=0), window(seq=1), window(seq=2), window(seq=3, sealed=False)])
    await store.acknowledge([("i-ocr-1", 0), ("i-ocr-1", 2)])
    assert await store.prune(window(seq=2).start_wall_ns) == 1
    assert [w.seq for w in await store.read_windows()] == [1, 2, 3]
    assert await store.prune(1 << 62) == 1
    assert [w.seq for w in await store.read_windows()] == [1, 3]


async def test_reading_is_bounded_and_by_instance(store: Store) -> None:
    await store.upsert_windows([window("i-a", 0), window("i-b", 0), window("i-a", 1)])
    assert [w.seq for w in await store.read_windows("i-a")] == [0, 1]
    assert len(await store.read_windows(limit=2)) == 2
