"""Chooses how an instance's GPUs get into its container (`gpu.attach`): CDI, the NVIDIA runtime or configured mounts.
Also reads the host's CDI specs.

| engine | CDI by | NVIDIA runtime |
|---|---|---|
| Docker from 25, if `info` lists CDI folders | DeviceRequests, driver `cdi` | DeviceRequests, driver `nvidia` |
| Docker before 25 | - | DeviceRequests, driver `nvidia` |
| Podman from 5.4 | DeviceRequests, driver `cdi` | - |
| Podman before 5.4 | the libpod API's `devices` (its Docker API accepts the request but attaches nothing) | - |

Podman's Docker API accepts NVIDIA device requests too but ignores them. They are never sent to Podman: the instance
would start without its GPU.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from agent.adapters.engine.facts import EngineFacts
from agent.core.errors import PreconditionError
from agent.settings import GpuSettings

AttachMethod = Literal["none", "cdi", "cdi-libpod", "nvidia-runtime", "mounts"]

CDI_KIND = "nvidia.com/gpu"
CDI_FOLDERS = (Path("/etc/cdi"), Path("/var/run/cdi"))
ALL = "all"
READ_DEADLINE_S = 10.0
MAX_SPEC_BYTES = 8 << 20
MAX_SPECS = 64
NO_DEVICES = "void"
"""Tells NVIDIA's runtime to add nothing, whatever the image requests."""

DOCKER_CDI_SINCE = (25, 0)
PODMAN_REQUESTS_SINCE = (5, 4)

GENERATE = "nvidia-ctk cdi generate --device-name-strategy=uuid --output=/etc/cdi/nvidia.yaml"


@dataclass(frozen=True, slots=True)
class Attachment:
    """GPU settings of a container. `devices`: CDI names for the libpod API. `binds`: `host:container[:ro]`.
    `visible_devices`: NVIDIA_VISIBLE_DEVICES, which overrides the image's. `sees_all_gpus`: the container may reach
    GPUs that are not its own, so that only CUDA_VISIBLE_DEVICES tells it which are."""

    method: AttachMethod = "none"
    device_requests: tuple[Mapping[str, Any], ...] = ()
    devices: tuple[str, ...] = ()
    binds: tuple[str, ...] = ()
    visible_devices: str = NO_DEVICES
    sees_all_gpus: bool = False


NO_GPUS = Attachment()


def attach_gpus(
    settings: GpuSettings,
    engine: EngineFacts,
    cdi_devices: frozenset[str],
    gpu_uuids: Sequence[str],
    *,
    all_gpus: bool = False,
) -> Attachment:
    """Choose the attachment for an instance on `gpu_uuids`. `cdi_devices`: the result of `cdi_device_names`.

    Raises PreconditionError GPU_ATTACH_UNAVAILABLE, with the fix, if the configured method (`auto`: every method) is
    unavailable here."""
    if not gpu_uuids:
        return NO_GPUS
    device_names = (ALL,) if all_gpus else tuple(gpu_uuids)
    found = _attachment(settings, engine, cdi_devices, device_names)
    return replace(found, sees_all_gpus=all_gpus or found.method == "mounts")


def _attachment(
    settings: GpuSettings, engine: EngineFacts, cdi_devices: frozenset[str], device_names: Sequence[str]
) -> Attachment:
    match settings.attach:
        case "mounts":
            return Attachment("mounts", binds=settings.mounts.binds)
        case "nvidia-runtime":
            return _nvidia_runtime(engine, device_names)
        case "cdi":
            if problem := cdi_problem(engine, cdi_devices, device_names):
                raise _unavailable(f"gpu.attach: cdi is set, and {problem}")
            return _cdi(engine, device_names)
        case "auto":
            problem = cdi_problem(engine, cdi_devices, device_names)
            if not problem:
                return _cdi(engine, device_names)
            if engine.kind == "podman":
                raise _unavailable(problem)
            return _nvidia_runtime(engine, device_names)


def cdi_problem(engine: EngineFacts, cdi_devices: frozenset[str], device_names: Iterable[str]) -> str:
    """Why CDI can't attach these devices here, with the fix; "" if it can."""
    if engine.kind == "docker" and not engine.since(DOCKER_CDI_SINCE):
        return f"{engine.title} has no CDI; upgrade to Docker 25 or newer, or set gpu.attach: nvidia-runtime"
    if engine.kind == "docker" and not engine.cdi_dirs:
        return (
            f"CDI is turned off in {engine.title}; put "
            '{"features": {"cdi": true}} into /etc/docker/daemon.json and restart Docker'
        )
    if not cdi_devices:
        return f"the host has no CDI spec for {CDI_KIND}; create one: {GENERATE}"
    if missing := sorted(set(device_names) - cdi_devices):
        return f"the host's CDI specs do not name {', '.join(missing)}; create them again: {GENERATE}"
    return ""


def _cdi(engine: EngineFacts, device_names: Sequence[str]) -> Attachment:
    names = [f"{CDI_KIND}={device}" for device in device_names]
    if engine.kind == "podman" and not engine.since(PODMAN_REQUESTS_SINCE):
        return Attachment("cdi-libpod", devices=tuple(names))
    return Attachment("cdi", device_requests=({"Driver": "cdi", "DeviceIDs": names},))


def _nvidia_runtime(engine: EngineFacts, device_names: Sequence[str]) -> Attachment:
    if engine.kind == "podman":
        raise _unavailable(
            f"gpu.attach: nvidia-runtime is set, but {engine.title} does not support it; "
            f"set gpu.attach: cdi, and create a spec: {GENERATE}"
        )
    # Only `gpu`: the image requests further capabilities (compute, video ...) by NVIDIA_DRIVER_CAPABILITIES.
    request = {"Driver": "nvidia", "DeviceIDs": list(device_names), "Capabilities": [["gpu"]]}
    return Attachment("nvidia-runtime", device_requests=(request,), visible_devices=",".join(device_names))


def _unavailable(problem: str) -> PreconditionError:
    return PreconditionError("GPU_ATTACH_UNAVAILABLE", f"GPUs can't be attached to containers here: {problem}")


async def read_cdi_devices() -> frozenset[str]:
    """Run `cdi_device_names` in a thread. Raises PreconditionError GPU_ATTACH_UNAVAILABLE if the disk does not
    answer."""
    try:
        async with asyncio.timeout(READ_DEADLINE_S):
            return await asyncio.to_thread(cdi_device_names)
    except TimeoutError:
        raise _unavailable("the host's CDI specs can't be read in time; is its disk healthy?") from None


def cdi_device_names(folders: Sequence[Path] = CDI_FOLDERS) -> frozenset[str]:
    """The devices of kind nvidia.com/gpu in the host's CDI specs: UUIDs, indexes, `all`. Unreadable files count as
    absent, as they do for the engines. Blocks on disk: call it rarely, and in a thread."""
    names: set[str] = set()
    files = [file for folder in folders for file in _spec_files(folder)]
    for file in files[:MAX_SPECS]:
        names |= _names_in(file)
    return frozenset(names)


def _spec_files(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.iterdir() if file.suffix in (".json", ".yaml", ".yml"))
    except OSError:
        return []


def _names_in(file: Path) -> frozenset[str]:
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_SPEC_BYTES + 1)
        if len(text) > MAX_SPEC_BYTES:
            return frozenset()
        document = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return frozenset()
    if not isinstance(document, dict) or document.get("kind") != CDI_KIND:
        return frozenset()
    devices = document.get("devices")
    entries = devices if isinstance(devices, list) else []
    return frozenset(str(entry["name"]) for entry in entries if isinstance(entry, dict) and "name" in entry)
