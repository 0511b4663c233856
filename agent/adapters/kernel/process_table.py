"""Reads /proc: identifies processes, and finds those that belong to an instance.

A pid alone identifies nothing, because it is reused. An identity is always (boot_id, pid, start time), and signals go
through a pidfd checked against it (the driver accepts any TID as a PID and the wrong target dies).
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.core.types import ProcessId

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """Fields of /proc/PID/stat. `state` is one letter: Z and X are dead, T is stopped. `cpu_ticks` includes waited
    children."""

    pid: int
    state: str
    ppid: int
    session: int
    start_time: int
    cpu_ticks: int = 0
    resident_pages: int = 0

    @property
    def dead(self) -> bool:
        return self.state in "ZX"


def boot_id(proc: Path = PROC) -> str:
    """The kernel's id of this boot; another one means that no earlier process exists any more."""
    return (proc / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def read_stat(pid: int, proc: Path = PROC) -> ProcessStat | None:
    """The process's stat line; None if there is no such process (or thread group)."""
    return _read_stat(proc / str(pid) / "stat")


def _read_stat(path: Path) -> ProcessStat | None:
    try:
        line = path.read_bytes()
    except (FileNotFoundError, ProcessLookupError, NotADirectoryError):
        return None
    # The command is in parentheses and may hold spaces and parentheses itself: count from the last one.
    fields = line[line.rindex(b")") + 2 :].split()
    return ProcessStat(
        pid=int(line[: line.index(b" ")]),
        state=fields[0].decode("ascii"),
        ppid=int(fields[1]),
        session=int(fields[3]),
        start_time=int(fields[19]),
        cpu_ticks=sum(map(int, fields[11:15])),
        resident_pages=int(fields[21]),
    )


def identify(pid: int, boot: str, proc: Path = PROC) -> ProcessId | None:
    """The identity of a running process; None if there is none."""
    stat = read_stat(pid, proc)
    return ProcessId(boot, pid, stat.start_time) if stat else None


def is_alive(process: ProcessId, boot: str, proc: Path = PROC) -> bool:
    """Whether exactly this process still exists. A zombie counts as ended."""
    if process.boot_id != boot:
        return False
    stat = read_stat(process.pid, proc)
    return stat is not None and stat.start_time == process.start_time and not stat.dead


def thread_group(pid: int, proc: Path = PROC) -> int | None:
    """Tgid: equal to `pid` for a process, different for a thread; None if it does not exist."""
    try:
        status = (proc / str(pid) / "status").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    for line in status.splitlines():
        if line.startswith(b"Tgid:"):
            return int(line.split()[1])
    return None


def thread_states(pid: int, proc: Path = PROC) -> list[str]:
    """The state letter of every thread; empty if the process is gone."""
    try:
        threads = os.listdir(proc / str(pid) / "task")
    except (FileNotFoundError, ProcessLookupError):
        return []
    stats = (_read_stat(proc / str(pid) / "task" / thread / "stat") for thread in threads)
    return [stat.state for stat in stats if stat]


def processes(proc: Path = PROC) -> Iterator[ProcessStat]:
    """Every process of the pid namespace, unordered."""
    for name in os.listdir(proc):
        if name.isdigit() and (stat := read_stat(int(name), proc)):
            yield stat


def members(root: ProcessId, boot: str, mark: str, proc: Path = PROC) -> list[ProcessStat]:
    """The living processes of an instance on a host without cgroups.

    A process belongs by descent from `root` (lost when a parent dies), by its session (left by setsid), or by `mark`
    ("NAME=value") in its environment (lost when cleared). One that leaves all three escapes; a cgroup is the real
    fence.
    """
    if root.boot_id != boot:
        return []
    # A process older than the instance can't belong to it; skipping those also saves most of the reading.
    candidates = {s.pid: s for s in processes(proc) if not s.dead and s.start_time >= root.start_time}
    main = candidates.get(root.pid)
    # A session reserves the pid of its leader, so no other process can get that number.
    leads = main is None or main.start_time == root.start_time
    inside = {root.pid} if main and leads else set()
    for stat in candidates.values():
        if (leads and stat.session == root.pid) or _has_mark(stat.pid, mark, proc):
            inside.add(stat.pid)
    add_descendants(inside, candidates.values())
    return [candidates[pid] for pid in sorted(inside)]


def add_descendants(inside: set[int], candidates: Collection[ProcessStat]) -> None:
    """Add to `inside` all descendants of its members."""
    grew = True
    while grew:
        children = {stat.pid for stat in candidates if stat.ppid in inside} - inside
        inside |= children
        grew = bool(children)


def _has_mark(pid: int, mark: str, proc: Path) -> bool:
    try:
        environment = (proc / str(pid) / "environ").read_bytes()
    except OSError:  # gone, or another user's and so not ours
        return False
    return mark.encode() in environment.split(b"\0")


def open_pidfd(process: ProcessId, boot: str, proc: Path = PROC) -> int | None:
    """A pidfd of exactly this process (the caller closes it); None if it is gone. A zombie still has one.

    Raises OSError if it exists but no descriptor can be opened: reporting it as ended would lose a process.
    """
    if process.boot_id != boot:
        return None
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.EINVAL, errno.ENOENT):  # EINVAL, ENOENT: now a thread's number
            return None
        raise
    # Checked after opening: from here on the pid can't be reused.
    stat = read_stat(process.pid, proc)
    if stat is None or stat.start_time != process.start_time:
        os.close(pidfd)
        return None
    return pidfd


def send_signal(process: ProcessId, boot: str, number: signal.Signals) -> bool:
    """Signal exactly this process. False if it is gone. Raises PermissionError."""
    pidfd = open_pidfd(process, boot)
    if pidfd is None:
        return False
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
    return True
