"""What a container engine can do for instances: a pure function from its facts to `hibernode doctor`'s lines.

A missing capability is a WARN with a fix: it forbids no idle mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from agent.core.snapshots import CapabilityLine

EngineKind = Literal["docker", "podman"]


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """An engine's `info`.

    - `version`: (major, minor); (0, 0) = unreadable, a private build taken as new
    - `disk_limits`: a container's writable layer can be bounded (`StorageOpt size`)
    - `cpus`: 0 = unknown
    - `cdi_dirs`: Docker's folders of CDI specs, empty = CDI is off; always empty for Podman
    - `networks`: network drivers, empty = unknown
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
    networks: frozenset[str] = frozenset()
    forwarding: bool = True

    @property
    def title(self) -> str:
        """Name and version, like `Docker 20.10.24`."""
        return f"{self.kind.capitalize()} {self.version_text}".rstrip()

    def since(self, version: tuple[int, int]) -> bool:
        """The engine has this version or a newer one."""
        return self.version == (0, 0) or self.version >= version


@dataclass(frozen=True, slots=True)
class EngineSurvey:
    """What start-up found out about the engine.

    - `facts`: None = the engine can't be used because of `problem` (with its fix), or is turned off (no problem)
    - `gpus`: how GPUs are attached (`How` of adapters/engine/gpus.py); "" = the host has none
    - `gpu_problem`: why GPUs can't be attached
    - `nvidia_hook`: the hook program of NVIDIA's runtime is installed
    - `cgroups`: the agent sees the containers' cgroups
    - `disk_limit`: the setting
    """

    facts: EngineFacts | None = None
    problem: str = ""
    gpus: str = ""
    gpu_problem: str = ""
    nvidia_hook: bool = True
    cgroups: bool = True
    disk_limit: str = "auto"


def engine_lines(survey: EngineSurvey) -> Sequence[CapabilityLine]:
    """One line a subject; only the engine's own if it can't be used."""
    facts = survey.facts
    if facts is None:
        if not survey.problem:
            return (
                _ok("engine", "turned off (runtime.engine.socket: off): only functions with image `host` run here"),
            )
        what, _, advice = survey.problem.partition("; ")
        fix = f"{advice or 'see the log of the engine'} (if none is installed: apt-get install docker.io, or podman)"
        return (_warn("engine", f"functions with an image can't run here: {what}", fix),)
    return tuple(_lines(survey, facts))


def _lines(survey: EngineSurvey, facts: EngineFacts) -> Iterator[CapabilityLine]:
    yield _ok("engine", f"{facts.title} at {facts.socket}")
    if facts.kind == "docker":
        yield _live_restore(facts)
    yield _disk_limit(survey.disk_limit, facts)
    if survey.gpus or survey.gpu_problem:
        yield _gpus(survey, facts)
    yield _cgroup(survey.cgroups)
    yield _network(facts)


def _live_restore(facts: EngineFacts) -> CapabilityLine:
    if facts.live_restore:
        return _ok("engine.live_restore", "containers outlive a restart of the Docker daemon")
    return _warn(
        "engine.live_restore",
        "a restart or an update of the Docker daemon ends all instances",
        'put {"live-restore": true} into /etc/docker/daemon.json, then: systemctl reload docker',
    )


def _disk_limit(setting: str, facts: EngineFacts) -> CapabilityLine:
    name, where = "engine.disk_limit", facts.root_dir or "the engine's data folder"
    if setting == "off":
        return _ok(name, "turned off: an instance may fill the disk below " + where)
    if facts.disk_limits:
        return _ok(name, f"an instance's disk is bounded by {facts.storage}, if its file system keeps quotas")
    fix = f"put {where} on xfs, mounted with pquota; or set runtime.engine.disk_limit: off"
    if setting == "require":
        return _warn(name, f"{facts.storage} can't bound a disk here, and it is required: no image is started", fix)
    return _warn(name, f"{facts.storage} can't bound a disk here: an instance may fill {where}", fix)


def _gpus(survey: EngineSurvey, facts: EngineFacts) -> CapabilityLine:
    name = "engine.gpus"
    if survey.gpu_problem:
        what, _, fix = survey.gpu_problem.partition("; ")
        return _warn(name, what, fix or "see gpu.attach in agent.yaml")
    match survey.gpus:
        case "mounts":
            return _ok(name, "attached by the mounts of gpu.mounts")
        case "nvidia-runtime":
            if not survey.nvidia_hook and "nvidia" not in facts.runtimes:
                return _warn(
                    name,
                    f"{facts.title} has no NVIDIA runtime: containers that need a GPU don't start",
                    "install nvidia-container-toolkit, then: nvidia-ctk runtime configure --runtime=docker and "
                    "systemctl restart docker",
                )
            return _ok(name, "attached by the NVIDIA runtime")
        case "cdi-libpod":
            return _ok(name, "attached by CDI, through Podman's own API")
        case _:
            return _ok(name, "attached by CDI")


def _cgroup(visible: bool) -> CapabilityLine:
    if visible:
        return _ok("engine.cgroup", "the containers' cgroups (v2) can be seen: instances are frozen as a whole")
    return _warn(
        "engine.cgroup",
        "the agent sees no cgroups but its own: containers can be neither started nor frozen",
        "run the agent on the host, or its container with --cgroupns=host and /sys/fs/cgroup mounted rw",
    )


def _network(facts: EngineFacts) -> CapabilityLine:
    if facts.networks and "bridge" not in facts.networks:
        return _warn(
            "engine.network",
            f"{facts.title} has no bridge networks, and instances live on one",
            "apt-get install netavark" if facts.kind == "podman" else "turn on its bridge driver",
        )
    if not facts.forwarding:
        return _warn(
            "engine.network",
            "the kernel forwards no packets: instances can't reach anything outside this host",
            "sysctl -w net.ipv4.ip_forward=1; to keep it over a reboot write it to /etc/sysctl.d/",
        )
    return _ok("engine.network", "instances get a bridge network of their own")


def _ok(name: str, reason: str) -> CapabilityLine:
    return CapabilityLine(name, "OK", reason, "")


def _warn(name: str, reason: str, fix: str) -> CapabilityLine:
    return CapabilityLine(name, "WARN", reason, fix)
