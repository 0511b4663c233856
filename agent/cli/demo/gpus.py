"""The GPUs of a private scheduler and agent: emulated ones with a driver of their own, or those of this host."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from agent.cli.demo.processes import DemoProcesses

GPUS, GPU_GIB, GPU_MODEL, PROFILE = 2, 16, "L20", "580"
INSTANCES_PER_GPU = 2
BUILD_S = 120.0
DEV = Path("/dev")


class WorldGpus(Protocol):
    """Where the agent of a private world finds its GPUs."""

    def start(self, processes: DemoProcesses, environment: Mapping[str, str], step: Callable[[str], None]) -> None:
        """Starts what the GPUs need, without waiting for it."""

    async def wait(self, processes: DemoProcesses) -> None:
        """Returns once the GPUs can be used. Raises UnavailableError."""

    def exports(self, base: Mapping[str, str]) -> dict[str, str]:
        """Variables of the agent's environment."""

    def settings(self) -> dict[str, Any]:
        """The `gpu:` section of the agent's configuration."""

    def needs(self) -> list[str]:
        """Files that an instance's account must be able to read."""


class EmulatedGpus:
    """Two emulated GPUs, with a driver in `<home>/emulated`."""

    def __init__(self, home: Path) -> None:
        self.directory = home / "emulated"

    def start(self, processes: DemoProcesses, environment: Mapping[str, str], step: Callable[[str], None]) -> None:
        step(f"building and starting an emulated NVIDIA driver {PROFILE} with {GPUS} GPUs")
        options = {"--dir": self.directory, "--gpus": GPUS, "--gib": GPU_GIB, "--model": GPU_MODEL}
        arguments = [str(word) for pair in {**options, "--profile": PROFILE}.items() for word in pair]
        processes.start("driver", environment, "agent.cli.main", "emulated", "up", *arguments)

    async def wait(self, processes: DemoProcesses) -> None:
        await processes.wait_for("driver", (self.directory / "ready").exists, BUILD_S)

    def exports(self, base: Mapping[str, str]) -> dict[str, str]:
        from agent.emulated.env import exports

        return exports(self.directory, base)

    def settings(self) -> dict[str, Any]:
        seen = self.exports({})
        del seen["PATH"]
        types = {"fc.gpu.ada.1": f"Emulated {GPU_MODEL}"}
        return {"instances_per_gpu": INSTANCES_PER_GPU, "max_hold": "2s", "types": types, **_mounts(seen)}

    def needs(self) -> list[str]:
        return [str(self.directory / "lib" / "libcuda.so.1"), str(self.directory / "driver.sock")]


class HostGpus:
    """The GPUs of the driver that this process sees, be it NVIDIA's or an emulated one. An instance gets the variables
    with which this process finds the driver, since it inherits nothing."""

    def start(self, processes: DemoProcesses, environment: Mapping[str, str], step: Callable[[str], None]) -> None:
        pass

    async def wait(self, processes: DemoProcesses) -> None:
        pass

    def exports(self, base: Mapping[str, str]) -> dict[str, str]:
        return {}

    def settings(self) -> dict[str, Any]:
        from agent.emulated.env import SOCKET_VARIABLE

        seen = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", SOCKET_VARIABLE) if os.environ.get(name)}
        return _mounts(seen)

    def needs(self) -> list[str]:
        from agent.emulated.env import SOCKET_VARIABLE

        devices = [*DEV.glob("nvidia[0-9]*"), DEV / "nvidiactl", DEV / "nvidia-uvm"]
        libraries = [
            Path(folder) / "libcuda.so.1" for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder
        ]
        found = [str(path) for path in (*devices, *libraries) if path.exists()]
        return [*found, *filter(None, [os.environ.get(SOCKET_VARIABLE)])]


def _mounts(environment: Mapping[str, str]) -> dict[str, Any]:
    return {"host_memory_reserve": "128MiB", "attach": "mounts", "mounts": {"environment": dict(environment)}}
