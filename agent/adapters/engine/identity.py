"""Finds a container's main process and cgroup.

The cgroup must contain the container's id: freezing and killing a wrong one would hit another container.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.adapters.engine.exits import is_running
from agent.adapters.kernel import cgroup, process_table
from agent.adapters.kernel.process_table import PROC
from agent.core.errors import InstanceError
from agent.core.types import ProcessId


@dataclass(frozen=True, slots=True)
class ContainerIdentity:
    """A running container. `stop_signal` 0: the image names none that this host knows."""

    process: ProcessId
    cgroup: Path
    stop_signal: int


def identify(inspected: Mapping[str, Any], boot_id: str, proc: Path = PROC) -> ContainerIdentity | None:
    """Identify a container from its inspect answer; None if it has ended since.

    Raises InstanceError CGROUP_UNKNOWN if this agent could not freeze it."""
    container_id, state = str(inspected["Id"]), inspected.get("State") or {}
    pid = int(state.get("Pid") or 0)
    process = process_table.identify(pid, boot_id, proc) if pid and is_running(state) else None
    if process is None:
        return None
    path = _own_cgroup(pid, container_id, proc)
    if path is None:
        if not process_table.is_alive(process, boot_id, proc):
            return None
        raise InstanceError(
            "CGROUP_UNKNOWN",
            f"no v2 cgroup of container {container_id[:12]} (process {pid}) is visible to the agent, so it can "
            "neither freeze nor kill it; the agent must run on the engine's own host, in its pid and cgroup "
            "namespace, as root, with cgroup v2 mounted (beside v1 is fine)",
        )
    return ContainerIdentity(process, path, _signal(str((inspected.get("Config") or {}).get("StopSignal") or "")))


def _own_cgroup(pid: int, container_id: str, proc: Path) -> Path | None:
    mount = cgroup.find_v2_mount((proc / "self/mountinfo").read_text(encoding="utf-8"))
    try:
        membership = cgroup.parse_membership((proc / str(pid) / "cgroup").read_text(encoding="utf-8"))
    except (FileNotFoundError, ProcessLookupError):
        return None
    named = membership.get("", "")
    path = mount.locate(named) if mount else None
    if path is None or container_id not in named or not (path / "cgroup.freeze").exists():
        return None
    return path


def _signal(name: str) -> int:
    """The number of "SIGINT", "INT" or "2"; 0 for an unknown signal."""
    if name.isdecimal():
        return int(name) if 0 < int(name) < signal.NSIG else 0
    full = name if name.startswith("SIG") else f"SIG{name}"
    return int(signal.Signals[full]) if full in signal.Signals.__members__ else 0
