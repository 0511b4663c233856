"""The environment under which any program sees the emulated driver, nvidia-ml-py and the agent alike."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

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
