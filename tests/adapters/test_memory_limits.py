"""A raised memory limit on files as the v1 and v2 kernels name them. No kernel is behind them: what a write does there
is not shown here."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.adapters.memory_cgroup import MemoryCgroup
from agent.adapters.memory_limits import MemoryLimits
from agent.core.types import MIB, Handle, ProcessId

HANDLE = Handle("resize-a", ProcessId("boot-1", 4711, 9988), "127.0.0.1", 9000)
FILES = {
    1: (["memory.memsw.limit_in_bytes", "memory.limit_in_bytes"], "memory.usage_in_bytes"),
    2: (["memory.max", "memory.high"], "memory.current"),
}


@pytest.fixture(params=[1, 2])
def own(request: pytest.FixtureRequest, tmp_path: Path) -> MemoryCgroup:
    path = tmp_path / "cgroup/resize-a"
    path.mkdir(parents=True)
    limits, usage = FILES[request.param]
    for name in limits:
        (path / name).write_text(f"{200 * MIB}\n")
    (path / usage).write_text(f"{150 * MIB}\n")
    (path / "memory.stat").write_text("inactive_file 0\n")
    (path / "cgroup.procs").write_text("4711\n")
    return MemoryCgroup(request.param, path, tmp_path / "cgroup")


def limits_of(own: MemoryCgroup) -> set[int]:
    return {int((own.path / name).read_text()) for name in FILES[own.version][0]}


def test_raised_by_what_is_missing_and_lowered_again(own: MemoryCgroup, tmp_path: Path) -> None:
    limits = MemoryLimits(tmp_path / "limits", "boot-1")
    assert limits.raise_by_need(HANDLE, own, 64 * MIB) == ""
    assert limits_of(own) == {(150 + 64 + 64) * MIB}
    assert (tmp_path / "limits/resize-a.json").stat().st_mode & 0o777 == 0o600
    limits.lower("resize-a")
    assert limits_of(own) == {200 * MIB}
    assert not list((tmp_path / "limits").iterdir())


def test_an_agent_that_died_in_between_lowers_who_is_awake_and_keeps_who_is_frozen(
    own: MemoryCgroup, tmp_path: Path
) -> None:
    MemoryLimits(tmp_path / "limits", "boot-1").raise_by_need(HANDLE, own, 64 * MIB)
    after = MemoryLimits(tmp_path / "limits", "boot-1")
    after.recover(frozen={"resize-a"})
    assert limits_of(own) == {278 * MIB}
    after.recover(frozen=set())
    assert limits_of(own) == {200 * MIB}


def test_never_lowered_below_what_is_in_use(own: MemoryCgroup, tmp_path: Path) -> None:
    limits = MemoryLimits(tmp_path / "limits", "boot-1")
    limits.raise_by_need(HANDLE, own, 64 * MIB)
    usage = own.path / FILES[own.version][1]
    usage.write_text(f"{250 * MIB}\n")
    limits.lower("resize-a")
    assert limits_of(own) == {278 * MIB}
    usage.write_text(f"{100 * MIB}\n")
    limits.lower("resize-a")
    assert limits_of(own) == {200 * MIB}


def test_a_limit_shared_with_others_is_left_alone(own: MemoryCgroup, tmp_path: Path) -> None:
    (own.path / "cgroup.procs").write_text("4711\n4712\n")
    assert "shared" in MemoryLimits(tmp_path / "limits", "boot-1").raise_by_need(HANDLE, own, 64 * MIB)
    assert limits_of(own) == {200 * MIB}
    assert not (tmp_path / "limits").exists()
