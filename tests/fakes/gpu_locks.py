"""What agents leave behind of GPUs that were only emulated."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from agent.adapters.nvml.locks import FALLBACK_FOLDER, LOCK_FOLDER


def forget_locks(uuids: Sequence[str]) -> None:
    """Remove the locks of GPUs that nobody will have again: their driver and its directory are gone. (Real GPUs keep
    theirs, one file each until the next boot.)"""
    for uuid in uuids:
        for folder in (LOCK_FOLDER, FALLBACK_FOLDER):
            with suppress(OSError):
                (folder / f"hibernode-{uuid}.lock").unlink()
