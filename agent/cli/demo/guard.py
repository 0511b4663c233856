"""`python -I -S guard.py STATE_DIR remove|keep`: ends a demo's instances after the demo was killed.

Waits on stdin. "bye" means that the demo has ended everything. If stdin ends without it, the demo was killed: its
daemons get SIGTERM (child.py) but leave their instances running, which are killed here. Standard library only.
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
"""Until daemons that ignore SIGTERM are killed, and until the guard gives up."""
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
    """Sends SIGKILL, which ends frozen and stopped processes too."""
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
    """Removes the cgroup, empty once its processes are reaped, and then the agent's parent cgroup if empty."""
    for folder in (cgroup, cgroup.parent):
        try:
            folder.rmdir()
        except OSError:
            return


if __name__ == "__main__":
    main()
