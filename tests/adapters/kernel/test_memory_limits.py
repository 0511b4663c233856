"""Tests raised memory limits on files as the v1 and v2 kernels name them, without a kernel behind them."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.adapters.kernel.memory_cgroup import MemoryCgroup
from agent.adapters.kernel.memory_limits import MemoryLimits
from agent.core.types import MIB, Handle, ProcessId

HANDLE = Handle("resize-a", ProcessId("boot-1", 4711, 9988), "127.0.0.1", 9000)
FILES = {
    1: (["memory.memsw.limit_in_bytes", "memory.limit_in_bytes"], "memory.usage_in_bytes"),
    2: (["memory.max", "memory.high"], "memory.current"),
}
MEMSW_LIMIT, MEMSW_USED = "memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes"


@pytest.fixture(params=[1, 2])
def own(request: pytest.FixtureRequest, tmp_path: Path) -> MemoryCgroup:
    path = tmp_path / "cgroup/resize-a"
    path.mkdir(parents=True)
    limits, usage = FILES[request.param]
    for name in limits:
        (path / name).write_text(f"{200 * MIB}\n")
    (path / usage).write_text(f"{150 * MIB}\n")
    if request.param == 1:
        (path / MEMSW_USED).write_text(f"{150 * MIB}\n")
    (path / "memory.stat").write_text("inactive_file 0\n")
    (path / "cgroup.procs").write_text("4711\n")
    return MemoryCgroup(request.param, path, tmp_path / "cgroup")


def limits_of(own: MemoryCgroup) -> set[int]:
    return {int((own.path / name).read_text()) for name in FILES[own.version][0]}


def test_limit_is_raised_by_the_need_and_lowered_again(own: MemoryCgroup, tmp_path: Path) -> None:
    limits = MemoryLimits(tmp_path / "limits", "boot-1")
    assert limits.raise_by_need(HANDLE, own, 64 * MIB) == ""
    assert limits_of(own) == {(150 + 64 + 64) * MIB}
    assert (tmp_path / "limits/resize-a.json").stat().st_mode & 0o777 == 0o600
    limits.lower("resize-a")
    assert limits_of(own) == {200 * MIB}
    assert not list((tmp_path / "limits").iterdir())


def test_recovery_keeps_raised_limits_of_frozen_instances_only(own: MemoryCgroup, tmp_path: Path) -> None:
    MemoryLimits(tmp_path / "limits", "boot-1").raise_by_need(HANDLE, own, 64 * MIB)
    after = MemoryLimits(tmp_path / "limits", "boot-1")
    after.recover(frozen={"resize-a"})
    assert limits_of(own) == {278 * MIB}
    after.recover(frozen=set())
    assert limits_of(own) == {200 * MIB}


def test_limit_is_not_lowered_below_usage(own: MemoryCgroup, tmp_path: Path) -> None:
    limits = MemoryLimits(tmp_path / "limits", "boot-1")
    limits.raise_by_need(HANDLE, own, 64 * MIB)
    usage = own.path / FILES[own.version][1]
    usage.write_text(f"{250 * MIB}\n")
    limits.lower("resize-a")
    assert limits_of(own) == {278 * MIB}
    usage.write_text(f"{100 * MIB}\n")
    limits.lower("resize-a")
    assert limits_of(own) == {200 * MIB}


@pytest.mark.parametrize("own", [2], indirect=True)
def test_v2_limit_is_lowered_only_when_the_cache_fits(own: MemoryCgroup, tmp_path: Path) -> None:
    """Writing memory.max below what is charged reclaims, and kills where that is not enough."""
    (own.path / "memory.high").write_text("max\n")
    limits = MemoryLimits(tmp_path / "limits", "boot-1")
    limits.raise_by_need(HANDLE, own, 64 * MIB)
    assert (own.path / "memory.high").read_text().strip() == "max", "what is not limited is not raised"
    (own.path / "memory.current").write_text(f"{250 * MIB}\n")
    (own.path / "memory.stat").write_text(f"inactive_file {100 * MIB}\n")
    limits.lower("resize-a")
    assert limits.is_raised("resize-a")
    assert (own.path / "memory.max").read_text() == str(278 * MIB)
    assert (own.path / "memory.high").read_text().strip() == "max"
    (own.path / "memory.current").write_text(f"{190 * MIB}\n")
    limits.lower("resize-a")
    assert not limits.is_raised("resize-a")
    assert [(own.path / name).read_text().strip() for name in ("memory.max", "memory.high")] == [str(200 * MIB), "max"]


@pytest.mark.parametrize("own", [1], indirect=True)
def test_v1_counts_swap_if_memsw_is_tighter(own: MemoryCgroup, tmp_path: Path) -> None:
    (own.path / "memory.limit_in_bytes").write_text(f"{400 * MIB}\n")
    (own.path / MEMSW_LIMIT).write_text(f"{400 * MIB}\n")
    (own.path / MEMSW_USED).write_text(f"{390 * MIB}\n")
    assert own.headroom_bytes() == 10 * MIB
    limits = MemoryLimits(tmp_path / "limits", "boot-1")
    assert limits.raise_by_need(HANDLE, own, 64 * MIB) == ""
    assert (own.path / MEMSW_LIMIT).read_text().strip() == str((390 + 128) * MIB)
    assert (own.path / "memory.limit_in_bytes").read_text().strip() == str(400 * MIB), "room enough there"


def test_failed_raise_restores_the_limit(own: MemoryCgroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = "memory.limit_in_bytes" if own.version == 1 else "memory.max"
    write_text, writes = Path.write_text, []

    def second_write_fails(path: Path, data: str, **kwargs: str) -> int:
        writes.append(path.name)
        if path.name == last and writes.count(last) == 1:
            raise OSError(16, "Device or resource busy")
        return write_text(path, data, **kwargs)

    monkeypatch.setattr(Path, "write_text", second_write_fails)
    limits = MemoryLimits(tmp_path / "limits", "boot-1")
    assert "Device or resource busy" in limits.raise_by_need(HANDLE, own, 64 * MIB)
    assert len(writes) > 2, "one was raised before"
    assert limits_of(own) == {200 * MIB}
    assert not limits.is_raised("resize-a")


def test_damaged_record_is_kept_and_logged(own: MemoryCgroup, tmp_path: Path) -> None:
    MemoryLimits(tmp_path / "limits", "boot-1").raise_by_need(HANDLE, own, 64 * MIB)
    (tmp_path / "limits/resize-a.json").write_text("{")
    after = MemoryLimits(tmp_path / "limits", "boot-1")
    after.recover(frozen=set())
    assert (tmp_path / "limits/resize-a.unreadable").read_text() == "{"
    assert not after.is_raised("resize-a")


def test_record_of_another_boot_changes_no_cgroup(own: MemoryCgroup, tmp_path: Path) -> None:
    MemoryLimits(tmp_path / "limits", "boot-1").raise_by_need(HANDLE, own, 64 * MIB)
    MemoryLimits(tmp_path / "limits", "boot-2").recover(frozen=set())
    assert limits_of(own) == {278 * MIB}
    assert not list((tmp_path / "limits").iterdir())


def test_a_limit_above_the_own_one_is_named_in_its_unit(own: MemoryCgroup, tmp_path: Path) -> None:
    limits, usage = FILES[own.version]
    for name in limits:
        (own.path.parent / name).write_text(f"{300 * MIB}\n")
    for name in {usage, MEMSW_USED}:
        (own.path.parent / name).write_text(f"{250 * MIB}\n")
    (own.path.parent / "memory.stat").write_text("inactive_file 0\n")
    why = MemoryLimits(tmp_path / "limits", "boot-1").raise_by_need(HANDLE, own, 64 * MIB)
    assert why == "a memory limit above the instance's own leaves 50 MiB, 128 MiB are needed; raise that one"
    assert limits_of(own) == {200 * MIB}


def test_shared_limit_is_not_raised(own: MemoryCgroup, tmp_path: Path) -> None:
    (own.path / "cgroup.procs").write_text("4711\n4712\n")
    assert "shared" in MemoryLimits(tmp_path / "limits", "boot-1").raise_by_need(HANDLE, own, 64 * MIB)
    assert limits_of(own) == {200 * MIB}
    assert not (tmp_path / "limits").exists()
