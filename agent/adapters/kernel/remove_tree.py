"""Removes a folder that a workload could fill at will: with any depth, links and modes.

`shutil.rmtree` recurses and keeps a descriptor per level: a thousand nested folders end it with RecursionError or use
up the daemon's descriptors. Here every folder found is moved up to the top, emptied there and removed: one level and
two descriptors at any depth. Everything goes by descriptor and name, so that no link is followed, not even one that
another workload of the same user creates meanwhile.
"""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
MAX_ROUNDS = 1_000_000
"""Each removes one level; a writer that keeps adding folders can't keep it busy for ever."""


def remove_tree(path: Path) -> None:
    """Delete the folder and everything in it. Idempotent. Raises OSError if something can't be removed, after removing
    the rest. May take long: call it outside the loop's thread."""
    try:
        top = os.open(path, _FOLDER)
    except FileNotFoundError:
        return
    try:
        _empty(top)
    finally:
        os.close(top)
    os.rmdir(path)


def _empty(top: int) -> None:
    moved = (f".{secrets.token_hex(8)}-{number}" for number in itertools.count())
    for _ in range(MAX_ROUNDS):
        progress = False
        left: OSError | None = None
        for name, is_folder in _entries(top):
            try:
                if is_folder:
                    _flatten(top, name, moved)
                else:
                    os.unlink(name, dir_fd=top)
                progress = True
            except FileNotFoundError:
                pass  # already gone
            except OSError as error:
                left = error
        if not progress:
            if left:
                raise left
            return


def _flatten(top: int, name: str, moved: Iterator[str]) -> None:
    """Unlink a folder's files, move its subfolders up, remove it. Raises OSError if nothing could be done."""
    _open_up(top, name)
    progress = False
    folder = os.open(name, _FOLDER, dir_fd=top)
    try:
        for inner, is_folder in _entries(folder):
            with suppress(OSError):  # the rmdir below fails then
                if is_folder:
                    _open_up(folder, inner)
                    os.rename(inner, next(moved), src_dir_fd=folder, dst_dir_fd=top)
                else:
                    os.unlink(inner, dir_fd=folder)
                progress = True
    finally:
        os.close(folder)
    try:
        os.rmdir(name, dir_fd=top)
    except OSError:
        if not progress:
            raise


def _entries(folder: int) -> list[tuple[str, bool]]:
    with os.scandir(folder) as found:
        return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in found]


def _open_up(folder: int, name: str) -> None:
    """A workload of the agent's own user may have closed its folders. Not as root: it needs no mode, and chmod follows
    links."""
    if os.geteuid() != 0:
        with suppress(OSError):
            os.chmod(name, 0o700, dir_fd=folder)
