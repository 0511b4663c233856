"""Finds the child processes that call the driver for a checkpointer of this test."""

from __future__ import annotations

import psutil


def worker_pids() -> list[int]:
    """The living driver workers, in the order of their pids."""
    return _children("worker.py")


def utility_pids() -> list[int]:
    """The running `cuda-checkpoint` programs."""
    return _children("cuda-checkpoint")


def _children(name: str) -> list[int]:
    found = []
    for child in psutil.Process().children():
        try:
            if any(word.endswith(name) for word in child.cmdline()):
                found.append(child.pid)
        except psutil.Error:  # it has ended
            continue
    return sorted(found)
