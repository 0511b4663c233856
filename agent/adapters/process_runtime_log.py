"""Logs of host processes: a file each, capped without the agent in the data path.

A pipe read by the agent would end with the agent, and the container must not. So the workload appends to a file
(O_APPEND) and the agent, now and then, copies the newest half of the cap to `<log>.1` and truncates (logrotate's
copytruncate). The price: what is written between copy and truncate is lost, and between two looks the file can grow
past the cap by what the disk takes. A program that reopens its stdout without O_APPEND leaves a sparse file.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from agent.adapters.process_runtime_plan import Identity


class LogFiles:
    """`<state_dir>/logs/<uid>.log`: they outlive their instance, the newest `keep` of ended ones."""

    def __init__(self, state_dir: Path, cap_bytes: int, keep: int) -> None:
        self._folder = state_dir / "logs"
        self._cap_bytes = cap_bytes
        self._keep = keep

    def path(self, uid: str) -> Path:
        return self._folder / f"{uid}.log"

    def open(self, uid: str, identity: Identity | None) -> int:
        """A descriptor to append to. The file belongs to the workload's user, so that /dev/stdout can be opened."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        log_fd = os.open(self.path(uid), flags, 0o600)
        if identity:
            os.fchown(log_fd, identity.uid, identity.gid)
        return log_fd

    def read(self, path: Path, tail_bytes: int) -> bytes:
        """The last bytes, over the last rotation where the file itself holds fewer. b"" if there is no log."""
        text = _tail(path, tail_bytes)
        if len(text) < tail_bytes:
            text = _tail(_rotated(path), tail_bytes - len(text)) + text
        return text

    def trim(self, path: Path) -> bool:
        """Rotate if it has passed the cap. True if it did."""
        try:
            if path.stat().st_size <= self._cap_bytes:
                return False
            _rotated(path).write_bytes(_tail(path, self._cap_bytes // 2))
            os.truncate(path, 0)
        except FileNotFoundError:
            return False
        return True

    def prune(self, in_use: Collection[str]) -> None:
        """Delete the oldest logs of ended instances beyond `keep`."""
        used = {self.path(uid) for uid in in_use}
        try:
            ended = [path for path in self._folder.glob("*.log") if path not in used]
        except FileNotFoundError:
            return
        if len(ended) <= self._keep:
            return
        for path in sorted(ended, key=_changed_ns)[: len(ended) - self._keep]:
            path.unlink(missing_ok=True)
            _rotated(path).unlink(missing_ok=True)


def _rotated(path: Path) -> Path:
    return path.with_name(path.name + ".1")


def _changed_ns(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_mtime_ns
    return 0


def _tail(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - max(0, size)))
            return file.read(size) if size > 0 else b""
    except FileNotFoundError:
        return b""
