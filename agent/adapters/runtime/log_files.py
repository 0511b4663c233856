"""Log files of host processes, capped without the agent in the data path.

A pipe read by the agent would end with the agent, and the container must not. So the workload appends to a file
(O_APPEND); now and then the agent copies the newest half of the cap to `<log>.1` and truncates (logrotate's
copytruncate). What is written between copy and truncate is lost, and between two checks the file can grow past the cap.
A program that reopens its stdout without O_APPEND leaves a sparse file.

The workload holds the file open and may be hostile; the reader may be root. So nothing here follows a link or waits:
opening a file whose owner has leased it (fcntl F_SETLEASE) blocks for 45 s. O_NONBLOCK turns that into a
BlockingIOError, and a workload of another user does not own its log but writes to it by its group.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from io import FileIO
from pathlib import Path

from agent.adapters.runtime.bundles import WorkloadUser

_SAFELY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class LogFiles:
    """`<state_dir>/logs/<uid>.log`. Logs outlive their instance; of ended ones the newest `keep` stay."""

    def __init__(self, state_dir: Path, cap_bytes: int, keep: int) -> None:
        self._folder = state_dir / "logs"
        self._cap_bytes = cap_bytes
        self._keep = keep

    def path(self, uid: str) -> Path:
        return self._folder / f"{uid}.log"

    def open(self, uid: str, user: WorkloadUser | None) -> int:
        """A descriptor to append to. The workload's group may write to the file, so that /dev/stdout can be opened; the
        folder is closed to others. Raises OSError, also if a link is in its place."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        log_fd = os.open(self.path(uid), os.O_WRONLY | os.O_APPEND | os.O_CREAT | _SAFELY, 0o600)
        os.set_blocking(log_fd, True)  # workloads expect it; only the open must not wait
        if user:
            os.fchown(log_fd, -1, user.gid)
            os.fchmod(log_fd, 0o660)
        return log_fd

    def keep(self, uid: str, text: bytes) -> None:
        """Store the end of a log that lies elsewhere and is about to go. Replaces what was kept, because a failed
        removal is retried. Raises OSError."""
        with os.fdopen(self.open(uid, None), "wb") as file:
            file.truncate(0)
            file.write(text)

    def read(self, path: Path, tail_bytes: int) -> bytes:
        """The last bytes, from the rotated file too if the log is shorter; b"" without a log. Raises OSError."""
        text = _tail(path, tail_bytes)
        if len(text) < tail_bytes:
            text = _tail(_rotated(path), tail_bytes - len(text)) + text
        return text

    def follow(self, path: Path, tail_bytes: int) -> LogFollower:
        return LogFollower(path, tail_bytes)

    def trim(self, path: Path) -> bool:
        """Rotate if it has passed the cap; returns whether it did. Raises OSError if that is impossible now."""
        try:
            log_fd = os.open(path, os.O_RDWR | _SAFELY)
        except FileNotFoundError:
            return False
        with os.fdopen(log_fd, "rb+", buffering=0) as file:
            if os.fstat(log_fd).st_size <= self._cap_bytes:
                return False
            rotated = _rotated(path)
            rotated.unlink(missing_ok=True)
            new = os.open(rotated, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(new, "wb") as copy:
                copy.write(_end_of(file, self._cap_bytes // 2))
            os.ftruncate(log_fd, 0)
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


class LogFollower:
    """Reads a growing file: first the last `tail_bytes`, from the rotated file too if needed. After a later rotation it
    continues at the beginning; what was written between its last read and the rotation is lost."""

    def __init__(self, path: Path, tail_bytes: int) -> None:
        self._path = path
        self._tail_bytes = max(0, tail_bytes)
        self._at: int | None = None
        self._before = b""

    def read(self, most_bytes: int = 64 * 1024) -> bytes:
        """The next bytes; b"" if there are none yet, or no file. Raises OSError."""
        try:
            with os.fdopen(os.open(self._path, os.O_RDONLY | _SAFELY), "rb", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                if self._at is None:
                    self._at = max(0, end - self._tail_bytes)
                    self._before = _tail(_rotated(self._path), self._tail_bytes - end)
                elif end < self._at:
                    self._at = 0
                if self._before:
                    part, self._before = self._before[:most_bytes], self._before[most_bytes:]
                    return part
                file.seek(self._at)
                part = file.read(most_bytes) or b""
        except (FileNotFoundError, BlockingIOError):
            return b""
        self._at += len(part)
        return part


def _rotated(path: Path) -> Path:
    return path.with_name(path.name + ".1")


def _changed_ns(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_mtime_ns
    return 0


def _tail(path: Path, size: int) -> bytes:
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | _SAFELY), "rb", buffering=0) as file:
            return _end_of(file, size)
    except FileNotFoundError:
        return b""


def _end_of(file: FileIO, size: int) -> bytes:
    size = max(0, size)
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - size))
    return file.read(size) or b""
