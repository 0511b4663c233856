"""Reads the facts about a container engine from `GET /info`.

Pure. Docker and Podman use the same keys; `EngineFacts` marks fields that only one of them has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from agent.core.engine_capabilities import EngineFacts as EngineFacts  # noqa: PLC0414 (re-exported)
from agent.core.engine_capabilities import EngineKind as EngineKind  # noqa: PLC0414 (re-exported)

_NUMBERS = re.compile(r"\D{0,8}(\d+)\.(\d+)", re.ASCII)


def read_facts(kind: EngineKind, version: str, info: Mapping[str, Any], socket: str = "") -> EngineFacts:
    """Never raises: a missing or malformed value counts as unknown."""
    numbers = _NUMBERS.match(version)
    return EngineFacts(
        kind=kind,
        version=(int(numbers[1]), int(numbers[2])) if numbers else (0, 0),
        version_text=version,
        socket=socket,
        root_dir=str(info.get("DockerRootDir") or ""),
        storage=str(info.get("Driver") or ""),
        disk_limits=_disk_limits(kind, info),
        live_restore=info.get("LiveRestoreEnabled") is True,
        cpus=_count(info.get("NCPU")),
        runtimes=frozenset(_mapping(info.get("Runtimes"))),
        cdi_dirs=tuple(str(item) for item in _sequence(info.get("CDISpecDirs"))),
        networks=frozenset(str(item) for item in _sequence(_mapping(info.get("Plugins")).get("Network"))),
        forwarding=info.get("IPv4Forwarding") is not False,
    )


def _disk_limits(kind: EngineKind, info: Mapping[str, Any]) -> bool:
    """Whether the storage can limit a container's layer. overlay2 needs xfs mounted with project quotas; `info` does
    not show the mount option, only a create does. Docker's btrfs and zfs always can."""
    status = {str(pair[0]): str(pair[1]) for pair in _sequence(info.get("DriverStatus")) if len(_sequence(pair)) == 2}
    driver = str(info.get("Driver") or "")
    if driver in ("overlay2", "overlay"):
        return status.get("Backing Filesystem", "") == "xfs"
    return kind == "docker" and driver in ("btrfs", "zfs")


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _sequence(value: object) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()
