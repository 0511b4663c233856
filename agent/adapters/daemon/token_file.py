"""Token files: made at a daemon's first start, readable only by their owner, never half written."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from agent.core.errors import ConfigError

TOKEN_BYTES = 32
MAX_FILE_BYTES = 4096


def ensure_token(path: Path) -> str:
    """The token in `path`; makes the file (0600) with a new one if there is none.

    Two daemons that start at once get the same token: a hard link makes the complete file appear. Raises ConfigError as
    `read_token`, or if the file can't be made.
    """
    if not path.exists():
        token = secrets.token_urlsafe(TOKEN_BYTES)
        draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            _write_new(draft, token)
            try:
                path.hardlink_to(draft)
                _sync_folder(path.parent)
            except FileExistsError:
                pass  # another daemon was first; its token is read below
            finally:
                draft.unlink()
        except OSError as error:
            message = f"cannot make the token file {path}: {error.strerror}; check the state directory and its owner"
            raise ConfigError("TOKEN_FILE_UNWRITABLE", message, path=str(path)) from error
    return read_token(path)


def read_token(path: Path) -> str:
    """The token in `path`, stripped of white space.

    Raises ConfigError with the fix if the file is missing, not a regular file, accessible to group or others (checked
    on the open file, so that it can't be exchanged in between), or does not hold exactly one token.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        message = f"cannot read the token file {path}: {error.strerror}; correct the path"
        raise ConfigError("TOKEN_FILE_UNREADABLE", message, path=str(path)) from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            message = f"the token file {path} is not a regular file; correct the path"
            raise ConfigError("TOKEN_FILE_INVALID", message, path=str(path))
        if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            mode = stat.S_IMODE(status.st_mode)
            message = f"the token file {path} is open to others (mode {mode:04o}); remove it, or chmod 600 it"
            raise ConfigError("TOKEN_FILE_TOO_OPEN", message, path=str(path), mode=f"{mode:04o}")
        content = file.read(MAX_FILE_BYTES)
    return _parsed(content, path)


def _parsed(content: bytes, path: Path) -> str:
    token = content.strip()
    # An HTTP header can carry printable ASCII without blanks.
    if not token or len(content) == MAX_FILE_BYTES or not all(0x21 <= byte <= 0x7E for byte in token):
        message = f"the token file {path} must hold one token; remove it, and the next start makes one"
        raise ConfigError("TOKEN_FILE_INVALID", message, path=str(path))
    return token.decode("ascii")


def _write_new(path: Path, token: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(f"{token}\n".encode())
        file.flush()
        os.fsync(descriptor)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
