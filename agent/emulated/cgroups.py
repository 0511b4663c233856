"""Tells whether a process's cgroup is frozen. Cheap, because every checkpoint call asks."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def find_v2_mount(mountinfo: str) -> Path | None:
    """Mount point of the whole v2 hierarchy (on pure v2 and hybrid hosts), from the text of mountinfo."""
    for line in mountinfo.splitlines():
        fields = line.split()
        if "-" in fields and fields[fields.index("-") + 1] == "cgroup2" and fields[3] == "/":
            return Path(fields[4])
    return None


class ProcessCgroup:
    """The v2 cgroup of one process, even after the process moves."""

    def __init__(self, pid: int, mount: Path | None) -> None:
        self._mount = mount
        self._where = b""
        self._events = -1
        self._membership = -1
        if mount is not None:
            with suppress(OSError):
                self._membership = os.open(f"/proc/{pid}/cgroup", os.O_RDONLY | os.O_CLOEXEC)

    def frozen(self) -> bool:
        """Whether the process's cgroup or an ancestor is frozen now. False if that is unknown."""
        if self._membership < 0:
            return False
        try:
            membership = os.pread(self._membership, 16384, 0)
            if membership != self._where:
                self._follow(membership)
            return self._events >= 0 and b"frozen 1" in os.pread(self._events, 256, 0)
        except OSError:  # the process or the cgroup is gone
            self._where = b""
            return False

    def _follow(self, membership: bytes) -> None:
        if self._events >= 0:
            os.close(self._events)
            self._events = -1
        path = next((line[3:] for line in membership.splitlines() if line.startswith(b"0::")), b"/").decode()
        self._where = membership
        if self._mount is None or path == "/" or path.startswith("/.."):
            return  # the root can't be frozen, and cgroups above our namespace are invisible
        file = self._mount / path.lstrip("/") / "cgroup.events"
        self._events = os.open(file, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        for fd in (self._events, self._membership):
            if fd >= 0:
                os.close(fd)
        self._events = self._membership = -1
