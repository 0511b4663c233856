"""Translates pids between pid namespaces: the driver process runs in the host's, callers and targets in any."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def _status(path: Path, key: str) -> list[int]:
    try:
        for line in path.read_text().splitlines():
            if line.startswith(key):
                return [int(number) for number in line.split()[1:]]
    except OSError:
        pass
    return []


def namespace_of(pid: int) -> int:
    """Inode of a process's pid namespace; 0 if it is not visible (gone, or another user's)."""
    try:
        return os.stat(f"/proc/{pid}/ns/pid").st_ino
    except OSError:
        return 0


def pid_inside(pid: int) -> int:
    """The pid of a process (by host pid) in its own, innermost pid namespace; 0 if it is gone."""
    inside = _status(Path(f"/proc/{pid}/status"), "NSpid:")
    return inside[-1] if inside else 0


def process_of_thread(tid: int) -> int:
    """The process of a thread (a main thread's is its own number); 0 if there is none."""
    found = _status(Path(f"/proc/{tid}/status"), "Tgid:")
    return found[0] if found else 0


def thread_of(pid: int, inside: int) -> int:
    """Host tid of the thread with tid `inside` in the namespace of process `pid`; 0 if it is gone."""
    tasks = Path(f"/proc/{pid}/task")
    if _status(tasks / str(inside) / "status", "NSpid:") == [inside]:
        return inside
    try:
        tids = sorted(tasks.iterdir())
    except OSError:
        return 0
    return next((int(task.name) for task in tids if _status(task / "status", "NSpid:")[-1:] == [inside]), 0)


def find_inside(namespace: int, inside: int, candidates: Iterable[int]) -> int:
    """The candidate (host pid) that has pid `inside` in that pid namespace; 0 if none has."""
    for pid in candidates:
        if pid_inside(pid) == inside and namespace_of(pid) == namespace:
            return pid
    return 0
