"""The environment in which programs find the emulated driver."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent.emulated.paths import DRIVER_SOCKET, LIBRARIES, PROGRAMS

SOCKET_VARIABLE = "HIBERNODE_EMULATED_SOCKET"


def exports(directory: Path, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables to set, prepended to `base` so that an image's own values stay effective.

    The paths need not exist yet: the first `up` on the directory creates the libraries."""
    directory = directory.absolute()

    def prepended(name: str, folder: Path) -> str:
        others = [part for part in base.get(name, "").split(":") if part and part != str(folder)]
        return ":".join([str(folder), *others])

    return {
        "LD_LIBRARY_PATH": prepended("LD_LIBRARY_PATH", directory / LIBRARIES),
        "PATH": prepended("PATH", directory / PROGRAMS),
        SOCKET_VARIABLE: str(directory / DRIVER_SOCKET),
    }


def attachment(directory: Path) -> dict[str, Any]:
    """The agent's `gpu:` section that mounts the driver's libraries and socket into containers, read-only, at their
    host paths. The control socket stays outside: it is not for instances."""
    directory = directory.absolute()
    environment = {"LD_LIBRARY_PATH": str(directory / LIBRARIES), SOCKET_VARIABLE: str(directory / DRIVER_SOCKET)}
    binds = [f"{path}:{path}:ro" for path in _visible_paths(directory)]
    return {"attach": "mounts", "mounts": {"environment": environment, "binds": binds}}


def cdi_spec(directory: Path, gpu_uuids: Sequence[str]) -> dict[str, Any]:
    """The same as a CDI specification, with a device per GPU and `all`. LD_LIBRARY_PATH replaces the image's, because
    CDI can't prepend."""
    directory = directory.absolute()
    options = ["ro", "nosuid", "nodev", "bind"]
    return {
        "cdiVersion": "0.5.0",
        "kind": "nvidia.com/gpu",
        "devices": [
            {"name": name, "containerEdits": {"env": [attached(uuid) for uuid in uuids]}}
            for name, uuids in (*((uuid, (uuid,)) for uuid in gpu_uuids), ("all", gpu_uuids))
        ],
        "containerEdits": {
            "env": [
                f"{SOCKET_VARIABLE}={directory / DRIVER_SOCKET}",
                f"LD_LIBRARY_PATH={directory / LIBRARIES}",
                "NVIDIA_VISIBLE_DEVICES=void",
            ],
            "mounts": [
                {"hostPath": str(path), "containerPath": str(path), "options": options}
                for path in _visible_paths(directory)
            ],
        },
    }


def attached(gpu_uuid: str) -> str:
    """The variable by which a container has a GPU; one without any such variable has all (`src/process.c`)."""
    return f"HIBERNODE_EMULATED_GPU_{gpu_uuid.removeprefix('GPU-').replace('-', '').lower()}=1"


def _visible_paths(directory: Path) -> tuple[Path, ...]:
    return (directory / LIBRARIES, directory / DRIVER_SOCKET)
