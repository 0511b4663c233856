"""A daemon's state directory: one owner at a time, a UUID, and the file with its endpoints."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from agent.core.errors import ConfigError, PreconditionError

ENDPOINTS = "endpoints.json"


class StateDir:
    """An open, locked state directory. The lock ends with the process, however it ends.

    `uuid` was generated with the directory; containers carry it, and those with another one are never touched.
    """

    def __init__(self, path: Path, *, passable: bool = False) -> None:
        """Make the directory (0700) if needed and lock it.

        Raises PreconditionError STATE_DIR_IN_USE if another process owns it, ConfigError if it can't be used. A
        directory that others may write to, or that belongs to another user, is refused: its creator could have planted
        a token, a database or a link. `passable`: others may pass through it (0711) but not list it, so that processes
        of another user reach their own folder below; everything inside is 0600, or harmless (uuid, endpoints.json).
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            mode = _own_mode(path)
            if passable:
                path.chmod(mode | 0o011)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigError(
                "STATE_DIR_UNUSABLE", f"cannot use state_dir {path}: {error.strerror}; choose another or fix its owner"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise PreconditionError(
                "STATE_DIR_IN_USE", f"another daemon runs on state_dir {path}; stop it, or choose another state_dir"
            ) from error
        try:
            self.uuid = self._identity()
        except (OSError, ConfigError) as error:
            os.close(self._lock)
            raise error if isinstance(error, ConfigError) else _unwritable(path, error) from error

    def __enter__(self) -> StateDir:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the endpoints and release the lock."""
        (self.path / ENDPOINTS).unlink(missing_ok=True)
        os.close(self._lock)

    def write_endpoints(self, endpoints: Mapping[str, str]) -> None:
        """Write the bound addresses atomically. Raises ConfigError STATE_DIR_UNUSABLE, e.g. on a full disk."""
        try:
            write_atomically(self.path / ENDPOINTS, json.dumps(dict(endpoints), indent=2).encode() + b"\n")
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def _identity(self) -> str:
        file = self.path / "uuid"
        if not file.exists():
            write_atomically(file, str(uuid.uuid4()).encode())
        try:
            text = file.read_text(encoding="ascii").strip()
            uuid.UUID(text)
        except ValueError:  # with another uuid the containers of this directory would be taken for another's
            message = f"{file} is damaged; restore it, or take the state_uuid of an {self.path}/instances/*/handle.json"
            raise ConfigError("STATE_DIR_DAMAGED", message) from None
        return text


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError("STATE_DIR_UNUSABLE", f"cannot write into state_dir {path}: {error.strerror}")


def _own_mode(path: Path) -> int:
    """The directory's mode. Raises ConfigError STATE_DIR_UNSAFE if anyone but us or root may write to it."""
    status = path.stat()
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid not in (0, os.geteuid()):
        message = f"state_dir {path} belongs to another user (uid {status.st_uid}); choose one of your own"
        raise ConfigError("STATE_DIR_UNSAFE", message)
    if mode & 0o022:
        message = f"others may write to state_dir {path} (mode {mode:04o}); `chmod go-w` it, or choose another"
        raise ConfigError("STATE_DIR_UNSAFE", message)
    return mode


def write_atomically(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Replace `path` durably: after a crash it has the old or the new content."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
