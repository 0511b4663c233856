"""What a container engine says of itself in `GET /info`, as far as decisions rest on it.

Pure: a dictionary in, facts out. Docker and Podman answer with the same keys; what only one of them has is noted at the
field. Nothing here decides; `engine_gpus`, `engine_plan` and `core.engine_capabilities` do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

EngineKind = Literal["docker", "podman"]

_NUMBERS = re.compile(r"\D{0,8}(\d+)\.(\d+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """One engine. `version` is (major, minor), (0, 0) where it can't be read: a build of somebody's own, taken for new.

    `cdi_dirs`: where a Docker looks for CDI specs, empty = its CDI is off (Podman has no such key). `disk_limits`: can
    a container's writable layer be bounded (`StorageOpt size`)? `cpus` 0 = it did not say.
    """

    kind: EngineKind
    version: tuple[int, int] = (0, 0)
    version_text: str = ""
    socket: str = ""
    root_dir: str = ""
    storage: str = ""
    disk_limits: bool = False
    live_restore: bool = False
    cpus: int = 0
    runtimes: frozenset[str] = frozenset()
    cdi_dirs: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """For people: `Docker 20.10.24`."""
        return f"{self.kind.capitalize()} {self.version_text}".rstrip()

    def since(self, version: tuple[int, int]) -> bool:
        """Is it that version or newer?"""
        return self.version == (0, 0) or self.version >= version


def read_facts(kind: EngineKind, version: str, info: Mapping[str, Any], socket: str = "") -> EngineFacts:
    """Never raises: what is missing or of another shape counts as not told."""
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
        cdi_dirs=tuple(str(one) for one in _sequence(info.get("CDISpecDirs"))),
    )


def _disk_limits(kind: EngineKind, info: Mapping[str, Any]) -> bool:
    """overlay2 bounds a container's layer on xfs that is mounted with project quotas; whether it is so mounted `info`
    does not tell, a create does. btrfs and zfs always can (Docker)."""
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
