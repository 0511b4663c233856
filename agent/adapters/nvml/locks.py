"""One agent per GPU: a lock file per GPU UUID, held for the life of the process.

All agents of a host must use one folder, whatever their environment says (TMPDIR). Root uses /run/lock and nothing
else: a second folder would be no lock. Other users use /tmp where only root may write to /run/lock.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from agent.core.errors import PreconditionError

LOCK_FOLDER = Path("/run/lock")
FALLBACK_FOLDER = Path("/tmp")  # noqa: S108 - the names are known to all; links are not followed, locks of others respected


class GpuLocks:
    """Locks on a set of GPUs. They end with the process, however it ends."""

    def __init__(self, folder: Path = LOCK_FOLDER) -> None:
        self._folder = folder if os.geteuid() == 0 or os.access(folder, os.W_OK) else FALLBACK_FOLDER
        self._descriptors: list[int] = []

    def acquire(self, uuids: Sequence[str]) -> None:
        """Lock all or none. Raises PreconditionError GPU_IN_USE if another agent drives one, GPU_LOCK_UNUSABLE."""
        if os.geteuid() == 0:
            with suppress(OSError):  # small images lack it; if it can't be made, the open below fails
                self._folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        for uuid in uuids:
            path = self._folder / f"hibernode-{uuid.replace('/', '_')}.lock"
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
                self._descriptors.append(descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self.release()
                raise PreconditionError(
                    "GPU_IN_USE",
                    f"GPU {uuid} is driven by another agent on this host (it holds {path}); stop that agent",
                ) from error
            except OSError as error:
                self.release()
                raise PreconditionError(
                    "GPU_LOCK_UNUSABLE",
                    f"cannot lock GPU {uuid}: {path}: {error.strerror}; make that folder writable for the "
                    "agent; if an agent of another user left the file, remove it",
                ) from error

    def release(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
