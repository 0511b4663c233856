"""The memory cgroup of a process, v1 or v2: limits and use of every ancestor, and its count of OOM kills."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.adapters.cgroup import parse_membership, parse_mounts
from agent.adapters.process_table import PROC

UNLIMITED_BYTES = 1 << 60  # v1 writes "no limit" as 2^63 rounded down to a page


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
        """Smallest (limit - usage, cache counted as free) over every ancestor; None = no limit anywhere."""
        rooms = [room for path in self.ancestors() if (room := self._room_bytes(path)) is not None]
        return min(rooms) if rooms else None

    def own_room_bytes(self) -> int | None:
        """Limit - usage of this cgroup alone, cache counted as free; None = no limit of its own."""
        return self._room_bytes(self.path)

    def headroom_above_bytes(self) -> int | None:
        """Like `headroom_bytes`, of the ancestors alone."""
        above = [room for path in list(self.ancestors())[1:] if (room := self._room_bytes(path)) is not None]
        return min(above, default=None)

    def used_bytes(self) -> int | None:
        """What this cgroup holds and can't drop (cache counted as free); None if it is gone."""
        return self._used_bytes(self.path)

    def oom_kills(self) -> int | None:
        """Processes the OOM killer took here so far (v2: here and below); None where the kernel does not count."""
        for path in self.ancestors():
            name = "memory.events" if self.version == 2 else "memory.oom_control"
            kills = _keyed(path / name).get("oom_kill")
            if kills is not None:
                return kills
        return None

    def _room_bytes(self, path: Path) -> int | None:
        if self.version == 2:
            # memory.high does not kill but throttles so hard that a checkpoint would never end: a limit as well.
            limits = [_number(path / name) for name in ("memory.max", "memory.high")]
        else:
            limits = [_number(path / "memory.limit_in_bytes")]
        set_limits = [limit for limit in limits if limit is not None and limit < UNLIMITED_BYTES]
        used = self._used_bytes(path) if set_limits else None
        return None if used is None else max(0, min(set_limits) - used)

    def _used_bytes(self, path: Path) -> int | None:
        prefix, name = ("", "memory.current") if self.version == 2 else ("total_", "memory.usage_in_bytes")
        usage = _number(path / name)
        if usage is None:
            return None
        stat = _keyed(path / "memory.stat")
        return max(0, usage - sum(stat.get(prefix + cache, 0) for cache in ("inactive_file", "active_file")))


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
        # A path outside of what is mounted (a container's view): the mounted top limits us at least.
        path = mount.locate(membership[key]) or mount.point
        return MemoryCgroup(mount.version, path, mount.point)
    return None


def _number(path: Path) -> int | None:
    """One integer; None for "max" and for a file that is not there (the top has none in v2)."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return None if text == "max" else int(text)


def _keyed(path: Path) -> dict[str, int]:
    """A flat keyed file, "name number" a line; empty if it is not there."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {name: int(value) for name, value in (line.split() for line in lines)}
