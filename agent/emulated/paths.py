"""File names in an emulated driver's directory, all of which may be bind-mounted into a container."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DRIVER_SOCKET = "driver.sock"
CONTROL_SOCKET = "control.sock"
READY_FILE = "ready"
LOCK_FILE = "lock"
LIBRARIES = "lib"
PROGRAMS = "bin"

_MAX_SUN_PATH = 107


@contextmanager
def socket_path(path: Path) -> Iterator[str]:
    """A path short enough for a unix socket address, valid inside the block; long paths go through /proc."""
    if len(os.fsencode(path)) <= _MAX_SUN_PATH:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
