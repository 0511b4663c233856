"""Tests headroom from files as kernels write them: v1, v2 and hybrid, every ancestor, cache as free."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.adapters.kernel import memory_cgroup, process_table
from agent.adapters.kernel.host_memory import ProcHostMemory
from agent.core.errors import UnavailableError
from agent.core.types import GIB, MIB, Handle, ProcessId
from tests.fakes.host_memory import FakeHostMemory

PID = 4711
BOOT = "6f1c2a34-0000-4000-8000-00000000beef"
STAT = f"{PID} (a (nasty) name) S 1 {PID} {PID} 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 9988 0 0\n"
HANDLE = Handle("resize-a", ProcessId(BOOT, PID, 9988), "127.0.0.1", 9000)
NO_LIMIT_V1 = 9223372036854771712


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    proc = tmp_path / "proc"
    write(proc / "sys/kernel/random/boot_id", BOOT + "\n")
    write(proc / f"{PID}/stat", STAT)
    write(proc / "meminfo", "MemTotal: 8000000 kB\nMemFree: 1000 kB\nMemAvailable: 4194304 kB\n")
    return proc


def mount_v2(proc: Path, top: Path, membership: str) -> None:
    write(proc / "self/mountinfo", f"41 31 0:38 / {top} rw,relatime shared:9 - cgroup2 cgroup2 rw\n")
    write(proc / f"{PID}/cgroup", membership)


def v2_limits(folder: Path, *, limit: str, used: int, cache: int = 0, high: str = "max") -> None:
    write(folder / "memory.max", f"{limit}\n")
    write(folder / "memory.high", f"{high}\n")
    write(folder / "memory.current", f"{used}\n")
    write(folder / "memory.stat", f"anon 1\ninactive_file {cache}\nactive_file 0\n")


def v1_limits(folder: Path, *, limit: int, used: int, cache: int = 0) -> None:
    write(folder / "memory.limit_in_bytes", f"{limit}\n")
    write(folder / "memory.usage_in_bytes", f"{used}\n")
    write(folder / "memory.stat", f"inactive_file 1\ntotal_inactive_file {cache}\ntotal_active_file {cache}\n")


def test_available_is_mem_available(proc: Path) -> None:
    assert ProcHostMemory(proc).available_bytes() == 4 * GIB


def test_a_proc_without_mem_available_is_an_error(proc: Path) -> None:
    write(proc / "meminfo", "MemTotal: 8000000 kB\n")
    with pytest.raises(UnavailableError) as raised:
        ProcHostMemory(proc).available_bytes()
    assert raised.value.reason == "HOST_MEMORY_UNKNOWN"


def test_v2_headroom_is_the_tightest_ancestors_without_cache(proc: Path, tmp_path: Path) -> None:
    top = tmp_path / "cgroup"
    mount_v2(proc, top, "0::/system.slice/hibernode/resize-a\n")
    top.mkdir()
    v2_limits(top / "system.slice/hibernode/resize-a", limit="max", used=900 * MIB)
    v2_limits(top / "system.slice/hibernode", limit=str(1024 * MIB), used=1000 * MIB, cache=500 * MIB)
    v2_limits(top / "system.slice", limit=str(8 * GIB), used=GIB)
    assert ProcHostMemory(proc).headroom_bytes(HANDLE) == 524 * MIB


def test_v2_memory_high_is_a_limit(proc: Path, tmp_path: Path) -> None:
    mount_v2(proc, tmp_path / "cgroup", "0::/resize-a\n")
    v2_limits(tmp_path / "cgroup/resize-a", limit=str(GIB), high=str(512 * MIB), used=500 * MIB)
    assert ProcHostMemory(proc).headroom_bytes(HANDLE) == 12 * MIB


def test_headroom_without_limit_is_none(proc: Path, tmp_path: Path) -> None:
    mount_v2(proc, tmp_path / "cgroup", "0::/resize-a\n")
    v2_limits(tmp_path / "cgroup/resize-a", limit="max", used=GIB)
    assert ProcHostMemory(proc).headroom_bytes(HANDLE) is None


def test_headroom_over_the_limit_is_zero(proc: Path, tmp_path: Path) -> None:
    mount_v2(proc, tmp_path / "cgroup", "0::/resize-a\n")
    v2_limits(tmp_path / "cgroup/resize-a", limit=str(GIB), used=2 * GIB)
    assert ProcHostMemory(proc).headroom_bytes(HANDLE) == 0


def test_hybrid_host_uses_the_v1_memory_controller(proc: Path, tmp_path: Path) -> None:
    memory, unified = tmp_path / "memory", tmp_path / "unified"
    write(
        proc / "self/mountinfo",
        f"41 31 0:38 / {unified} rw - cgroup2 cgroup2 rw\n"
        f"35 31 0:32 / {memory} rw - cgroup cgroup rw,memory\n36 31 0:33 / /x rw - cgroup cgroup rw,devices\n",
    )
    write(proc / f"{PID}/cgroup", "5:devices:/\n4:memory:/jobs/resize-a\n0::/elsewhere\n")
    v2_limits(unified / "elsewhere", limit=str(MIB), used=MIB)
    v1_limits(memory / "jobs/resize-a", limit=NO_LIMIT_V1, used=5 * GIB)
    v1_limits(memory / "jobs", limit=2 * GIB, used=GIB, cache=100 * MIB)
    v1_limits(memory, limit=NO_LIMIT_V1, used=7 * GIB)
    assert ProcHostMemory(proc).headroom_bytes(HANDLE) == GIB + 200 * MIB


def test_inside_a_container_the_mounted_part_counts(proc: Path, tmp_path: Path) -> None:
    top = tmp_path / "cgroup"
    write(proc / "self/mountinfo", f"41 31 0:38 /docker/4f2e {top} rw - cgroup2 cgroup2 rw\n")
    write(proc / f"{PID}/cgroup", "0::/docker/4f2e/hibernode/resize-a\n")
    v2_limits(top / "hibernode/resize-a", limit="max", used=1)
    v2_limits(top, limit=str(GIB), used=24 * MIB)
    assert ProcHostMemory(proc).headroom_bytes(HANDLE) == 1000 * MIB


def test_reused_pid_has_no_headroom(proc: Path, tmp_path: Path) -> None:
    mount_v2(proc, tmp_path / "cgroup", "0::/resize-a\n")
    v2_limits(tmp_path / "cgroup/resize-a", limit=str(GIB), used=0)
    stranger = Handle("resize-a", ProcessId(BOOT, PID, 1234), "127.0.0.1", 9000)
    assert ProcHostMemory(proc).headroom_bytes(stranger) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [("memory.events", "low 0\noom 3\noom_kill 2\n"), ("memory.oom_control", "under_oom 0\noom_kill 2\n")],
)
def test_oom_kills_are_counted_in_v1_and_v2(tmp_path: Path, name: str, text: str) -> None:
    version = 2 if name == "memory.events" else 1
    write(tmp_path / "jobs" / name, text)
    (tmp_path / "jobs/resize-a").mkdir()
    found = memory_cgroup.MemoryCgroup(version, tmp_path / "jobs/resize-a", tmp_path)
    assert found.oom_kills() == 2


def test_real_host_can_be_read() -> None:
    memory = ProcHostMemory()
    assert memory.available_bytes() > MIB
    me = process_table.identify(os.getpid(), process_table.boot_id())
    assert me
    room = memory.headroom_bytes(Handle("me", me, "127.0.0.1", 1))
    assert room is None or room >= 0


def test_v1_with_swap_uses_the_tighter_limit(proc: Path, tmp_path: Path) -> None:
    write(proc / "self/mountinfo", f"35 31 0:32 / {tmp_path / 'memory'} rw - cgroup cgroup rw,memory\n")
    write(proc / f"{PID}/cgroup", "4:memory:/resize-a\n")
    v1_limits(tmp_path / "memory/resize-a", limit=2 * GIB, used=GIB)
    write(tmp_path / "memory/resize-a/memory.memsw.limit_in_bytes", f"{2 * GIB}\n")
    write(tmp_path / "memory/resize-a/memory.memsw.usage_in_bytes", f"{2 * GIB - 8 * MIB}\n")
    assert ProcHostMemory(proc).headroom_bytes(HANDLE) == 8 * MIB


def test_resident_bytes_of_frozen_processes_bound_their_image(proc: Path) -> None:
    write(proc / f"{PID}/statm", "90000 5000 1200 1 0 8000 0\n")
    page = os.sysconf("SC_PAGE_SIZE")
    assert ProcHostMemory(proc).resident_bytes([PID, 4712]) == 5000 * page, "one of them has ended"


def test_image_sizes_outlive_the_agent_but_not_their_instances(proc: Path, tmp_path: Path) -> None:
    before = ProcHostMemory(proc, images=tmp_path / "images")
    assert before.noted_image("resize-a") is None
    for uid, size in [("resize-a", GIB), ("resize-b", GIB), ("resize-a", 2 * GIB), ("resize-c", GIB)]:
        before.note_image(uid, size)
    after = ProcHostMemory(proc, images=tmp_path / "images")
    assert after.noted_image("resize-a") == 2 * GIB
    write(tmp_path / "images/resize-b.bytes", "")  # left by a full disk
    assert after.noted_image("resize-b") is None
    write(tmp_path / "images/resize-d.partial", "1")  # left by an agent that died while it wrote
    after.recover(living=["resize-a", "resize-b"], frozen=["resize-a"])
    after.forget("resize-b")
    after.forget("resize-b")
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["resize-a.bytes"]


def test_without_folders_nothing_is_raised_and_nothing_remembered(proc: Path) -> None:
    memory = ProcHostMemory(proc)
    assert "memorySize" in memory.raise_limit(HANDLE, GIB)
    memory.note_image("resize-a", GIB)
    assert memory.noted_image("resize-a") is None
    assert not memory.limit_raised("resize-a")
    memory.lower_limit("resize-a")
    memory.recover([], [])


def test_fake_returns_configured_values() -> None:
    fake = FakeHostMemory(available=GIB)
    assert fake.headroom_bytes(HANDLE) is None
    fake.headroom["resize-a"] = MIB
    assert (fake.available_bytes(), fake.headroom_bytes(HANDLE)) == (GIB, MIB)
