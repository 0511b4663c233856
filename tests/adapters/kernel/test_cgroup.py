"""Tests finding cgroups in what kernels print, and operations on real ones."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.adapters.kernel import cgroup, process_table
from agent.adapters.kernel.cgroup import CgroupMount, CgroupSlice
from agent.adapters.kernel.cgroup_freezer import CgroupFreezer, SignalFreezer, instance_mark
from agent.core.errors import DeadlineError, PreconditionError
from agent.core.types import Handle
from agent.ports import FreezerState, ProcessFreezer

HYBRID = """\
23 1 254:0 / / rw,relatime - ext4 /dev/root rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:5 - cgroup cgroup rw,memory
36 31 0:33 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate
"""


def test_the_v2_mount_is_found_beside_v1() -> None:
    mount = cgroup.find_v2_mount(HYBRID)
    assert mount
    assert (mount.point, mount.root) == (Path("/sys/fs/cgroup/unified"), "/")
    assert [sorted(mount.controllers) for mount in cgroup.parse_mounts(HYBRID)] == [["memory"], ["cpu", "cpuacct"], []]


def test_a_host_with_v1_only_has_none() -> None:
    assert cgroup.find_v2_mount("\n".join(HYBRID.splitlines()[:4])) is None


def test_spaces_in_a_mount_point_are_unescaped() -> None:
    line = "41 31 0:38 / /mnt/c\\040groups rw - cgroup2 none rw"
    assert cgroup.parse_mounts(line)[0].point == Path("/mnt/c groups")


@pytest.mark.parametrize(
    ("root", "inside", "found"),
    [
        ("/", "/system.slice/hibernode.service", "/sys/fs/cgroup/system.slice/hibernode.service"),
        ("/docker/4f2e", "/docker/4f2e/job", "/sys/fs/cgroup/job"),
        ("/docker/4f2e", "/docker/4f2e", "/sys/fs/cgroup"),
        ("/docker/4f2e", "/docker/4f2eff/job", None),
        ("/docker/4f2e", "/user.slice", None),
        ("/", "/../../elsewhere", None),
    ],
)
def test_a_membership_is_located_in_the_mount(root: str, inside: str, found: str | None) -> None:
    mount = CgroupMount(2, Path("/sys/fs/cgroup"), root, frozenset())
    assert mount.locate(inside) == (Path(found) if found else None)


def test_memberships_of_named_and_joint_hierarchies() -> None:
    text = "9:name=systemd:/\n4:cpu,cpuacct:/jobs\n0::/a:b\n"
    assert cgroup.parse_membership(text) == {"name=systemd": "/", "cpu": "/jobs", "cpuacct": "/jobs", "": "/a:b"}


async def test_poll_until_stops_at_the_deadline() -> None:
    looks = 0

    def never() -> bool:
        nonlocal looks
        looks += 1
        return False

    assert not await cgroup.poll_until(never, 0.02)
    assert looks >= 4
    assert await cgroup.poll_until(lambda: True, 0.0)


@pytest.mark.root
@pytest.mark.parametrize("delegated", [True, False])
def test_slice_is_in_the_own_cgroup_only_if_delegated(tmp_path: Path, delegated: bool) -> None:
    mount = cgroup.find_v2_mount(Path("/proc/self/mountinfo").read_text())
    if os.geteuid() != 0 or mount is None or mount.root != "/":
        pytest.skip("needs root and the top of a v2 hierarchy")
    name = f"hibernode-test-{uuid.uuid4().hex[:8]}.service"
    unit = mount.point / name
    unit.mkdir()
    try:
        if delegated:
            os.setxattr(unit, "trusted.delegate", b"1")
        (tmp_path / "mountinfo").write_text(Path("/proc/self/mountinfo").read_text())
        (tmp_path / "cgroup").write_text(f"4:memory:/\n0::/{name}\n")
        found = cgroup.open_slice("12345678-9abc-4def-8000-000000000000", tmp_path)
        assert found
        assert found.path == (unit if delegated else mount.point) / "hibernode-123456789abc"
        assert not found.path.exists(), "made with the first instance"
    finally:
        unit.rmdir()


def test_no_slice_without_v2(tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_text("\n".join(HYBRID.splitlines()[:4]))
    assert cgroup.open_slice(str(uuid.uuid4()), tmp_path) is None


def spawn(*argv: str, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv, env=environment or None)


@pytest.fixture
def slice_() -> Iterator[CgroupSlice]:
    found = cgroup.open_slice(str(uuid.uuid4()))
    if found is None:
        pytest.skip("this user can't write a v2 cgroup here")
    yield found
    for uid in found.uids():
        cgroup.send_kill(found.path_of(uid))
        for folder in cgroup.subtree(found.path_of(uid)):
            folder.rmdir()
    found.remove_if_empty()


STATE_UUID = str(uuid.uuid4())


@pytest.fixture(params=["cgroup", "signal"])
def frozen_pair(request: pytest.FixtureRequest) -> Iterator[tuple[ProcessFreezer, Handle]]:
    """A freezer and a running instance of two processes, in its own cgroup if the freezer needs one."""
    boot = process_table.boot_id()
    found = cgroup.open_slice(STATE_UUID) if request.param == "cgroup" else None
    if request.param == "cgroup" and found is None:
        pytest.skip("this user can't write a v2 cgroup here")
    path = found.create("resize-a") if found else None
    name, value = instance_mark(STATE_UUID, "resize-a").split("=")
    process = subprocess.Popen(
        ["/bin/sh", "-c", "sleep 86397 & wait"], env={name: value, "PATH": "/usr/bin:/bin"}, start_new_session=True
    )
    if path:
        (path / "cgroup.procs").write_text(str(process.pid))
    identity = process_table.identify(process.pid, boot)
    assert identity
    freezer: ProcessFreezer = CgroupFreezer() if path else SignalFreezer(STATE_UUID, boot)
    yield freezer, Handle("resize-a", identity, "127.0.0.1", 9000, str(path or ""))
    for stat in process_table.members(identity, boot, f"{name}={value}"):
        os.kill(stat.pid, signal.SIGKILL)
    process.kill()
    process.wait(10)
    if found and path:
        asyncio.run(cgroup.remove(path, 10.0))
        found.remove_if_empty()


async def test_freeze_and_thaw_again_and_again(frozen_pair: tuple[ProcessFreezer, Handle]) -> None:
    freezer, handle = frozen_pair
    assert freezer.state(handle) is FreezerState.THAWED
    for _ in range(20):
        await freezer.freeze(handle)
        await freezer.freeze(handle)
        assert freezer.is_frozen(handle)
        await freezer.thaw(handle)
        await freezer.thaw(handle)
        assert freezer.state(handle) is FreezerState.THAWED


async def test_external_freeze_is_seen(
    frozen_pair: tuple[ProcessFreezer, Handle],
) -> None:
    freezer, handle = frozen_pair
    stranger = CgroupFreezer() if handle.cgroup else SignalFreezer(STATE_UUID, handle.process.boot_id)
    await stranger.freeze(handle)
    assert freezer.is_frozen(handle)
    await freezer.thaw(handle)
    assert freezer.state(handle) is FreezerState.THAWED


async def test_fork_storm_is_frozen_completely(frozen_pair: tuple[ProcessFreezer, Handle]) -> None:
    freezer, handle = frozen_pair
    name, value = instance_mark(STATE_UUID, "resize-a").split("=")
    environment = {name: value, "PATH": "/usr/bin:/bin"}
    storm = spawn("/bin/sh", "-c", "while :; do /bin/true; done", **environment)
    try:
        if handle.cgroup:
            (Path(handle.cgroup) / "cgroup.procs").write_text(str(storm.pid))
        await freezer.freeze(handle)
        assert freezer.is_frozen(handle)
        before = storm_forks()
        await asyncio.sleep(0)
        assert freezer.is_frozen(handle)
        assert storm_forks() == before
    finally:
        storm.kill()
        storm.wait(10)


def storm_forks() -> list[int]:
    mark = instance_mark(STATE_UUID, "resize-a").encode()
    found = []
    for stat in process_table.processes():
        try:
            environment = (Path("/proc") / str(stat.pid) / "environ").read_bytes()
        except OSError:
            continue
        if mark in environment:
            found.append(stat.pid)
    return sorted(found)


async def kill_members(freezer: ProcessFreezer, handle: Handle) -> None:
    mark = instance_mark(STATE_UUID, "resize-a")

    def gone() -> bool:
        for stat in process_table.members(handle.process, handle.process.boot_id, mark):
            os.kill(stat.pid, signal.SIGKILL)
        return freezer.state(handle) is FreezerState.GONE

    assert await cgroup.poll_until(gone, 10.0)


async def test_gone_instance_cannot_be_frozen(frozen_pair: tuple[ProcessFreezer, Handle]) -> None:
    freezer, handle = frozen_pair
    await kill_members(freezer, handle)
    with pytest.raises(PreconditionError):
        await freezer.freeze(handle)
    if handle.cgroup:
        await cgroup.remove(Path(handle.cgroup), 10.0)
    with pytest.raises(PreconditionError) as raised:
        await freezer.freeze(handle)
    assert raised.value.reason == "INSTANCE_GONE"
    with pytest.raises(PreconditionError):
        await freezer.thaw(handle)


async def test_frozen_instance_dies_of_sigkill(frozen_pair: tuple[ProcessFreezer, Handle]) -> None:
    freezer, handle = frozen_pair
    await freezer.freeze(handle)
    if handle.cgroup:
        await cgroup.kill(Path(handle.cgroup), 10.0)
        assert freezer.state(handle) is FreezerState.GONE
    else:
        await kill_members(freezer, handle)


async def test_thaw_fails_while_an_ancestor_is_frozen(slice_: CgroupSlice) -> None:
    path = slice_.create("resize-a")
    process = spawn("sleep", "86397")
    try:
        (path / "cgroup.procs").write_text(str(process.pid))
        identity = process_table.identify(process.pid, process_table.boot_id())
        assert identity
        handle = Handle("resize-a", identity, "127.0.0.1", 9000, str(path))
        freezer = CgroupFreezer()
        cgroup.write_freeze(slice_.path, frozen=True)
        assert await cgroup.poll_until(lambda: freezer.is_frozen(handle), 10.0)
        with pytest.raises(DeadlineError) as raised:
            await freezer.thaw(handle, deadline_s=0.02)
        assert raised.value.reason == "THAW_TIMEOUT"
        cgroup.write_freeze(slice_.path, frozen=False)
        assert await cgroup.poll_until(lambda: freezer.state(handle) is FreezerState.THAWED, 10.0)
    finally:
        process.kill()
        process.wait(10)


async def test_remove_includes_nested_cgroups_and_processes(slice_: CgroupSlice) -> None:
    path = slice_.create("resize-a")
    nested = path / "made-by-the-workload" / "deeper"
    nested.mkdir(parents=True)
    process = spawn("sleep", "86397")
    (nested / "cgroup.procs").write_text(str(process.pid))
    assert cgroup.procs(path) == [process.pid]
    assert slice_.uids() == ["resize-a"]
    cgroup.write_freeze(path, frozen=True)
    await cgroup.remove(path, 10.0)
    assert process.wait(10) == -signal.SIGKILL
    assert not path.exists()
    await cgroup.remove(path, 10.0)


async def test_processes_are_killed_one_by_one_without_cgroup_kill(
    slice_: CgroupSlice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux before 5.14 has no cgroup.kill."""
    path = slice_.create("resize-a")
    process = spawn("sleep", "86397")
    (path / "cgroup.procs").write_text(str(process.pid))
    write_text = Path.write_text

    def old_kernel(file: Path, text: str, encoding: str | None = None) -> int:
        if file.name == "cgroup.kill":
            raise FileNotFoundError(file)
        return write_text(file, text, encoding)

    monkeypatch.setattr(Path, "write_text", old_kernel)
    await cgroup.kill(path, 10.0)
    assert process.wait(10) == -signal.SIGKILL


async def test_empty_slice_is_removed_and_made_again(slice_: CgroupSlice) -> None:
    assert slice_.uids() == []
    path = slice_.create("resize-a")
    slice_.remove_if_empty()
    assert path.exists()
    await cgroup.remove(path, 10.0)
    slice_.remove_if_empty()
    assert not slice_.path.exists()
