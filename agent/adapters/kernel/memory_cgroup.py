"""The memory cgroup of a process, v1 or v2: limits and usage of every ancestor, and the count of OOM kills."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.adapters.kernel.cgroup import parse_membership, parse_mounts
from agent.adapters.kernel.process_table import PROC

UNLIMITED_BYTES = 1 << 60  # v1 writes "no limit" as 2^63 rounded down to a page


V1_CAPS = (
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes"),  # with swap; often the same figure as the first
)
# memory.high does not kill but throttles so hard that a checkpoint would never end: a limit as well.
V2_CAPS = (("memory.max", "memory.current"), ("memory.high", "memory.current"))


@dataclass(frozen=True, slots=True)
class Cap:
    """One limit that is set, and the usage that counts against it (without page cache, which is reclaimed)."""

    name: str
    limit_bytes: int
    used_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryCgroup:
    """Where a process's memory is accounted. `path` and its parents up to `top` all limit it."""

    version: int
    path: Path
    top: Path

    def ancestors(self) -> Iterator[Path]:
        """The cgroup itself first, the top of the hierarchy last."""
        yield self.path
        if self.path != self.top:
            for parent in self.path.parents:
                yield parent
                if parent == self.top:
                    return

    def headroom_bytes(self) -> int | None:
        """Smallest (limit - usage, cache counted as free) over all ancestors; None: no limit anywhere."""
        rooms = [room for path in self.ancestors() if (room := self._room_bytes(path)) is not None]
        return min(rooms) if rooms else None

    def headroom_above_bytes(self) -> int | None:
        """Like `headroom_bytes`, without this cgroup's own limits."""
        above = [room for path in list(self.ancestors())[1:] if (room := self._room_bytes(path)) is not None]
        return min(above, default=None)

    def own_caps(self) -> list[Cap]:
        return list(self._caps(self.path))

    def usage_bytes(self) -> int | None:
        """What this cgroup is charged with, cache included; None if it is gone."""
        return _number(self.path / ("memory.current" if self.version == 2 else "memory.usage_in_bytes"))

    def oom_kills(self) -> int | None:
        """Processes that the OOM killer has killed here (v2: here and below); None if the kernel does not count."""
        for path in self.ancestors():
            name = "memory.events" if self.version == 2 else "memory.oom_control"
            kills = _keyed(path / name).get("oom_kill")
            if kills is not None:
                return kills
        return None

    def _room_bytes(self, path: Path) -> int | None:
        return min((max(0, cap.limit_bytes - cap.used_bytes) for cap in self._caps(path)), default=None)

    def _caps(self, path: Path) -> Iterator[Cap]:
        prefix = "" if self.version == 2 else "total_"
        for name, usage in V2_CAPS if self.version == 2 else V1_CAPS:
            limit, used = _number(path / name), _number(path / usage)
            if limit is not None and limit < UNLIMITED_BYTES and used is not None:
                stat = _keyed(path / "memory.stat")
                cache = sum(stat.get(prefix + kind, 0) for kind in ("inactive_file", "active_file"))
                yield Cap(name, limit, max(0, used - cache))


def find(pid: int, proc: Path = PROC) -> MemoryCgroup | None:
    """The memory cgroup of a running process: v1 where that controller is mounted as v1 (hybrid), else v2."""
    try:
        membership = parse_membership((proc / str(pid) / "cgroup").read_text(encoding="utf-8"))
        mounts = parse_mounts((proc / "self/mountinfo").read_text(encoding="utf-8"))
    except (FileNotFoundError, ProcessLookupError):
        return None
    for mount in mounts:
        key = "memory" if mount.version == 1 else ""
        if key not in membership or (mount.version == 1 and "memory" not in mount.controllers):
            continue
        if mount.version == 2 and "memory" in membership:
            continue  # hybrid: v2 is there, but without the memory controller
        # A path outside the mounted part (a container's view): at least the mounted top limits it.
        path = mount.locate(membership[key]) or mount.point
        return MemoryCgroup(mount.version, path, mount.point)
    return None


def _number(path: Path) -> int | None:
    """One integer; None for "max" and for a missing file (the top has none in v2)."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return None if text == "max" else int(text)


def _keyed(path: Path) -> dict[str, int]:
    """A flat keyed file ("name number" lines); empty if it is missing."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {name: int(value) for name, value in (line.split() for line in lines)}
