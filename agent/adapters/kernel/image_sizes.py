"""Remembers the size of each instance's GPU image across restarts of the agent: of a frozen process nothing reports it.

A hint, not a record: one file per instance, never fsynced, because it is useless after a reboot.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path


class ImageSizes:
    """Sizes in bytes in `<folder>/<uid>.bytes`. Raises OSError if the disk does."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def note(self, uid: str, image_bytes: int) -> None:
        """Write atomically: a reader finds the old size or the new one."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = self._folder / f"{uid}.partial"
        partial.write_text(f"{image_bytes}\n", encoding="ascii")
        partial.replace(self._folder / f"{uid}.bytes")

    def read(self, uid: str) -> int | None:
        """None if it was never noted or can't be read."""
        try:
            return int((self._folder / f"{uid}.bytes").read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None

    def forget(self, uid: str) -> None:
        """Idempotent."""
        (self._folder / f"{uid}.bytes").unlink(missing_ok=True)

    def keep(self, living: Collection[str]) -> None:
        """Forget all but these."""
        for path in self._folder.glob("*.*"):
            if path.stem not in living:
                path.unlink(missing_ok=True)
