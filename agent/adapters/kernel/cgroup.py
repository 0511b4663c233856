"""Cgroups: where v2 is mounted, the agent's slice, and operations on one cgroup.

v2 is used wherever it is mounted, also beside v1 controllers (hybrid hosts): freeze, events and kill need no
controller. Kernel docs: Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from agent.core.errors import DeadlineError

PROC_SELF = Path("/proc/self")


@dataclass(frozen=True, slots=True)
class CgroupMount:
    """One mounted hierarchy."""

    version: int
    point: Path
    root: str  # the part of the hierarchy that is mounted; "/" except in containers
    controllers: frozenset[str]  # v1 only; empty for v2

    def locate(self, cgroup: str) -> Path | None:
        """The folder of a path from /proc/PID/cgroup; None if it lies outside the mounted part."""
        top = self.root.rstrip("/")
        if cgroup.startswith("/..") or not f"{cgroup}/".startswith(f"{top}/"):
            return None
        return self.point / cgroup.removeprefix(top).lstrip("/")


def parse_mounts(mountinfo: str) -> list[CgroupMount]:
    """The cgroup hierarchies of a /proc/PID/mountinfo (format: proc(5))."""
    mounts = []
    for line in mountinfo.splitlines():
        fields = line.split(" ")
        kind, _source, options = fields[fields.index("-") + 1 :][:3]
        if kind not in ("cgroup", "cgroup2"):
            continue
        point = fields[4].replace("\\040", " ").replace("\\134", "\\")
        controllers = frozenset(options.split(",")) - {"rw", "ro"} if kind == "cgroup" else frozenset[str]()
        mounts.append(CgroupMount(2 if kind == "cgroup2" else 1, Path(point), fields[3], controllers))
    return mounts


def parse_membership(text: str) -> dict[str, str]:
    """A /proc/PID/cgroup as {controller: path}; the key of v2 is ""."""
    membership = {}
    for line in text.splitlines():
        _number, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            membership[controller] = path
    return membership


def find_v2_mount(mountinfo: str) -> CgroupMount | None:
    return next((mount for mount in parse_mounts(mountinfo) if mount.version == 2), None)


# ---- our slice -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CgroupSlice:
    """The parent of all instances' cgroups: `hibernode-<first 12 digits of the state directory's UUID>`."""

    path: Path

    def path_of(self, uid: str) -> Path:
        return self.path / uid

    def create(self, uid: str) -> Path:
        """Make the instance's cgroup. Raises FileExistsError if there is one: the caller destroys it first."""
        self.path.mkdir(exist_ok=True)
        path = self.path_of(uid)
        path.mkdir()
        return path

    def uids(self) -> list[str]:
        """Instances that have a cgroup here; all are ours, because the slice's name holds the UUID."""
        try:
            return sorted(entry.name for entry in os.scandir(self.path) if entry.is_dir())
        except FileNotFoundError:
            return []

    def remove_if_empty(self) -> None:
        with suppress(OSError):
            self.path.rmdir()


def open_slice(state_uuid: str, proc_self: Path = PROC_SELF) -> CgroupSlice | None:
    """The slice, or None where no v2 cgroup can be written (SIGSTOP is the fallback).

    Under a service manager that delegated the agent's own cgroup, it lies there (the unit needs Delegate=yes and
    KillMode=process, because instances outlive the agent). Otherwise root uses the top of the hierarchy, like runc, so
    that the end of a session does not end the instances; other users have only their own cgroup.
    """
    mount = find_v2_mount((proc_self / "mountinfo").read_text(encoding="utf-8"))
    if mount is None:
        return None
    name = f"hibernode-{state_uuid.replace('-', '')[:12]}"
    membership = parse_membership((proc_self / "cgroup").read_text(encoding="utf-8"))
    own = mount.locate(membership.get("", "/"))
    if own and own.name == name:  # the agent was started inside its own slice
        own = own.parent
    delegated = own is not None and _is_delegated(own)
    candidates = [own, mount.point] if delegated or os.geteuid() != 0 else [mount.point, own]
    for parent in candidates:
        if parent is not None and _can_host(parent, parent / name):
            return CgroupSlice(parent / name)
    return None


def _is_delegated(path: Path) -> bool:
    """systemd marks delegated cgroups with an extended attribute (CGROUP_DELEGATION in its docs)."""
    for name in ("trusted.delegate", "user.delegate"):
        with suppress(OSError):
            if os.getxattr(path, name) == b"1":
                return True
    return False


def _can_host(parent: Path, path: Path) -> bool:
    """Make the slice and check that a process could be moved in and frozen there."""
    try:
        path.mkdir(exist_ok=True)
    except OSError:
        return False
    needed = (parent / "cgroup.procs", path / "cgroup.procs")
    usable = all(os.access(file, os.W_OK) for file in needed) and (path / "cgroup.freeze").exists()
    with suppress(OSError):  # the first instance makes it again
        path.rmdir()
    return usable


# ---- one cgroup ------------------------------------------------------------------------------------------------


def read_events(path: Path) -> dict[str, int] | None:
    """`cgroup.events` as {"populated": 0|1, "frozen": 0|1}; None if the cgroup is gone."""
    try:
        text = _read(path, "cgroup.events")
    except OSError:  # ENOENT, or ENODEV if it went away between open and read
        return None
    return {name.decode(): int(value) for name, value in (line.split() for line in text.splitlines())}


def write_freeze(path: Path, frozen: bool) -> None:
    """Request a freeze or thaw. The kernel is asynchronous: a thaw shows at once, a freeze when the last thread
    stopped."""
    descriptor = os.open(f"{path}/cgroup.freeze", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, b"1" if frozen else b"0")
    finally:
        os.close(descriptor)


def freeze_requested(path: Path) -> bool:
    """Whether `cgroup.freeze` is set on this very cgroup (`frozen` may also come from an ancestor)."""
    try:
        return _read(path, "cgroup.freeze").strip() == b"1"
    except OSError:
        return False


def _read(path: Path, name: str) -> bytes:
    """A whole small file, without Python's buffered text layer, which would cost every wake 0.1 ms."""
    descriptor = os.open(f"{path}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)


def subtree(path: Path) -> list[Path]:
    """The cgroup and all its descendants, children first."""
    return [Path(folder) for folder, _dirs, _files in os.walk(path, topdown=False)]


def procs(path: Path) -> list[int]:
    """Pids of the processes in the cgroup and below, without those of a foreign pid namespace (they read as 0)."""
    pids: set[int] = set()
    for folder in subtree(path):
        with suppress(OSError):
            pids.update(map(int, (folder / "cgroup.procs").read_text(encoding="ascii").split()))
    return sorted(pids - {0})


async def poll_until(done: Callable[[], bool], deadline_s: float) -> bool:
    """Poll for a change that the kernel makes soon: three times at once, after 200 us, then every 2 ms. Waiting for
    cgroup.events is up to 18 ms late (agent/docs/facts/emulated-driver.md, pitfall 16). False at the deadline."""
    for _ in range(3):
        if done():
            return True
    try:
        async with asyncio.timeout(deadline_s):
            await asyncio.sleep(0.0002)
            while not done():  # noqa: ASYNC110 - the kernel's event for it comes too late
                await asyncio.sleep(0.002)
    except TimeoutError:
        return done()
    return True


def is_empty(path: Path) -> bool:
    """Whether no living process is in it or below (zombies do not count), or it does not exist."""
    events = read_events(path)
    return events is None or events["populated"] == 0


def send_kill(path: Path) -> None:
    """SIGKILL every process in it and below, frozen ones too: by `cgroup.kill` (Linux 5.14), else one by one."""
    try:
        (path / "cgroup.kill").write_text("1", encoding="ascii")
    except FileNotFoundError:
        for pid in procs(path):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


async def kill(path: Path, deadline_s: float) -> None:
    """SIGKILL everything in it and wait until it is empty. Raises DeadlineError KILL_TIMEOUT."""

    def emptied() -> bool:
        if is_empty(path):
            return True
        send_kill(path)  # at every check: killed one by one, a fork can slip through
        return False

    if not await poll_until(emptied, deadline_s):
        raise DeadlineError(
            "KILL_TIMEOUT",
            f"processes still exist {deadline_s:g} s after SIGKILL; one may be stuck in the driver: see `dmesg`",
            cgroup=str(path),
            pids=",".join(map(str, procs(path)[:16])),
        )


async def remove(path: Path, deadline_s: float) -> None:
    """Kill what is inside and remove the cgroup with its descendants. Idempotent. Raises DeadlineError KILL_TIMEOUT."""
    await kill(path, deadline_s)
    if not await poll_until(lambda: _try_remove(path), deadline_s):
        raise DeadlineError("KILL_TIMEOUT", "the cgroup stays busy and can't be removed", cgroup=str(path))


def _try_remove(path: Path) -> bool:
    for folder in subtree(path):
        with suppress(OSError):
            folder.rmdir()
    return not path.exists()
