"""The environment under which any program sees the emulated driver, nvidia-ml-py and the agent alike."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent.emulated.paths import DRIVER_SOCKET, LIBRARIES, PROGRAMS

SOCKET_VARIABLE = "HIBERNODE_EMULATED_SOCKET"


def exports(directory: Path, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables to set, as they are after prepending to `base`: what an image put there stays reachable.

    The paths need not exist yet: the libraries come with the first `up` on the directory.
    """
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
    """The agent's `gpu:` section under which containers get the driver: its libraries and its socket, at the paths they
    have on the host. Nothing need be writable: a socket can be connected to on a read-only mount. The directory as a
    whole is left out, for its control socket is not for instances."""
    directory = directory.absolute()
    environment = {"LD_LIBRARY_PATH": str(directory / LIBRARIES), SOCKET_VARIABLE: str(directory / DRIVER_SOCKET)}
    binds = [f"{path}:{path}:ro" for path in _visible_paths(directory)]
    return {"attach": "mounts", "mounts": {"environment": environment, "binds": binds}}


def cdi_spec(directory: Path, gpu_uuids: Sequence[str]) -> dict[str, Any]:
    """The same as a CDI specification: a device for each GPU, and `all`. Its LD_LIBRARY_PATH takes the place of the
    image's, since CDI can't put one before another."""
    directory = directory.absolute()
    options = ["ro", "nosuid", "nodev", "bind"]
    return {
        "cdiVersion": "0.5.0",
        "kind": "nvidia.com/gpu",
        "devices": [
            # A device without edits of its own is no device to CDI.
            {"name": name, "containerEdits": {"env": [f"{SOCKET_VARIABLE}={directory / DRIVER_SOCKET}"]}}
            for name in (*gpu_uuids, "all")
        ],
        "containerEdits": {
            "env": [f"LD_LIBRARY_PATH={directory / LIBRARIES}", "NVIDIA_VISIBLE_DEVICES=void"],
            "mounts": [
                {"hostPath": str(path), "containerPath": str(path), "options": options}
                for path in _visible_paths(directory)
            ],
        },
    }


def _visible_paths(directory: Path) -> tuple[Path, ...]:
    return (directory / LIBRARIES, directory / DRIVER_SOCKET)
