"""`python -I -S guard.py STATE_DIR remove|keep`: ends a demo's instances when the demo itself was killed.

Waits on stdin: "bye" means that everything was ended in order. An end without it means that the demo is gone; its
daemons follow it by SIGTERM, and what they leave on purpose, their instances, is killed here. Standard library only.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PATIENCE_S, DEADLINE_S = 30.0, 45.0
"""Until daemons that do not follow SIGTERM are killed, and until the guard gives up."""
POLL_S = 0.1


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    state_dir, remove = Path(sys.argv[1]), sys.argv[2] == "remove"
    if b"bye" in os.read(0, 16):
        return
    cgroups = set(_cgroups(state_dir))
    mark = f"HIBERNODE_INSTANCE={_text(state_dir / 'agent' / 'uuid')}/"
    patience, deadline = time.monotonic() + PATIENCE_S, time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        cgroups |= set(_cgroups(state_dir))
        pids, daemons = list(_instances(mark)), list(_daemons(state_dir))
        for pid in pids + (daemons if time.monotonic() > patience else []):
            _kill(pid)
        if not pids and not daemons:
            break
        time.sleep(POLL_S)
    for cgroup in cgroups:
        _remove_cgroup(cgroup)
    if remove:
        shutil.rmtree(state_dir, ignore_errors=True)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "none"


def _environments() -> Iterator[tuple[int, list[str]]]:
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                yield int(name), Path(f"/proc/{name}/environ").read_text(errors="replace").split("\0")
            except OSError:
                continue


def _instances(mark: str) -> Iterator[int]:
    for pid, environment in _environments():
        if any(entry.startswith(mark) for entry in environment):
            yield pid


def _daemons(state_dir: Path) -> Iterator[int]:
    for pid, environment in _environments():
        if f"HIBERNODE_DEMO={state_dir}" in environment:
            yield pid


def _kill(pid: int) -> None:
    """SIGKILL ends frozen and stopped processes too."""
    with suppress(OSError):
        os.kill(pid, signal.SIGKILL)


def _cgroups(state_dir: Path) -> Iterator[Path]:
    for handle in state_dir.glob("agent/instances/*/handle.json"):
        try:
            cgroup = json.loads(handle.read_bytes())["handle"]["cgroup"]
        except (OSError, ValueError, KeyError):
            continue
        if cgroup:
            yield Path(cgroup)


def _remove_cgroup(cgroup: Path) -> None:
    """It is empty once its processes are reaped; its parent is ours too, and goes with the last of them."""
    for folder in (cgroup, cgroup.parent):
        try:
            folder.rmdir()
        except OSError:
            return


if __name__ == "__main__":
    main()
