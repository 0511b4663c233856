"""Removes the lock files that agents leave behind for emulated GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from agent.adapters.nvml.locks import FALLBACK_FOLDER, LOCK_FOLDER


def forget_locks(uuids: Sequence[str]) -> None:
    """Remove the locks of GPUs whose emulated driver is gone. (Real GPUs keep theirs, one file each until the next
    boot.)"""
    for uuid in uuids:
        for folder in (LOCK_FOLDER, FALLBACK_FOLDER):
            with suppress(OSError):
                (folder / f"hibernode-{uuid}.lock").unlink()
