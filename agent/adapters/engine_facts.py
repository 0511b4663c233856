"""What a container engine says of itself, read once per connection from `GET /version` and `GET /info`.

Pure: dictionaries in, facts out. Docker and Podman answer with the same keys; what only one of them has is noted at the
field. Nothing here decides; `engine_gpus`, `engine_plan` and `core.engine_capabilities` do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from agent.core.errors import PreconditionError

EngineKind = Literal["docker", "podman"]

OLDEST: Mapping[EngineKind, tuple[int, int]] = {"docker": (20, 10), "podman": (4, 3)}

_NUMBERS = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """One engine. `version` as it is compared, `version_text` as it says it.

    `cdi_dirs`: where a Docker looks for CDI specs, empty = its CDI is off (Podman has no such key). `disk_limits`: can
    a container's writable layer be bounded (`StorageOpt size`)? `cpus` 0 = it did not say.
    """

    kind: EngineKind
    version: tuple[int, int, int]
    version_text: str
    socket: str = ""
    root_dir: str = ""
    storage: str = ""
    disk_limits: bool = False
    cgroup_version: str = ""
    live_restore: bool = False
    cpus: int = 0
    runtimes: frozenset[str] = frozenset()
    cdi_dirs: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """For people: `Docker 20.10.24`."""
        return f"{self.kind.capitalize()} {self.version_text}"


def read_facts(version: Mapping[str, Any], info: Mapping[str, Any], socket: str = "") -> EngineFacts:
    """Raises PreconditionError ENGINE_TOO_OLD, with what is needed."""
    kind = engine_kind(version)
    text = str(version.get("Version") or info.get("ServerVersion") or "")
    found = EngineFacts(
        kind=kind,
        version=_version(text),
        version_text=text,
        socket=socket,
        root_dir=str(info.get("DockerRootDir") or ""),
        storage=str(info.get("Driver") or ""),
        disk_limits=_disk_limits(kind, info),
        cgroup_version=str(info.get("CgroupVersion") or ""),
        live_restore=info.get("LiveRestoreEnabled") is True,
        cpus=_count(info.get("NCPU")),
        runtimes=frozenset(_mapping(info.get("Runtimes"))),
        cdi_dirs=tuple(str(one) for one in _sequence(info.get("CDISpecDirs"))),
    )
    refuse_too_old(found)
    return found


def engine_kind(version: Mapping[str, Any]) -> EngineKind:
    """Podman names itself among the components; its version numbers say nothing of Docker's."""
    names = [str(_mapping(one).get("Name", "")) for one in _sequence(version.get("Components"))]
    return "podman" if any("podman" in name.lower() for name in names) else "docker"


def refuse_too_old(facts: EngineFacts) -> None:
    """PreconditionError ENGINE_TOO_OLD. A version that can't be read is taken for a new one (a build of one's own)."""
    oldest = OLDEST[facts.kind]
    if facts.version != (0, 0, 0) and facts.version[:2] < oldest:
        raise PreconditionError(
            "ENGINE_TOO_OLD",
            f"{facts.title} at {facts.socket or 'this socket'} is older than {oldest[0]}.{oldest[1]:02d}"
            if facts.kind == "docker"
            else f"{facts.title} at {facts.socket or 'this socket'} is older than {oldest[0]}.{oldest[1]}",
            fix="upgrade it",
        )


def _disk_limits(kind: EngineKind, info: Mapping[str, Any]) -> bool:
    """overlay2 bounds a container's layer on xfs that is mounted with project quotas; whether it is so mounted `info`
    does not tell, a create does. btrfs and zfs always can (Docker)."""
    status = {str(pair[0]): str(pair[1]) for pair in _sequence(info.get("DriverStatus")) if len(_sequence(pair)) == 2}
    driver = str(info.get("Driver") or "")
    if driver in ("overlay2", "overlay"):
        return status.get("Backing Filesystem", "") == "xfs"
    return kind == "docker" and driver in ("btrfs", "zfs", "windowsfilter")


def _version(text: str) -> tuple[int, int, int]:
    found = _NUMBERS.match(text)
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else (0, 0, 0)


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _sequence(value: object) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()
